"""Derivatives of converted models beyond a gradient equal those of the dense model."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradgradcheck
from torch.func import hessian, jacfwd, jvp
from torch.utils.checkpoint import checkpoint

from moeify import moeify

WIDTH, HIDDEN = 6, 10


class Module(nn.Module):
    """A gated MLP that is a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    """A residual layer around it."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.norm = Module(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Written(nn.Module):
    """An MLP that is written in its layer, with something in between."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Inner(nn.Module):
    """One with an activation of its own, which stays a program."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.scale = nn.Parameter(torch.rand(HIDDEN) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sin(self.up(x)) * self.scale)


MODELS = (Layer, Written, Inner)


def pair(kind: type[nn.Module], dtype: torch.dtype, **layer: Any) -> tuple[nn.Module, nn.Module]:
    """Return a dense model and a converted one with copies of its MLP as experts."""
    torch.manual_seed(0)
    dense = kind().to(dtype)
    plan = {
        "layers": [{"select": "all", "experts": 3, "top_k": layer.pop("top_k", 2)} | layer],
        "router": {"capacity_factor": None},
    }
    x = torch.randn(2, 3, WIDTH, dtype=dtype)
    return dense, moeify(copy.deepcopy(dense), plan, example_inputs=x)


def derivatives(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return a tangent, twice, a gradient, and the gradient of its square."""
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), leaf)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.sin()))).tangent
    return tangent, jvp(model, (x,), (x.sin(),))[1], first.detach(), second


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)],
    ids=str,
)
@pytest.mark.thin(2)
def test_of_copies_they_are_those_of_the_dense_model(kind, dtype, tolerance, top_k, training):
    dense, moe = pair(kind, torch.float32 if dtype == torch.bfloat16 else dtype, top_k=top_k)
    dense.to(dtype).train(training)
    moe.to(dtype).train(training)
    x = torch.randn(4, 3, WIDTH, dtype=dtype)
    for ours, theirs in zip(derivatives(moe, x), derivatives(dense, x), strict=True):
        error = (ours - theirs).norm() / theirs.norm()
        assert error < tolerance


@pytest.mark.parametrize("kernel", ["reference", "cpu"])
def test_with_every_kernel_of_a_plan(kernel):
    dense, moe = pair(Layer, torch.float32, kernel=kernel)
    x = torch.randn(4, WIDTH)
    torch.testing.assert_close(derivatives(moe, x), derivatives(dense, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_converted_model_passes_gradgradcheck(kind):
    dense, moe = pair(kind, torch.float64)
    x = torch.randn(2, WIDTH, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(moe.eval(), (x,), check_fwd_over_rev=True)
    y = x.detach()[:1]
    for transform in (jacfwd, lambda f: hessian(lambda z: f(z).square().sum())):
        torch.testing.assert_close(transform(moe)(y), transform(dense)(y), rtol=1e-9, atol=1e-9)


def test_a_gradient_penalty_trains_the_experts_as_the_mlp():
    dense, moe = pair(Layer, torch.float64)
    x = torch.randn(5, WIDTH, dtype=torch.float64)

    def penalty(model: nn.Module, recompute: bool) -> Tensor:
        leaf = x.clone().requires_grad_()
        out = checkpoint(model, leaf, use_reentrant=False) if recompute else model(leaf)
        (first,) = torch.autograd.grad(out.square().sum(), leaf, create_graph=True)
        return first.square().sum()

    penalty(dense.train(), False).backward()
    want = torch.cat([dense.mlp.gate.weight.grad, dense.mlp.up.weight.grad])
    for recompute in (False, True):
        moe.train().zero_grad()
        penalty(moe, recompute).backward()
        grads = {n.rpartition(".")[2]: p.grad for n, p in moe.named_parameters()}
        torch.testing.assert_close(grads["gate_up_proj"].sum(0), want)
        torch.testing.assert_close(grads["down_proj"].sum(0), dense.mlp.down.weight.grad)
        torch.testing.assert_close(grads["down_bias"].sum(0), dense.mlp.down.bias.grad)


def test_compiled_models_refuse_a_second_derivative():
    _, moe = pair(Module, torch.float32)
    x = torch.randn(4, WIDTH, requires_grad=True)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    (first,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(first.square().sum(), x)
