"""Gradients by dense weights, computed from the experts', and the faults that they show."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import moeify as mf
from moeify.convert import install, verify
from moeify.convert.dense_gradients import untouched
from moeify.convert.verify import Difference, sketch, snapshot
from moeify.passes.infra.base import PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of
from tests.convert.models import ALL4, Mlp, ScaleHidden
from tests.zoo_models import ZOO


@pytest.fixture
def differences(monkeypatch):
    """Every difference that a conversion measures."""
    seen: list[Difference] = []
    real = install.compare

    def compare(*args: Any) -> Difference:
        seen.append(real(*args))
        return seen[-1]

    monkeypatch.setattr(install, "compare", compare)
    return seen


class Gated(nn.Module):
    """The linear half comes first, and only one projection has a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = nn.Linear(8, 12), nn.Linear(8, 12, bias=False)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * nn.functional.silu(self.gate(x)))


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 24, bias=False), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.up(x).chunk(2, -1)
        return self.down(first * torch.sigmoid(second))


class InnerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(nn.functional.gelu(self.up(x))))


INITS = {
    "copy": ({"experts": "copy"}, {}),
    "granular": ({"experts": "granular", "granularity": 2}, {"top_k": 4}),
    "split": ({"experts": "split", "clusters": "weights"}, {"top_k": 4}),
}


CASES = [
    (kind, init, residual)
    for kind in (Mlp, Gated, Halves, InnerNorm)
    for init in (INITS if kind is not InnerNorm else ["copy"])  # a norm cannot be cut in slices
    for residual in (["none"] if init == "split" else ["none", "coefficient", "add", "sigmoid"])
]


@pytest.mark.parametrize(("kind", "init", "residual"), CASES)
def test_every_dense_weight_gets_its_gradient_from_the_experts(kind, init, residual, differences):
    start, layer = INITS[init]
    plan = {
        "layers": [{"select": "all", "experts": 4, "top_k": 2, "residual": residual, **layer}],
        "init": start,
    }
    model = nn.Sequential(kind(), nn.LayerNorm(8), kind()).double()
    mf.moeify(model, plan, example_inputs=torch.randn(3, 5, 8).double())
    (found,) = differences
    assert found.promised
    assert set(found.layers) == {"0", "2"}
    assert found.outputs < 1e-13
    assert max(found.gradients, *found.layers.values()) < 1e-13


@pytest.mark.parametrize("name", ["gpt2", "bert", "phi3", "convnext"])
def test_models_of_the_zoo(name, differences):
    mf.moeify(ZOO[name].build().double(), {"layers": [{"select": "all", "experts": 3}]})
    (found,) = differences
    assert found.layers
    assert max(found.gradients, *found.layers.values()) < 1e-12


@dataclass(frozen=True)
class HalveHidden(ScaleHidden):
    """Leaves all outputs right, and halves the gradient of what is before the experts' output."""

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        for _, block in blocks_of(gm):
            node = next(n for n in block.graph.nodes if n.target == "experts")
            with block.graph.inserting_after(node):
                fixed = block.graph.call_method("detach", (node,))
            with block.graph.inserting_after(fixed):
                half = block.graph.call_function(torch.lerp, (node, fixed, 0.5))
            own = (fixed, half)
            node.replace_all_uses_with(half, delete_user_cb=lambda u, own=own: u not in own)
            block.recompile()
        return PassResult(gm, True)


@pytest.mark.parametrize("frozen", ["all", "rest", "none"])
def test_wrong_gradients_are_found_whatever_trains(frozen):
    model = nn.Sequential(nn.Linear(8, 8), Mlp())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen == "none" or (frozen == "rest" and name.startswith("1.")))
    trains = [p.requires_grad for p in model.parameters()]
    with pytest.raises(mf.VerificationError, match="gradients"):
        mf.moeify(model, ALL4, example_inputs=torch.randn(9, 8), passes=[HalveHidden(1.0)])
    assert isinstance(model[1], Mlp)
    assert [p.requires_grad for p in model.parameters()] == trains
    assert all(p.grad is None for p in model.parameters())


def test_a_small_layer_with_a_wrong_gradient_is_not_hidden_by_a_large_one(monkeypatch):
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = Mlp(), Mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.large(x) + 1e-3 * self.small(x)

    real = install.compare

    def wrong(dense: Any, moe: Any, layers: Any) -> Any:
        moe.gradients["small.up.weight"].mul_(1.01)
        return real(dense, moe, layers)

    monkeypatch.setattr(install, "compare", wrong)
    with pytest.raises(mf.VerificationError, match="gradients of small differ"):
        mf.moeify(Small(), ALL4, example_inputs=torch.randn(64, 8))


def test_hooks_and_flags_are_taken_back():
    calls: list[int] = []
    model = nn.Sequential(nn.Linear(8, 8), Mlp())
    model[0].weight.register_hook(lambda grad: calls.append(1))
    mf.moeify(model, ALL4, example_inputs=torch.randn(9, 8))
    seen = len(calls)
    assert not any(p._backward_hooks for n, p in model.named_parameters() if n != "0.weight")
    model(torch.randn(9, 8)).sum().backward()
    assert len(calls) == seen + 1
    assert all(p.grad is not None for p in model[1].experts.parameters())


def test_no_gradient_is_kept_while_the_others_are_computed(monkeypatch):
    """What a proof needs does not grow with the number of layers."""
    model = nn.Sequential(
        *(nn.Linear(64, 300) if i % 2 == 0 else nn.Linear(300, 64) for i in range(8))
    )
    alive: list[weakref.ref[Tensor]] = []
    most = 0
    real = verify._Gradients._add

    def add(self: Any, source: Any, grad: Tensor) -> None:
        nonlocal most
        alive.append(weakref.ref(grad.untyped_storage()))
        real(self, source, grad)
        most = max(most, sum(r() is not None for r in alive))

    monkeypatch.setattr(verify._Gradients, "_add", add)
    found = snapshot(model, torch.randn(2, 64), untouched(model, dict(model.named_parameters())))
    assert len(found.gradients) == 16
    assert most <= 4


def test_a_sketch_keeps_norms_and_is_linear():
    torch.manual_seed(0)
    a, b = torch.randn(700, 300), torch.outer(torch.randn(700), torch.randn(300))
    for tensor in (a, b, a.t()):
        assert sketch(tensor).numel() < tensor.numel() / 4
        assert 0.7 < float(sketch(tensor).norm() / tensor.norm()) < 1.4
    torch.testing.assert_close(sketch(a + b), sketch(a) + sketch(b))
    one = torch.zeros(700, 300)
    one[123, 45] = 1
    assert float(sketch(one).norm()) == pytest.approx(1)
    small = torch.randn(5, 5)
    assert torch.equal(sketch(small), small)
    for tensor in (a, small, a.double()):
        nil = verify._no_sketch(tensor)
        assert torch.equal(nil, sketch(torch.zeros_like(tensor)))
        assert nil.dtype == sketch(tensor).dtype
    assert sketch(small) is not small
