"""A native class that trains otherwise than moeify says so in a warning, with the cure."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import moeify as mf
from moeify.formats.choose import choose_format
from moeify.formats.model_card import model_card
from moeify.storage.tensor_source import LiveTensors
from tests.zoo_models import ZOO, ids

CAUSAL = transformers.AutoModelForCausalLM
SAME = {"combine": "normalized", "capacity_factor": None, "aux_loss": 0.0}


def converted(router: dict[str, Any], top_k: int = 2) -> Any:
    """A model whose experts and routers differ."""
    torch.manual_seed(0)
    plan = {"layers": [{"select": "all", "experts": 4, "top_k": top_k}], "router": router}
    model = mf.moeify(ZOO["llama"].build(), plan, verify=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mlp." in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def warning_of(router: dict[str, Any], top_k: int = 2) -> str:
    model = converted(router, top_k)
    return "\n".join(choose_format(model, LiveTensors(model)).warnings)


def router_gradient(model: Any) -> Tensor:
    """The gradient of the first router for a loss of the logits alone, in training mode."""
    model.train()
    model.zero_grad()
    model(input_ids=ids()).logits.square().sum().backward()
    names = ("layers.0.mlp.router.weight", "layers.0.mlp.gate.weight")
    found = [p.grad for name, p in model.named_parameters() if name.endswith(names)]
    assert len(found) == 1
    return found[0]


@pytest.mark.parametrize(
    ("router", "top_k", "same"),
    [
        ({}, 2, True),
        ({"combine": "probability"}, 2, True),
        ({"combine": "straight_through"}, 1, False),
        ({"combine": "normalized"}, 1, True),  # here too the weight is constant
    ],
)
def test_the_warning_comes_where_the_routers_gradient_differs(router, top_k, same, tmp_path):
    model = converted(SAME | router, top_k)
    model.save_pretrained(tmp_path, export="native")
    ours, theirs = router_gradient(model), router_gradient(CAUSAL.from_pretrained(tmp_path))
    text = warning_of(SAME | router, top_k)
    slack = 1e-6 + 1e-4 * float(ours.abs().max())
    assert torch.allclose(ours, theirs, rtol=1e-3, atol=slack) is same
    assert (text == "") is same
    if top_k == 1:
        assert theirs.abs().max() < 1e-6
    if top_k == 1 and not same:
        assert ours.abs().max() > 1e-3
        assert "its routers never learn from the loss" in text


@pytest.mark.parametrize(
    ("router", "text"),
    [
        ({"aux_loss": 0.01}, "off until output_router_logits=True, and is one over all layers"),
        ({"aux_loss": 0.01}, "2 times as large"),
        ({"aux_loss": 0.01, "balance": "first"}, "over all choices"),
        ({"z_loss": 0.1}, "it has no z-loss"),
        ({"capacity_factor": 1.25}, "it drops no tokens"),
        ({"noise": "gumbel"}, "it adds no noise"),
        ({"noise": "jitter"}, "it adds no noise"),
        ({"score": "sigmoid", "bias_update": 0.01}, "nothing moves its selection bias"),
        ({"score": "sigmoid", "aux_loss": 0.01}, "it has no balance loss"),
    ],
)
def test_only_what_matters_is_told(router, text):
    found = warning_of(SAME | router)
    assert text in found
    assert found.endswith('To train it further, export it as "custom"')
    assert found.count(";") == 0  # one difference


def test_it_is_logged_and_in_the_card(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, logger="moeify")
    model = converted({}, top_k=1)
    model.save_pretrained(tmp_path / "auto")
    (record,) = [r for r in caplog.records if "trains otherwise" in r.message]
    assert record.message.startswith(f"{tmp_path / 'auto'}: a MixtralForCausalLM trains otherwise")
    caplog.clear()
    model.save_pretrained(tmp_path / "custom", export="custom")
    converted(SAME).save_pretrained(tmp_path / "same")
    assert not caplog.records
    warnings = choose_format(model, LiveTensors(model)).warnings
    card = model_card(
        kind="native",
        plan={},
        layers=[],
        source=tmp_path,
        sha256={},
        total=1,
        active=1,
        auto="AutoModelForCausalLM",
        warnings=warnings,
    ).decode()
    assert f"## Before you train it\n\n```text\n{warnings[0]}\n```" in card
