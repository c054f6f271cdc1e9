"""Which regions of a graph are MLPs, and why the others are not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify import moeify
from moeify.capture.capture import capture
from moeify.passes.find_mlps import FindMlps
from moeify.passes.infra.base import Fact
from moeify.passes.infra.printer import print_graph
from moeify.passes.infra.records import record_of
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.sites.discovery import Discovery, discover
from tests.conv_models import Conv, ConvModel

D, H = 8, 24
PLAN = {"layers": [{"select": "all", "experts": 3, "top_k": 2, "residual": "coefficient"}]}


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), D)


class Body(nn.Module):
    """An MLP whose middle is given: `down(middle(up(x)))`."""

    def __init__(self, middle: Callable[[Tensor], Tensor], width: int = H, down: int = 0) -> None:
        super().__init__()
        self.up = nn.Linear(D, width)
        self.down = nn.Linear(down or width, D)
        if isinstance(middle, nn.Module):
            self.act = middle
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x)))


class Model(nn.Module):
    """`x + mlp(norm(x))`, so that there is something around it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


def converts(model: nn.Module, inputs: Tensor | tuple[Tensor, ...]) -> nn.Module:
    """Convert with verification, then compare once more on other numbers, and train a step."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    other = tuple(torch.randn_like(t) if t.is_floating_point() else t for t in inputs)
    expected = model.eval()(*other).detach()
    moeify(model, PLAN, example_inputs=inputs)
    torch.testing.assert_close(model(*other), expected, rtol=1e-4, atol=1e-5)
    model.train()
    model(*other).float().square().sum().backward()
    return model


def only(found: Discovery) -> str:
    """Return the kind of the one site."""
    assert len(found.sites) == 1, found.near_misses
    site = found.sites[0]
    return f"{'gated ' if site.gated else ''}{site.activation}"


# -- what is an MLP


def by_hand(h: Tensor) -> Tensor:
    return 0.5 * h * (1.0 + torch.tanh(0.7978845608028654 * (h + 0.044715 * torch.pow(h, 3))))


def in_place(h: Tensor) -> Tensor:
    return torch.relu_(h.mul_(2.0).add_(0.5))


def with_where(h: Tensor) -> Tensor:
    return torch.where(h > 0, h, 0.1 * h.exp())


def with_constant(h: Tensor) -> Tensor:
    return h * torch.sigmoid(torch.tensor(1.5) * h)


def hand_norm(h: Tensor) -> Tensor:
    h = F.gelu(h)
    centred = h - h.mean(-1, keepdim=True)
    return centred * torch.rsqrt(h.var(-1, keepdim=True) + 1e-5)


@torch.jit.script
def scripted(h: Tensor) -> Tensor:
    return h * torch.sigmoid(1.5 * h) + 0.1


MIDDLES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "gelu": (nn.GELU(), "gelu"),
    "gelu by hand": (by_hand, "gelu_tanh"),
    "in place": (in_place, "custom"),
    "relu in place": (nn.ReLU(inplace=True), "relu"),
    "where": (with_where, "custom"),
    "constant": (with_constant, "custom"),
    "prelu": (nn.PReLU(), "custom"),
    "norm": (nn.Sequential(nn.GELU(), nn.LayerNorm(H)), "custom"),
    "rms norm": (nn.Sequential(nn.SiLU(), nn.RMSNorm(H)), "custom"),
    "relu norm": (nn.Sequential(nn.ReLU(), nn.LayerNorm(H)), "custom"),
    "norm by hand": (hand_norm, "custom"),
    "dropout": (nn.Sequential(nn.SiLU(), nn.Dropout(0.1)), "silu"),
    "dropouts": (nn.Sequential(nn.Dropout(0.2), nn.SiLU(), nn.Dropout(0.1)), "custom"),
    "scripted": (scripted, "custom"),
    "softmax": (nn.Softmax(-1), "custom"),
}


@pytest.mark.parametrize("name", MIDDLES)
def test_middle(name: str) -> None:
    middle, kind = MIDDLES[name]
    model = Model(Body(middle))
    assert only(discover(model, x())) == kind
    converts(model, x())


HALVES: dict[str, tuple[Callable[[Tensor], Tensor], int, str]] = {
    "glu": (F.glu, H, "gated sigmoid"),
    "swapped": (lambda h: h[..., :H] * F.silu(h[..., H:]), H, "gated silu"),
    "in order": (lambda h: F.silu(h[..., :H]) * h[..., H:], H, "gated silu"),
    "interleaved": (lambda h: F.silu(h[..., ::2]) * h[..., 1::2], H, "custom"),
    "unequal": (
        lambda h: F.silu(h[..., :H]) * h[..., H : H + 8].mean(-1, keepdim=True),
        H,
        "custom",
    ),
    "three": (lambda h: F.silu(h[..., :16]) * h[..., 16:32] + h[..., 32:].tanh(), 16, "custom"),
}


@pytest.mark.parametrize("name", HALVES)
def test_fused_halves(name: str) -> None:
    middle, down, kind = HALVES[name]
    width = H + 8 if name == "unequal" else 48
    model = Model(Body(middle, width, down))
    found = discover(model, x())
    assert found.sites[0].activation == kind.removeprefix("gated ")
    assert found.sites[0].gated == kind.startswith("gated")
    converts(model, x())


class Gated(nn.Module):
    """Two first projections in either order."""

    def __init__(self, order: bool) -> None:
        super().__init__()
        self.first, self.second, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        return self.down(F.silu(a) * b if self.order else a * F.silu(b))


@pytest.mark.parametrize("order", [True, False])
def test_gate_order(order: bool) -> None:
    model = Model(Gated(order))
    assert only(discover(model, x())) == "gated silu"
    converts(model, x())


class Bare(nn.Module):
    """Bare parameters, multiplied in one of many ways; the module is exactly the MLP."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        flip = how in ("matmul", "addmm", "einsum in", "in place bias")
        one, two = (D, H), (H, D)
        self.a = nn.Parameter(torch.randn(*(one if flip else one[::-1])) / 4)
        self.b = nn.Parameter(torch.randn(*(two if flip else two[::-1])) / 4)
        self.c = nn.Parameter(torch.randn(H))

    def project(self, x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        match self.how:
            case "matmul":
                y = x @ w
            case "matmul T":
                y = x @ w.T
            case "linear":
                return F.linear(x, w, bias)
            case "einsum out":
                y = torch.einsum("...d,fd->...f", x, w)
            case "einsum in":
                y = torch.einsum("bsd,df->bsf", x, w)
            case "addmm":
                flat = x.reshape(-1, x.shape[-1])
                y = torch.mm(flat, w) if bias is None else torch.addmm(bias, flat, w)
                return y.view(*x.shape[:-1], -1)
            case _:
                y = x @ w
                if bias is not None:
                    y += bias
                return y
        return y if bias is None else y + bias

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.gelu(self.project(x, self.a, self.c)), self.b, None)


@pytest.mark.parametrize(
    "how", ["matmul", "matmul T", "linear", "einsum out", "einsum in", "addmm", "in place bias"]
)
def test_bare_parameters(how: str) -> None:
    model = Model(Bare(how))
    found = discover(model, x())
    assert only(found) == "gelu"
    assert found.sites[0].install == "module"
    converts(model, x())


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 3, 4)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    model = Model(Body(F.gelu))
    inputs = torch.randn(*shape, D)
    assert only(discover(model, inputs)) == "gelu"
    converts(model, inputs)


def test_hidden_as_wide_as_the_model() -> None:
    converts(Model(Body(F.gelu, D)), x())


def test_sequential_at_the_root() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.ReLU(), nn.Linear(H, D))
    site = discover(model, x()).sites[0]
    assert (site.name, site.install) == ("2", "across modules")
    converts(model, x())


def test_channels_first() -> None:
    model = ConvModel(Conv())
    found = discover(model, torch.randn(2, 3, 8, 8))
    assert found.sites[0].install == "module"
    converts(model, torch.randn(2, 3, 8, 8))


def test_channels_first_in_separate_modules() -> None:
    model = ConvModel(nn.Sequential(nn.Conv2d(D, H, 1), nn.GELU(), nn.Conv2d(H, D, 1)))
    model.extra = nn.Identity()
    converts(model, torch.randn(2, 3, 8, 8))


def test_prelu_per_unit_only_where_units_are_its_channels() -> None:
    model = nn.Sequential(nn.Linear(D, H), nn.PReLU(H), nn.Linear(H, D))
    converts(model, x(5))
    for count, inputs in ((5, x()), (H, x(2, H))):
        spatial = nn.Sequential(nn.Linear(D, H), nn.PReLU(count), nn.Linear(H, D))
        near = discover(spatial, inputs).near_misses
        assert "one parameter per position" in near[0].reason


# -- the pass


def test_golden(golden: Callable[[str, str], None]) -> None:
    recorded = capture(Model(Gated(True)), x())
    golden(before_and_after(FindMlps(), recorded.graph_module), "find_mlps.txt")


def test_the_graph_stays_as_it_is() -> None:
    gm = capture(Model(Gated(True)), x()).graph_module
    before = print_graph(gm, meta=False)
    assert run_pass(FindMlps(), gm).modified
    assert print_graph(gm, meta=False) == before


def test_a_second_run_changes_nothing() -> None:
    assert_idempotent(FindMlps(), capture(Model(Gated(True)), x()).graph_module)


def read_outside(hidden: Tensor) -> Tensor:
    return torch.cat([hidden, hidden.cumsum(-1)], -1)  # mixes hidden units by their place


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D)), Model(Body(read_outside, H, 2 * H))],
    ids=["one projection", "not elementwise"],
)
def test_nothing_to_mark(model: nn.Module) -> None:
    assert_untouched(FindMlps(), capture(model, x()).graph_module)


def test_regions_that_are_known_are_not_searched_for() -> None:
    found = discover(nn.Sequential(Model(Body(F.gelu)), Model(Body(F.gelu))), x())
    gm = run_pass(FindMlps(found.regions[1:]), found.capture.graph_module).graph_module
    sites = {r.site for node in gm.graph.nodes if (r := record_of(node)) is not None and r.site}
    assert sites == {"1.mlp.down.weight"}


def test_contract() -> None:
    gm = torch.fx.symbolic_trace(Model(Body(F.gelu)))
    assert "no node has a record" in assert_requires(FindMlps(), Fact.CAPTURED, gm)
