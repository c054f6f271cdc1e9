"""Attributes that an MLP read: a later change works as in the dense model, or is an error."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify import demoeify, moeify
from moeify.errors import UnsupportedModuleError

D, H = 8, 24
PLAN = {"layers": [{"select": "all", "experts": 3}]}


class Scaled(nn.Module):
    """An activation with a number that its `repr` does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = 0.3

    def forward(self, h: Tensor) -> Tensor:
        return F.leaky_relu(h, self.slope)


class MLP(nn.Module):
    unread: Any
    class_scale = 3.0

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.scale, self.flag, self.act, self.function = 2, True, Scaled(), F.silu
        self.unread = 1
        self.drop = nn.Dropout(0.0)

    def hidden(self, x: Tensor) -> Tensor:
        scale = self.scale
        h = self.act(self.up(x)) * scale * self.class_scale
        return self.drop(self.function(h) if self.flag else h)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.hidden(x))


class Inline(MLP):
    """The same within a layer that does more."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.eps = nn.LayerNorm(D), 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.hidden(self.norm(x) * self.eps))


CHANGES: dict[str, Any] = {
    "scale": 5,
    "flag": False,
    "act": nn.ReLU(),
    "function": F.gelu,
    "class_scale": 4.0,
}


def converted(kind: type[MLP]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), kind()), torch.randn(2, 5, D)
    moeify(model, PLAN, example_inputs=x)
    return model.eval(), x


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("how", ["itself", "deepcopy"])
def test_a_swapped_module_refuses_what_it_read(name: str, how: str) -> None:
    model, x = converted(MLP)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    want = model(x)
    with pytest.raises(UnsupportedModuleError, match=f"^1: `{name}` was read by the dense MLP"):
        setattr(model[1], name, CHANGES[name])
    assert torch.equal(model(x), want)
    model[1].unread = 7
    model[1].anything = 7
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("how", ["itself", "deepcopy", "pickle"])
def test_a_layer_around_notices_a_change(name: str, how: str) -> None:
    model, x = converted(Inline)
    if how == "deepcopy":
        model = copy.deepcopy(model)
    if how == "pickle":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        model = torch.load(file, weights_only=False)
    layer: Any = model[1]
    want, former = model(x), getattr(layer, name)
    setattr(layer, name, CHANGES[name])
    with pytest.raises(UnsupportedModuleError, match=f"^1: `{name}` was changed"):
        model(x)
    setattr(layer, name, former)
    torch.testing.assert_close(model(x), want, rtol=0, atol=0)
    layer.unread = 7  # not read, or read outside: free to change
    layer.eps = 1.5
    model(x)


def test_an_attribute_of_the_activation() -> None:
    model, x = converted(Inline)
    layer: Any = model[1]
    layer.act.slope = 0.4
    with pytest.raises(UnsupportedModuleError, match=r"^1.act: `slope` was changed"):
        model(x)
    layer.act.slope = 0.3
    layer.drop.p = 0.5
    with pytest.raises(UnsupportedModuleError, match=r"^1.drop: `p` was changed"):
        model(x)


def test_compiled_in_one_graph() -> None:
    model, x = converted(Inline)
    want = model(x)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), want)
    layer: Any = model[1]
    layer.scale = 5
    with pytest.raises(Exception, match="`scale` was changed"):
        compiled(x)


def test_changed_after_demoeify() -> None:
    for kind in (MLP, Inline):
        model, x = converted(kind)
        demoeify(model)
        layer: Any = model[1]
        layer.scale = 5
        model(x)


def test_classes_are_as_before() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, D), Inline()), torch.randn(2, 5, D)
    kinds = [type(module) for module in model.modules()]
    moeify(copy.deepcopy(model), PLAN, example_inputs=x)
    assert [type(module) for module in model.modules()] == kinds
