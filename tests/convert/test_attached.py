"""What hangs on the parameters and modules of an MLP is carried over, or refused by name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moeify as mf
from moeify.errors import MoeifyError, UnsupportedModuleError
from moeify.passes.match.attached import attributes_of
from tests.convert.models import ALL4, Cifar, assert_same, state

ADD = {"layers": [{"select": "all", "experts": 4, "residual": "add"}]}
COEFFICIENT = {"layers": [{"select": "all", "experts": 4, "residual": "coefficient"}]}


class Gated(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.drop(nn.functional.silu(self.gate(x)) * self.up(x)))


def x() -> Tensor:
    return torch.linspace(-1, 1, 32).view(4, 8)


def convert(model: nn.Module, plan: Any = ALL4, inputs: Tensor | None = None) -> nn.Module:
    return mf.moeify(model, plan, example_inputs=x() if inputs is None else inputs, verify=False)


@pytest.mark.parametrize("plan", [ALL4, ADD, COEFFICIENT], ids=["plain", "add", "coefficient"])
def test_attributes_go_to_the_experts_and_back(plan):
    model = nn.Sequential(Gated(), nn.LayerNorm(8))
    groups = {"lr": 0.5}
    for weight in (model[0].gate.weight, model[0].up.weight):
        weight.no_weight_decay = True
        weight.optim = groups
    model[0].down.bias.sequence_parallel = False
    convert(model, plan)
    parts = dict(model[0].named_parameters())
    has = {name: attributes_of(parameter) for name, parameter in parts.items()}
    assert has["experts.gate_up_proj"] == {"no_weight_decay": True, "optim": groups}
    assert has["experts.down_bias"] == {"sequence_parallel": False}
    assert has["experts.down_proj"] == has["router.weight"] == {}
    if plan is not ALL4:
        assert has["mlp.gate.weight"] == has["experts.gate_up_proj"]
        assert has["mlp.down.bias"] == has["experts.down_bias"]
    mf.demoeify(model)
    assert attributes_of(model[0].gate.weight) == attributes_of(model[0].up.weight)
    assert model[0].up.weight.optim == groups
    assert model[0].down.bias.sequence_parallel is False
    assert attributes_of(model[0].down.weight) == {}


class Written(nn.Module):
    """Its MLP is written out between other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_attributes_across_modules_and_pickled():
    model = Written()
    model.up.weight.no_weight_decay = model.norm.weight.no_weight_decay = True
    convert(model)
    for each in (model, pickle.loads(pickle.dumps(model))):  # a deepcopy drops them, in torch
        assert each.down.experts.up_proj.no_weight_decay is True
        assert each.norm.weight.no_weight_decay is True
        assert attributes_of(each.down.experts.down_proj) == {}
    assert mf.demoeify(model).up.weight.no_weight_decay is True


def test_attributes_that_differ_are_refused():
    model = nn.Sequential(Gated(), nn.LayerNorm(8))
    model[0].gate.weight.no_weight_decay = True
    before = state(model)
    with pytest.raises(MoeifyError, match=r"'no_weight_decay' differs between 0.gate.weight and"):
        convert(model)
    assert_same(before, state(model))
    model[0].up.weight.no_weight_decay = False
    with pytest.raises(MoeifyError, match="differs"):
        convert(model)
    model[0].up.weight.no_weight_decay = True
    convert(model, COEFFICIENT)
    del model[0].experts.gate_up_proj.no_weight_decay
    before = state(model)
    with pytest.raises(UnsupportedModuleError, match="'no_weight_decay' differs"):
        mf.demoeify(model)
    assert_same(before, state(model))


def gradient_hook(block: Any) -> Any:
    return block.experts.down_proj.register_hook(lambda grad: grad)


def accumulate_hook(block: Any) -> Any:
    return block.router.weight.register_post_accumulate_grad_hook(lambda parameter: None)


def forward_hook(block: Any) -> Any:
    return block.router.register_forward_hook(lambda *args: None)


def state_hook(block: Any) -> Any:
    return block.register_state_dict_post_hook(lambda *args: None)


@pytest.mark.parametrize(
    ("hang", "match"),
    [
        (gradient_hook, r"0: 0\.experts\.down_proj has a hook on its gradient"),
        (accumulate_hook, r"0: 0\.router\.weight has a hook on its gradient"),
        (forward_hook, r"0\.router: its hooks would be lost"),
        (state_hook, r"0: its hooks would be lost"),
    ],
)
def test_hooks_on_a_block_are_not_lost_on_the_way_back(hang: Callable[[Any], Any], match: str):
    model = convert(nn.Sequential(Gated(), nn.LayerNorm(8)))
    before = state(model)
    handle = hang(model[0])
    with pytest.raises(UnsupportedModuleError, match=match):
        mf.demoeify(model)
    handle.remove()
    assert_same(before, state(model))
    calls: list[int] = []
    model[0].register_forward_hook(lambda *args: calls.append(1))  # on the block: it goes along
    mf.demoeify(model)(x())
    assert calls == [1]


def test_a_mode_of_its_own_is_not_lost():
    model = nn.Sequential(Gated(0.5), nn.LayerNorm(8))
    model[0].drop.eval()
    with pytest.raises(MoeifyError, match=r"0\.drop is in evaluation mode"):
        convert(model)
    model.eval()
    convert(model)
    model[0].experts.train()
    with pytest.raises(UnsupportedModuleError, match=r"0\.experts: it is in training mode"):
        mf.demoeify(model)
    model.eval()
    assert not any(module.training for module in mf.demoeify(model).modules())


def test_hooks_of_a_layer_after_linear_experts_stay():
    plan = {"layers": [{"select": {"name": "fc3"}, "experts": 4, "expert": "linear"}]}
    model, calls = Cifar(), []
    model.fc3.register_forward_hook(lambda *args: calls.append(1))
    convert(model, plan, torch.randn(4, 48))
    model(torch.randn(4, 48))
    mf.demoeify(model)(torch.randn(4, 48))
    assert calls[-2:] == [1, 1]
    assert type(model.fc3) is nn.Linear
