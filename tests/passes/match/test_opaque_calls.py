"""Custom functions and operators between the projections: kept with every argument they got."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify import find_mlps, moeify
from moeify.passes.match.elementwise import acts_elementwise
from moeify.passes.match.operations import OpaqueCall
from moeify.sites.discovery import discover

D, H = 8, 24
PLAN = {"layers": [{"select": "all", "experts": 3}]}


class Leaky(torch.autograd.Function):
    """A leaky relu of any slope, with a true gradient."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, slope: float) -> Tensor:
        ctx.save_for_backward(h)
        ctx.slope = slope
        return torch.where(h > 0, h, slope * h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.where(ctx.saved_tensors[0] > 0, grad, ctx.slope * grad), None


class Straight(torch.autograd.Function):
    """Relu forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.relu(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Moded(torch.autograd.Function):
    """Does something else in training; takes the flag, or the module that has it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, mode: Any) -> Tensor:
        training = mode if isinstance(mode, bool) else mode.training
        ctx.save_for_backward(h)
        return torch.relu(h) if not training else torch.relu(h - 0.1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * (ctx.saved_tensors[0] > 0), None


class MLP(nn.Module):
    def __init__(self, how: str, slope: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.how, self.slope = nn.Linear(D, H), nn.Linear(H, D), how, slope

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        match self.how:
            case "slope":
                h = Leaky.apply(h, self.slope)
            case "straight":
                h = Straight.apply(h)
            case "flag":
                h = Moded.apply(h, self.training)
            case "module":
                h = Moded.apply(h, self)
            case "operator":
                h = torch.ops.moeify_test.leaky(h, self.slope)
        return self.down(h)


@torch.library.custom_op("moeify_test::leaky", mutates_args=())
def leaky(h: Tensor, slope: float) -> Tensor:
    return torch.where(h > 0, h, slope * h)


@leaky.register_fake
def _(h: Tensor, slope: float) -> Tensor:
    return torch.empty_like(h)


def _setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.slope = inputs[1]


def _leaky_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.where(ctx.saved_tensors[0] > 0, grad, ctx.slope * grad), None


leaky.register_autograd(_leaky_backward, setup_context=_setup)


def same(dense: nn.Module, moe: nn.Module, x: Tensor) -> None:
    """Compare outputs and gradients on values that the example did not have."""
    for size in (1.0, 50.0):
        mine, its = (x * size).requires_grad_(), (x * size).requires_grad_()
        want, got = dense(mine), moe(its)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * size)
        want.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(its.grad, mine.grad, rtol=1e-4, atol=1e-4 * size)


@pytest.mark.parametrize("how", ["slope", "operator"])
def test_two_slopes_in_one_model(how: str) -> None:
    torch.manual_seed(0)
    slopes = (0.0, 0.5, 0.1)
    dense = nn.Sequential(nn.Linear(D, D), *(MLP(how, slope) for slope in slopes)).eval()
    moe = nn.Sequential(nn.Linear(D, D), *(MLP(how, slope) for slope in slopes)).eval()
    moe.load_state_dict(dense.state_dict())
    x = torch.randn(4, D)
    moeify(moe, PLAN, example_inputs=x)
    same(dense, moe, x)


def test_a_custom_gradient_stays() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(D, D), MLP("straight")).eval()
    moe = nn.Sequential(nn.Linear(D, D), MLP("straight")).eval()
    moe.load_state_dict(dense.state_dict())
    x = torch.randn(4, D)
    moeify(moe, PLAN, example_inputs=x)
    same(dense, moe, x)


def reason(how: str) -> str:
    found = discover(nn.Sequential(nn.Linear(D, D), MLP(how)), torch.randn(4, D))
    assert all(site.install == "refused" for site in found.sites)
    reasons = [site.reason for site in found.sites] + [n.reason for n in found.near_misses]
    assert len(reasons) == 1
    return reasons[0]


def test_an_argument_that_differs_in_training() -> None:
    text = reason("flag")
    assert "something else in training mode: a constant of `Moded` is True instead of False" in text


def test_an_argument_whose_state_may_change() -> None:
    assert "takes an argument of type MLP, which may change" in reason("module")


# -- elementwise, forwards and backwards, in all magnitudes


class ClipsNorm(torch.autograd.Function):
    """Elementwise until a row is long."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        norm = h.norm(dim=-1, keepdim=True)
        return torch.where(norm > 1e4, torch.relu(h) / norm, torch.relu(h))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class MixesGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return torch.relu(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad / grad.abs().max().clamp(min=1e6)


class Masked(torch.autograd.Function):
    """The relu of torch's own tutorial."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        grad[ctx.saved_tensors[0] < 0] = 0
        return grad


@torch.library.custom_op("moeify_test::clipped", mutates_args=())
def clipped(h: Tensor) -> Tensor:
    norm = h.norm()
    return torch.relu(h) if norm < 100 else torch.relu(h) / norm


def test_what_acts_on_each_value_alone() -> None:
    for function in (Leaky, Moded):
        assert acts_elementwise(OpaqueCall(function, "apply", (False,)))
    for function in (Straight, Masked):
        assert acts_elementwise(OpaqueCall(function, "apply", ()))
    for function in (ClipsNorm, MixesGradients):
        assert not acts_elementwise(OpaqueCall(function, "apply", ()))
    assert acts_elementwise(OpaqueCall(torch.ops.moeify_test.leaky, "", (0.5,)))
    assert not acts_elementwise(OpaqueCall(torch.ops.moeify_test.clipped, "", ()))


def test_calls_are_printed_with_their_arguments() -> None:
    assert OpaqueCall(Leaky, "apply", (0.5,)).extra_repr() == "Leaky, 0.5"


def test_two_functions_of_one_name() -> None:
    """What one conversion learned is not used for the next."""

    def make(slope: float) -> type[torch.autograd.Function]:
        class Act(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, h: Tensor) -> Tensor:
                ctx.save_for_backward(h)
                return F.leaky_relu(h, slope)

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                return grad * torch.where(ctx.saved_tensors[0] > 0, 1.0, slope)

        return Act

    class Held(MLP):
        def __init__(self, function: Any) -> None:
            super().__init__("held")
            self.function = function

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.function.apply(self.up(x)))

    x = torch.randn(4, D)
    for slope in (0.0, 0.3):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(D, D), Held(make(slope))).eval()
        torch.manual_seed(0)
        moe = nn.Sequential(nn.Linear(D, D), Held(make(slope))).eval()
        assert find_mlps(moe, x)[0].activation == "custom"
        moeify(moe, PLAN, example_inputs=x)
        same(dense, moe, x)
