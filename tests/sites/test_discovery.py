"""Sites of whole models: names, order, and what the check in training mode refuses."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify import find_mlps
from moeify.errors import CaptureError
from moeify.sites.discovery import discover

transformers = pytest.importorskip("transformers")
D, H = 8, 24


class MLP(nn.Module):
    """Does something in training only."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(D, H), nn.Linear(H, D), how

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.training and self.how == "noise":
            h = h + torch.randn_like(h)
        act = F.silu if self.training and self.how == "other" else F.gelu
        h = F.dropout(act(h), 0.1, self.training and self.how != "never")
        y = self.down(h)
        if self.training and self.how == "depth":
            y = y * torch.bernoulli(torch.full(y.shape[:1], 0.9))[:, None, None]
        return y


def only(model: nn.Module, x: Tensor) -> Any:
    found = discover(model, x)
    assert len(found.sites) == 1, found.near_misses
    return found.sites[0]


@pytest.mark.parametrize(
    ("how", "install", "reason"),
    [
        ("", "module", ""),
        ("depth", "across modules", ""),
        ("noise", "refused", "in training mode it is not such an MLP"),
        ("other", "refused", "something else in training mode"),
        ("never", "refused", "something else in training mode"),
    ],
)
def test_training_mode_is_checked(how: str, install: str, reason: str) -> None:
    site = only(nn.Sequential(nn.Linear(D, D), MLP(how)), torch.randn(2, 5, D))
    assert site.install == install
    assert reason in site.reason


def test_names_and_order() -> None:
    model = nn.Sequential(MLP(), nn.Sequential(nn.LayerNorm(D), MLP()), MLP("other"))
    sites = find_mlps(model, torch.randn(2, 5, D))
    assert [(s.name, s.index) for s in sites] == [("0", 0), ("1.1", 1), ("2", -1)]


def test_no_inputs_for_a_plain_module() -> None:
    with pytest.raises(CaptureError, match="Sequential is not a Hugging Face model: give exa"):
        discover(nn.Sequential(MLP()))


def test_a_large_model_on_meta() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=32, vocab_size=128256)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    started = time.process_time()
    found = discover(model)
    assert len(found.sites) == 32
    assert found.capture.mode == "fake"
    assert time.process_time() - started < 20
