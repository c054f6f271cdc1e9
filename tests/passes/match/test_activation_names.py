"""Which programs get the name of an activation: those with its operations, and no others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify import find_mlps, moeify
from moeify.capture.capture import capture
from moeify.passes.match.inner_program import InnerProgram
from moeify.passes.match.mlp_regions import find_regions

D, H = 8, 24
PLAN = {"layers": [{"select": "all", "experts": 3}]}
Middle = Callable[[Tensor], Tensor]


class Body(nn.Module):
    def __init__(self, middle: Middle, width: int = H) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(D, width), nn.Linear(H, D), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x)))


def program_of(middle: Middle, width: int = H, dtype: torch.dtype = torch.float32) -> InnerProgram:
    recorded = capture(Body(middle, width).to(dtype), torch.randn(2, 5, D, dtype=dtype))
    regions, missed = find_regions(recorded.graph_module.graph)
    assert len(regions) == 1, missed
    return regions[0].program


def halves(function: Callable[[Tensor, Tensor], Tensor]) -> Middle:
    return lambda h: function(*h.chunk(2, -1))


def tanh_part(h: Tensor) -> Tensor:
    return torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0)))


NAMED: list[tuple[str, Middle]] = [
    ("gelu", lambda h: F.gelu(h)),
    ("gelu", lambda h: 0.5 * h * (1 + torch.erf(h / 2**0.5))),
    ("gelu", lambda h: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0)))),
    ("gelu", lambda h: h * (torch.erf(h * 0.70710678) + 1) / 2),
    ("gelu", lambda h: h.mul(0.5).mul_(torch.erf(h.div(math.sqrt(2))).add_(1))),
    ("gelu", lambda h: F.gelu(h.float()).to(h.dtype)),
    ("gelu_tanh", lambda h: F.gelu(h, approximate="tanh")),
    ("gelu_tanh", lambda h: 0.5 * h * (1.0 + tanh_part(h))),
    ("gelu_tanh", lambda h: 0.5 * h * (1 + torch.tanh(h * 0.7978845608 * (1 + 0.044715 * h * h)))),
    ("gelu_tanh", lambda h: 0.5 * h * (1 + torch.tanh(0.79788456 * (h + 0.044715 * h**3)))),
    ("gelu_tanh", lambda h: h * torch.sigmoid(1.5957691216 * (h + 0.044715 * h * h * h))),
    ("quick_gelu", lambda h: h * torch.sigmoid(1.702 * h)),
    ("silu", lambda h: h * torch.sigmoid(h)),
    ("silu", lambda h: torch.sigmoid(h).mul_(h)),
    ("silu", lambda h: h.div(1 + torch.exp(-h))),
    ("silu", lambda h: h.mul(torch.reciprocal(1 + torch.exp(-h)))),
    ("silu", lambda h: F.silu(h).clamp(max=float("inf"))),
    ("relu", lambda h: F.relu(h, True)),
    ("relu", torch.relu),
    ("relu2", lambda h: torch.square(torch.relu(h))),
    ("relu2", lambda h: F.relu(h) ** 2),
    ("relu2", lambda h: h * F.relu(h)),
    ("relu2", lambda h: h.clamp(min=0).pow(2)),
    ("relu6", F.relu6),
    ("leaky_relu", F.leaky_relu),
    ("elu", F.elu),
    ("mish", F.mish),
    ("softplus", F.softplus),
    ("hardswish", F.hardswish),
    ("tanh", torch.tanh),
    ("sigmoid", torch.sigmoid),
]


@pytest.mark.parametrize(("name", "middle"), NAMED)
def test_named_by_their_operations(name: str, middle: Middle) -> None:
    program = program_of(middle)
    assert (program.activation, program.module, program.narrow) == (name, None, 1)


# Each of these is equal to a canonical activation, or nearly so, on ordinary values.
KEPT: dict[str, Middle] = {
    "clamped silu": lambda h: F.silu(h).clamp(max=16),
    "clamped before silu": lambda h: F.silu(h.clamp(max=16)),
    "clamped gelu": lambda h: torch.clip(F.gelu(h), -10, 10),
    "clamped relu": lambda h: F.relu(h).clamp(max=65504),
    "threshold": lambda h: F.threshold(h, 0, -1e-7),
    "hardtanh": lambda h: F.hardtanh(h, 0.0, 20.0),
    "minimum": lambda h: torch.minimum(F.gelu(h), torch.full_like(h, 30.0)),
    "where": lambda h: torch.where(h > 20, torch.full_like(h, 20.0), F.silu(h)),
    "saturating": lambda h: 1000 * torch.tanh(F.gelu(h) / 1000),
    "relu by clamp, whose gradient at 0 is 1": lambda h: h.clamp(min=0),
    "relu6 by clip": lambda h: torch.clip(h, 0, 6),
    "relu by where, which hides NaN": lambda h: torch.where(h > 0, h, 0.0),
    "nan_to_num": lambda h: F.gelu(torch.nan_to_num(h)),
    "softplus without its threshold": lambda h: torch.logaddexp(h, torch.zeros_like(h)),
    "another slope": lambda h: F.leaky_relu(h, 0.0100001),
    "another alpha": lambda h: F.elu(h, 1.00001),
    "another beta": lambda h: F.softplus(h, 1.00001),
    "another threshold": lambda h: F.softplus(h, 1.0, 19.0),
    "another constant": lambda h: 0.5 * h * (1 + torch.tanh(0.7979 * (h + 0.044715 * h**3))),
    "another cubic": lambda h: 0.5 * h * (1 + torch.tanh(0.7978845608 * (h + 0.04471 * h**3))),
    "another sigmoid": lambda h: h * torch.sigmoid(1.7021 * h),
    "a lost digit": lambda h: F.silu((h + 4096.0) - 4096.0),
    "an underflow": lambda h: F.silu(h * 1e-30 * 1e30),
    "rounded": lambda h: F.silu(h.half()).float(),
    "a tiny shift": lambda h: F.silu(h) + 1e-8,
}


@pytest.mark.parametrize("name", KEPT)
def test_kept_as_written(name: str) -> None:
    program = program_of(KEPT[name])
    assert program.activation == "custom"
    assert program.module is not None
    rows = torch.randn(64, H) * torch.logspace(-4, 5, 64)[:, None]
    rows[:4] = torch.tensor([0.0, math.inf, -math.inf, math.nan])[:, None]
    mine, its = rows.clone().requires_grad_(), rows.clone().requires_grad_()
    want, got = KEPT[name](mine), program.module(its)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    want.sum().backward()
    got.sum().backward()
    torch.testing.assert_close(its.grad, mine.grad, rtol=0, atol=0, equal_nan=True)


def test_precise_models_compare_constants_precisely() -> None:
    def middle(h: Tensor) -> Tensor:
        return 0.5 * h * (1 + torch.tanh(0.7978845608 * (h + 0.044715 * h**3)))

    assert program_of(middle).activation == "gelu_tanh"
    assert program_of(middle, dtype=torch.float64).activation == "custom"
    exact = program_of(lambda h: 0.5 * h * (1 + tanh_part(h)), dtype=torch.float64)
    assert exact.activation == "gelu_tanh"


GATED: list[tuple[str, bool, Callable[[Tensor, Tensor], Tensor]]] = [
    ("silu", False, lambda a, b: F.silu(a) * b),
    ("silu", True, lambda a, b: a * F.silu(b)),
    ("silu", True, lambda a, b: a * b * torch.sigmoid(b)),
    ("gelu", False, lambda a, b: 0.5 * a * (1 + torch.erf(a / 2**0.5)) * b),
    ("sigmoid", False, lambda a, b: torch.sigmoid(a) * b),
    ("identity", False, lambda a, b: a * b),
]


@pytest.mark.parametrize(("name", "swap", "function"), GATED)
def test_gates(name: str, swap: bool, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    program = program_of(halves(function), 2 * H)
    assert (program.activation, program.gated, program.swap) == (name, True, swap)


def test_glu() -> None:
    program = program_of(lambda h: F.glu(h, -1), 2 * H)
    assert (program.activation, program.gated, program.swap) == ("sigmoid", True, True)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: F.silu(a).clamp(max=16) * b.clamp(-16, 16),
        lambda a, b: F.silu(a) * b.clamp(-1000, 1000),
        lambda a, b: (b + 1) * a * torch.sigmoid(1.702 * a),
        lambda a, b: F.silu(a) * b * 1.0001,
    ],
)
def test_gates_that_are_kept(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    program = program_of(halves(function), 2 * H)
    assert program.activation == "custom"


def test_interleaved_halves_are_kept() -> None:
    program = program_of(lambda h: F.silu(h[..., ::2]) * h[..., 1::2], 2 * H)
    assert program.activation == "custom"


def test_alpha_dropout_is_not_taken_for_dropout() -> None:
    program = program_of(lambda h: F.alpha_dropout(F.gelu(h), 0.3, False))
    assert (program.activation, program.dropout) == ("custom", 0.0)
    assert program.module is not None
    assert [type(child) for child in program.module.children()] == [nn.AlphaDropout]


def test_dropout_of_channels_is_refused() -> None:
    recorded = capture(
        Body(lambda h: F.feature_alpha_dropout(F.selu(h), 0.3, False)), torch.randn(2, 5, D)
    )
    regions, missed = find_regions(recorded.graph_module.graph)
    assert not regions
    assert "drops whole channels" in missed[0].reason


def test_saturation_is_no_normalisation() -> None:
    assert find_mlps(Body(lambda h: 5 * torch.tanh(h)), torch.randn(2, 5, D))
    assert find_mlps(Body(lambda h: F.hardtanh(h, -5.0, 5.0)), torch.randn(2, 5, D))


def converted(model: nn.Module, x: Tensor) -> nn.Module:
    torch.manual_seed(0)
    moeify(model, PLAN, example_inputs=x)
    return model.eval()


@pytest.mark.parametrize("middle", [KEPT["clamped silu"], KEPT["hardtanh"]])
def test_outliers(middle: Middle) -> None:
    """Values far from those of the example."""
    torch.manual_seed(0)
    x = torch.randn(2, 5, D)
    dense = nn.Sequential(nn.Linear(D, D), Body(middle))
    moe = nn.Sequential(nn.Linear(D, D), Body(middle))
    moe.load_state_dict(dense.state_dict())
    converted(moe, x)
    for size in (1.0, 1e2, 1e4):
        mine, its = (x * size).requires_grad_(), (x * size).requires_grad_()
        want, got = dense(mine), moe(its)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6 * size)
        want.square().sum().backward()
        got.square().sum().backward()
        torch.testing.assert_close(its.grad, mine.grad, rtol=1e-4, atol=1e-5 * size)


def test_the_clamp_of_step3() -> None:
    module: Any = pytest.importorskip("transformers.models.step3p7.modeling_step3p7")
    configuration = pytest.importorskip("transformers.models.step3p7.configuration_step3p7")
    config = configuration.Step3p7TextConfig(
        hidden_size=D, intermediate_size=H, num_hidden_layers=2, swiglu_limits_shared=[0.0, 16.0]
    )
    names = []
    for layer in (0, 1):
        torch.manual_seed(layer)
        mlp = module.Step3p7MLP(config, layer)
        model = nn.Sequential(nn.Linear(D, D), mlp)
        x = torch.randn(4, D) * 200
        want = model(x).detach()
        names.append(find_mlps(model, torch.randn(4, D))[0].activation)
        converted(model, torch.randn(4, D))
        torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-3)
    assert names == ["silu", "custom"]
