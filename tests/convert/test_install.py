"""The transaction of an installation: whatever step fails, the model is the dense one again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.convert.install import Installation
from moeify.errors import MoeifyError
from moeify.sites.record import ATTRIBUTE
from tests.zoo_models import ZOO

PLAN = {"layers": [{"select": "all", "experts": 2, "residual": "coefficient"}]}
STEPS = ("install", "slice_dense", "verify", "partition")


def facts(model: nn.Module) -> list[Any]:
    """What must be the same objects, attributes and hooks."""
    modules = [(path, id(m), sorted(m.__dict__), m.training) for path, m in model.named_modules()]
    tensors = [(n, id(p)) for n, p in model.named_parameters(remove_duplicate=False)]
    tables = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._load_state_dict_pre_hooks))
        for m in model.modules()
    ]
    return [modules, tensors, tables, [p.requires_grad for p in model.parameters()]]


def plain() -> tuple[nn.Module, torch.Tensor]:
    mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    return nn.Sequential(mlp, nn.LayerNorm(8)), torch.randn(4, 8)


def llama() -> tuple[nn.Module, None]:
    return ZOO["llama"].build(), None


def encoder() -> tuple[nn.Module, torch.Tensor]:
    """Its fused kernel is switched off, and its MLPs have no module of their own."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 3, 8)


@pytest.mark.parametrize("error", [MoeifyError, KeyboardInterrupt])
@pytest.mark.parametrize("step", [*STEPS, "_record"])
@pytest.mark.parametrize("make", [plain, llama, encoder])
def test_a_step_that_fails_leaves_the_dense_model(
    make: Callable[[], tuple[nn.Module, Any]],
    step: str,
    error: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, inputs = make()
    before, values = facts(model), {n: v.clone() for n, v in model.state_dict().items()}
    taken = getattr(Installation, step)

    def fails(self: Installation, *args: Any) -> None:
        taken(self, *args)
        assert any("experts" in name for name, _ in model.named_parameters())
        raise error(f"after {step}")

    with monkeypatch.context() as patch:
        patch.setattr(Installation, step, fails)
        with pytest.raises(error, match=f"after {step}"):
            mf.moeify(model, PLAN, example_inputs=inputs)
    assert ATTRIBUTE not in model.__dict__
    assert facts(model) == before
    assert all(torch.equal(v, values[n]) for n, v in model.state_dict().items())
    mf.moeify(model, PLAN, example_inputs=inputs)
    assert ATTRIBUTE in model.__dict__


def test_steps_run_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = plain()
    seen: list[str] = []
    for step in (*STEPS, "commit"):
        taken = getattr(Installation, step)

        def noted(self: Installation, *args: Any, _step: str = step, _taken: Any = taken) -> None:
            seen.append(_step)
            _taken(self, *args)

        monkeypatch.setattr(Installation, step, noted)
    mf.moeify(model, PLAN, example_inputs=inputs)
    assert seen == [*STEPS, "commit"]
