"""What lies between the projections, rewritten over rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moeify import moeify
from moeify.capture.capture import capture
from moeify.passes.infra.printer import print_graph
from moeify.passes.match.elementwise import acts_elementwise
from moeify.passes.match.inner_program import InnerProgram
from moeify.passes.match.mlp_regions import Region, find_regions
from moeify.passes.match.norms import only_normalises

D, H = 8, 24


class Body(nn.Module):
    def __init__(self, middle: Callable[..., Tensor], width: int = H, **modules: nn.Module) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(D, width), nn.Linear(H, D), middle
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x), *list(self.children())[2:]))


def region_of(model: nn.Module, shape: tuple[int, ...] = (2, 5), training: bool = False) -> Region:
    recorded = capture(model, torch.randn(*shape, D), training=training)
    regions, missed = find_regions(recorded.graph_module.graph, training=training)
    assert len(regions) == 1, missed
    return regions[0]


def program_of(middle: Callable[..., Tensor], width: int = H, **modules: nn.Module) -> InnerProgram:
    return region_of(Body(middle, width, **modules)).program


@pytest.mark.parametrize("swap", [False, True])
def test_halves(swap: bool) -> None:
    def middle(h: Tensor) -> Tensor:
        a, b = h.chunk(2, -1)
        return a * F.silu(b) if swap else F.silu(a) * b

    program = program_of(middle, 2 * H)
    assert (program.activation, program.gated, program.swap) == ("silu", True, swap)
    assert program.narrow == 2


def test_parameters_become_arguments() -> None:
    norm = nn.LayerNorm(H)
    program = program_of(lambda h, norm: norm(F.gelu(h)), norm=norm)
    assert program.params == ("norm.weight", "norm.bias")
    assert program.module is not None
    h = torch.randn(7, H)
    torch.testing.assert_close(program.module(h, norm.weight, norm.bias), norm(F.gelu(h)))


def test_learnable_beta() -> None:
    class Swish(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.beta = nn.Parameter(torch.tensor(1.3))

        def forward(self, h: Tensor) -> Tensor:
            return h * torch.sigmoid(self.beta * h)

    model = nn.Sequential(nn.Linear(D, D), Body(lambda h, act: act(h), act=Swish()))
    assert region_of(model).program.params == ("1.act.beta",)
    plan = {"layers": [{"select": "all", "experts": 3, "residual": "coefficient"}]}
    moeify(model, plan, example_inputs=torch.randn(2, 5, D))


# -- functions of the user's own


class Clipped(torch.autograd.Function):
    """Elementwise, with a gradient that is not its forward's."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.sign()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 0.5


class TrueSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return h * torch.sigmoid(h)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        s = torch.sigmoid(ctx.saved_tensors[0])
        return grad * s * (1 + ctx.saved_tensors[0] * (1 - s))


class Sorted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h.sort(-1).values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def test_custom_functions_keep_their_gradient() -> None:
    program = program_of(Clipped.apply)
    assert program.activation == "custom"
    assert program.module is not None
    h = torch.randn(3, H, requires_grad=True)
    program.module(h).sum().backward()
    assert torch.equal(h.grad, torch.full((3, H), 0.5))
    model = nn.Sequential(nn.Linear(D, D), Body(Clipped.apply))
    plan = {"layers": [{"select": "all", "experts": 3, "residual": "coefficient"}]}
    moeify(model, plan, example_inputs=torch.randn(2, 5, D))


def test_custom_functions_are_named_if_their_gradient_is_true() -> None:
    assert program_of(TrueSilu.apply).activation == "silu"

    def middle(h: Tensor) -> Tensor:
        a, b = h.chunk(2, -1)
        return TrueSilu.apply(a) * b

    gated = program_of(middle, 2 * H)
    assert (gated.activation, gated.gated) == ("silu", True)


class ScaledSilu(TrueSilu):
    """With a gradient that is off by a little."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        s = torch.sigmoid(ctx.saved_tensors[0])
        return grad * s * (1 + ctx.saved_tensors[0] * (1 - s)) * 1.00001


class ClampedSilu(TrueSilu):
    """With a gradient that is clamped where it is rarely seen."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        s = torch.sigmoid(ctx.saved_tensors[0])
        return (grad * s * (1 + ctx.saved_tensors[0] * (1 - s))).clamp(max=1e4)


def test_custom_functions_with_another_gradient_are_kept() -> None:
    assert program_of(ScaledSilu.apply).activation == "custom"
    assert program_of(ClampedSilu.apply).activation == "custom"


def test_the_gelu_of_bloom() -> None:
    module = pytest.importorskip("transformers.models.bloom.modeling_bloom")
    assert program_of(module.GeLUFunction.apply).activation == "gelu_tanh"


def test_custom_functions_that_mix_are_refused() -> None:
    recorded = capture(Body(Sorted.apply), torch.randn(2, D))
    regions, missed = find_regions(recorded.graph_module.graph)
    assert not regions
    assert missed[0].reason == "`Sorted.apply` is not elementwise"


@torch.library.custom_op("moeify_test::shifted_relu", mutates_args=())
def shifted_relu(h: Tensor) -> Tensor:
    return torch.relu(h - 0.5)


@shifted_relu.register_fake
def _(h: Tensor) -> Tensor:
    return torch.empty_like(h)


def test_custom_operators() -> None:
    program = program_of(shifted_relu)
    assert program.activation == "custom"
    assert program.module is not None
    h = torch.randn(3, H)
    assert torch.equal(program.module(h), torch.relu(h - 0.5))


# -- dropout


def test_the_last_dropout_is_lifted() -> None:
    model = Body(lambda h, act: act(h), act=nn.Sequential(nn.ReLU(), nn.Dropout(0.3)))
    assert region_of(model).program.dropout == 0.3
    assert region_of(model, training=True).program.dropout == 0.3


def test_other_dropouts_stay_where_they_are() -> None:
    act = nn.Sequential(nn.Dropout(0.2), nn.ReLU(), nn.Dropout(0.3))
    program = program_of(lambda h, act: act(h), act=act)
    assert (program.activation, program.dropout) == ("custom", 0.0)
    assert program.module is not None
    assert [m.p for m in program.module.children()] == [0.2, 0.3]


# -- numbers


def traced(function: Callable[[Tensor], Tensor]) -> fx.GraphModule:
    class Root(nn.Module):
        def forward(self, hidden: Tensor) -> Tensor:
            return function(hidden)

    return fx.symbolic_trace(Root())


def test_what_is_a_norm() -> None:
    assert only_normalises(traced(lambda h: F.layer_norm(h, (6,))))
    assert only_normalises(traced(lambda h: h / h.norm(dim=-1, keepdim=True)))
    assert only_normalises(traced(lambda h: h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1)))
    assert not only_normalises(traced(F.relu))
    assert not only_normalises(traced(lambda h: F.layer_norm(F.relu(h), (6,))))
    assert not only_normalises(traced(torch.tanh))
    assert not only_normalises(traced(torch.sign))
    assert not only_normalises(traced(lambda h: h * h / h.mean(-1, keepdim=True)))


def test_what_is_elementwise() -> None:
    assert acts_elementwise(nn.GELU())
    assert not acts_elementwise(nn.Softmax(-1))
    assert not acts_elementwise(nn.Linear(4, 4))


def test_golden(golden: Callable[[str, str], None]) -> None:
    def middle(h: Tensor, norm: nn.Module) -> Tensor:
        a, b = h.view(-1, 2 * H).split(H, dim=-1)
        return norm(F.silu(a) * b.tanh_()).to(torch.float32).view(*h.shape[:-1], H)

    program = program_of(middle, 2 * H, norm=nn.LayerNorm(H))
    assert program.module is not None
    golden(print_graph(program.module), "inner_program.txt")
