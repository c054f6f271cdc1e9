"""slice-dense: which layers it slices, which it leaves whole and why, and what it writes down."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from moeify.passes.find_mlps import FindMlps
from moeify.passes.infra.base import Fact, PlanContext
from moeify.passes.infra.printer import print_graph
from moeify.passes.slice_dense import SliceDense, slices_of
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.plan import Plan
from moeify.plan.resolve import resolve_sites
from moeify.sites.discovery import discover
from moeify.tensor_parallel.apply import SlicedPair, SlicePlan
from moeify.tensor_parallel.derive import derive
from tests.zoo_models import ZOO

B, T, D, H = 2, 6, 32, 4


class Attention(nn.Module):
    """Attention whose parts a test may replace."""

    def __init__(self, kv_heads: int = H) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(D, D), nn.Linear(D, D)
        self.k, self.v = (nn.Linear(D, D // H * kv_heads) for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, D // H).transpose(1, 2)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return q @ k.mT * (D // H) ** -0.5

    def merge(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        return self.o(self.merge(self.score(q, k).softmax(-1) @ v))


class Mlp(nn.Module):
    def __init__(self, hidden: int = 48) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, hidden), nn.Linear(hidden, D)

    def inner(self, hidden: Tensor) -> Tensor:
        return F.gelu(hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.inner(self.up(x)))


class Layer(nn.Module):
    def __init__(self, attention: nn.Module | None = None, mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.attention, self.mlp = attention or Attention(), mlp or Mlp()
        self.moe = Mlp()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        x = x + self.mlp(x)
        return x + self.moe(x)


def x() -> Tensor:
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(1))


def resolved(model: nn.Module, inputs: Any, *rules: dict[str, Any]) -> tuple[Any, ResolvedPlan]:
    discovery = discover(model, inputs)
    chosen = rules or ({"select": {"last": 1}, "experts": 2},)
    plan = Plan.of({"layers": list(chosen), "parallel": {"tensor": 2}})
    found = resolve_sites(
        plan,
        discovery.sites,
        parameters=discovery.parameters,
        parameter_bytes=discovery.parameter_bytes,
        linears=discovery.linears,
    )
    return discovery, found


def plan_of(
    model: nn.Module, *rules: dict[str, Any], inputs: Any = None, tensor: int = 2
) -> SlicePlan:
    given = x() if inputs is None else inputs
    discovery, found = resolved(model, given, *rules)
    return derive(discovery, found, tensor, model=model, example_inputs=given)


ATTENTION = SlicedPair(
    "attention", "attention", ("attention.q", "attention.k", "attention.v"), "attention.o"
)
MLP = SlicedPair("mlp", "mlp", ("mlp.up",), "mlp.down")


def test_finds_attention_and_the_mlp_that_stays_dense() -> None:
    model = Layer()
    before = {n: id(p) for n, p in model.named_parameters()}
    plan = plan_of(model)
    assert plan == SlicePlan(2, (ATTENTION, MLP))
    assert plan.modules["attention.o"] == "rowwise"
    assert {n: id(p) for n, p in model.named_parameters()} == before


def test_one_rank_needs_no_slices() -> None:
    assert plan_of(Layer(), tensor=1) == SlicePlan(1)


# -- models

BOTH = {"attention": 2, "mlp": 1}
ZOO_SLICED: dict[str, tuple[dict[str, int], dict[str, str]]] = {
    "llama": (BOTH, {}),
    "mistral": (BOTH, {}),
    "qwen3": (BOTH, {}),
    "bert": (BOTH, {}),
    "bart": ({"attention": 6, "mlp": 3}, {}),
    "gpt_neox": (BOTH, {}),  # its fused projection is stored head by head
    "opt": ({"mlp": 1}, {"self_attn": "its code does not run with a slice of its width"}),
    "gpt2": (
        {},
        {"attn": "c_attn is not a plain nn.Linear", "mlp": "c_fc is not a plain nn.Linear"},
    ),
    "t5": (
        {"mlp": 3},
        {"Attention": "`scaled_dot_product_attention` in .* a sliced value with a whole one of 4"},
    ),
    "bloom": ({"mlp": 1}, {"self_attention": "merges the sliced dimension"}),
    "phi3": ({}, {"self_attn": "cuts the sliced width", "mlp": "`chunk` .* cuts the sliced width"}),
    "olmo2": ({"mlp": 1}, {"self_attn": "`mean` in .*q_norm reduces over the sliced width"}),
}


@pytest.mark.parametrize("name", ZOO_SLICED)
@pytest.mark.thin(2)
def test_zoo(name: str) -> None:
    pairs, refused = ZOO_SLICED[name]
    model = ZOO[name].build()
    discovery, found = resolved(model, None)
    plan = derive(discovery, found, 2, model=model)
    kinds = [pair.kind for pair in plan.pairs]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == pairs
    assert bool(plan.refused) == bool(refused)
    for path, reason in plan.refused:
        part = next(end for end in refused if path.endswith(end))
        assert re.search(refused[part], reason), (path, reason)


def test_a_norm_over_each_head_has_part_of_its_gradient_on_each_rank() -> None:
    model = ZOO["qwen3"].build()
    discovery, found = resolved(model, None)
    plan = derive(discovery, found, 2, model=model)
    first = plan.pairs[0]
    path = "model.layers.0.self_attn"
    assert first.partial == (f"{path}.q_norm.weight", f"{path}.k_norm.weight")


def test_heads_must_divide() -> None:
    plan = plan_of(Layer(Grouped(2), Mlp(50)), tensor=4)
    assert plan.refused == (
        (
            "attention",
            "`view` in attention cuts a width of 16 in 2 parts, which do not divide over 4 tensor "
            "ranks",
        ),
        ("mlp", "its width of 50 does not divide over 4 tensor ranks"),
    )
    assert plan_of(Layer(Grouped(2))).pairs[0] == ATTENTION


class Grouped(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(self.merge(y))


class TalkingHeads(Attention):
    """Mixes the scores of all heads by a projection, after which they are sliced again."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Linear(H, H)

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return self.talk(super().score(q, k).movedim(1, -1)).movedim(-1, 1)


def test_slices_from_a_projection_of_the_scores_on() -> None:
    pair = plan_of(Layer(TalkingHeads())).pairs[0]
    assert (pair.colwise, pair.rowwise) == (("attention.v", "attention.talk"), "attention.o")


# -- what must not be sliced


class BakedHeads(Attention):
    """Runs with half of the heads and mixes tokens: only the shapes tell."""

    def heads(self, x: Tensor) -> Tensor:
        return x.view(B, -1, H, D // H).transpose(1, 2)

    def merge(self, y: Tensor) -> Tensor:
        return y.transpose(1, 2).reshape(B, T, -1)


class WidthAsNumber(Attention):
    def merge(self, y: Tensor) -> Tensor:
        y = super().merge(y)
        return y * y.shape[-1] ** -0.5


class HeadScale(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(H, 1, 1))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return super().score(q, k) * self.scale


class WholeNorm(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)

    def merge(self, y: Tensor) -> Tensor:
        return self.norm(super().merge(y))


class SoftmaxOverHeads(Attention):
    def score(self, q: Tensor, k: Tensor) -> Tensor:
        return super().score(q, k).softmax(1)


class HeadsInBatch(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(m(x)).flatten(0, 1) for m in (self.q, self.k, self.v))
        y = torch.bmm(self.score(q, k).softmax(-1), v)
        return self.o(self.merge(y.view(B, -1, T, D // H)))


class ReadElsewhere(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.q(x)


class UsedTwice(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        y = F.scaled_dot_product_attention(self.heads(q), self.heads(self.k(x)), self.heads(q))
        return self.o(self.merge(y)) + q


class OutsideGate(Attention):
    """Multiplies heads with one value per token, whose own gradient is needed as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.open = self.gate(x).sigmoid()
        return super().forward(x) * self.open

    def merge(self, y: Tensor) -> Tensor:
        return super().merge(y) * self.open


class Fused(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self.heads(part) for part in self.q(x).chunk(3, -1))
        return self.o(self.merge(F.scaled_dot_product_attention(q, k, v)))


class Functional(Attention):
    def forward(self, x: Tensor) -> Tensor:
        q, k = (self.heads(F.linear(x, m.weight, m.bias)) for m in (self.q, self.k))
        y = F.scaled_dot_product_attention(q, k, self.heads(self.v(x)))
        return self.o(self.merge(y))


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (BakedHeads, "`view` has sizes written into its code: a slice should be [2, 6, 2, 8]"),
    (WidthAsNumber, "`mul` computes with its width as a number"),
    (HeadScale, "`mul` in attention joins a sliced value with a whole one of 4 along it"),
    (WholeNorm, "`layer_norm` in attention.norm reduces over the sliced width"),
    (SoftmaxOverHeads, "`softmax` in attention reduces over the sliced width"),
    (HeadsInBatch, "(2, 4, 6, 8) -> (8, 6, 8) merges the sliced dimension"),
    (ReadElsewhere, "attention.q is also used elsewhere"),
    (UsedTwice, "`add` in attention joins"),
    (OutsideGate, "has a gradient of its own through `mul` in attention"),
    (Fused, "`chunk` in attention cuts the sliced width"),
    (Functional, "attention.q.weight is used outside its module"),
    (lambda: nn.MultiheadAttention(D, H), "its projections and its heads are one call"),
]


class SelfOnly(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.inside = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.thin(2)
def test_leaves_attention_whole(make: Callable[[], nn.Module], reason: str) -> None:
    attention = make()
    if isinstance(attention, nn.MultiheadAttention):
        attention = SelfOnly(attention)
    plan = plan_of(Layer(attention).train())
    assert plan.pairs == (MLP,)
    ((_, why),) = [r for r in plan.refused if r[0].startswith("attention")]
    assert reason in why


class Scaled(Mlp):
    """Has one parameter per hidden unit."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(48))

    def inner(self, hidden: Tensor) -> Tensor:
        return F.gelu(hidden) * self.scale


class Slope(Mlp):
    """Has one parameter for all hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def inner(self, hidden: Tensor) -> Tensor:
        return F.gelu(hidden) * (1 + self.slope)


def test_leaves_an_mlp_whole() -> None:
    plan = plan_of(Layer(mlp=Scaled()))
    assert plan.pairs == (ATTENTION,)
    assert plan.refused == (
        ("mlp", "`mul` in mlp joins a sliced value with a whole one of 48 along it"),
    )


def test_a_parameter_of_all_units_may_be_shared_by_the_slices() -> None:
    assert plan_of(Layer(mlp=Slope())).pairs[1].partial == ("mlp.slope",)


def hooked(model: Layer) -> str:
    model.attention.v.register_forward_hook(lambda *_: None)
    return "attention.v has hooks, which would see slices"


def tied(model: Layer) -> str:
    model.attention.k.weight = model.attention.q.weight
    return "tied to"


def patched(model: Layer) -> str:
    model.attention.o.forward = lambda value: F.linear(value, model.attention.o.weight)
    return "attention.o is not a plain nn.Linear"


def parametrised(model: Layer) -> str:
    nn.utils.parametrizations.weight_norm(model.attention.q)
    return "attention.q"


@pytest.mark.parametrize("change", [hooked, tied, patched, parametrised])
def test_leaves_what_the_user_changed(change: Callable[[Layer], str]) -> None:
    model = Layer()
    reason = change(model)
    plan = plan_of(model)
    assert [pair.name for pair in plan.pairs] == ["mlp"]
    assert reason in dict(plan.refused)["attention"]


def test_leaves_what_becomes_experts() -> None:
    rules = (
        {"select": {"last": 1}, "experts": 2},
        {"select": {"name": "attention.o"}, "expert": "linear", "experts": 2},
    )
    plan = plan_of(Layer(), *rules)
    assert plan.pairs == (MLP,)
    assert dict(plan.refused)["attention"] == "attention.o becomes experts"


class Chained(Layer):
    """Its MLP projects what attention returns, without a projection between."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.attention(x))
        return y + self.moe(y)


def test_slices_a_projection_once() -> None:
    model = Chained()
    model.attention.o = nn.Identity()
    plan = plan_of(model)
    assert [(pair.name, pair.rowwise) for pair in plan.pairs] == [("attention", "mlp.up")]
    assert plan.refused == (("mlp", "mlp.up is sliced as part of attention"),)


def test_says_which_residual_branches_it_slices() -> None:
    rule = {"select": "all", "experts": 2, "residual": "add"}
    plan = plan_of(Layer(mlp=Mlp(50)), rule, tensor=4)
    assert plan.branches == ("moe.mlp",)
    assert ("mlp.mlp", "its width of 50 does not divide over 4 tensor ranks") in plan.refused


# -- the pass


def deciding(model: nn.Module) -> tuple[SliceDense, GraphModule, PlanContext]:
    """Record a model and mark its MLPs; return the pass, its graph and its context."""
    discovery, found = resolved(model, x())
    ctx = PlanContext(plan=found.plan, resolved=found, model=model)
    gm = run_pass(FindMlps(discovery.regions), discovery.capture.graph_module, ctx).graph_module
    return SliceDense(discovery, x()), gm, ctx


def test_golden(golden: Callable[[str, str], None]) -> None:
    golden(before_and_after(*deciding(Layer())), "slice_dense.txt")


def test_pass_marks_projections(caplog: pytest.LogCaptureFixture) -> None:
    model = Layer(BakedHeads(), Mlp())
    model.second = model.attention
    model.attention = Attention()
    slice_dense, gm, ctx = deciding(model)
    before = print_graph(gm, meta=False)
    with caplog.at_level(logging.INFO, logger="moeify"):
        result = run_pass(slice_dense, gm, ctx)
    assert result.modified  # what it wrote; the graph computes what it did
    assert print_graph(result.graph_module, meta=False) == before
    plan = slices_of(result.graph_module)
    assert plan is not None
    assert ctx.resolved is not None
    discovery = slice_dense.discovery
    assert plan == derive(discovery, ctx.resolved, 2, model=model, example_inputs=x())
    assert list(plan.lines()) == [record.message for record in caplog.records]
    assert "attention: sliced over 2 ranks: q, k, v by column, o by row" in caplog.text


def test_roles_in_a_site_stay() -> None:
    """Whether they were written before or are written after it."""
    slice_dense, gm, ctx = deciding(Layer())
    run_pass(slice_dense, gm, ctx)
    discovery, found = resolved(Layer(), x())
    ctx = PlanContext(plan=found.plan, resolved=found, model=Layer())
    other = run_pass(SliceDense(discovery, x()), discovery.capture.graph_module, ctx).graph_module
    assert "# mlp.up  @ mlp: colwise" in print_graph(other)
    run_pass(FindMlps(discovery.regions), other, ctx)
    assert print_graph(other) == print_graph(gm)
    assert "# mlp.up  @ mlp.down.weight: up" in print_graph(gm)


def test_nothing_to_slice() -> None:
    """The decision is written down all the same, once, and no node is marked."""
    slice_dense, gm, ctx = deciding(Layer(BakedHeads(), Scaled()))
    before = print_graph(gm)
    run_pass(slice_dense, gm, ctx)
    decided = slices_of(gm)
    assert decided is not None
    assert not decided.pairs
    assert print_graph(gm) == before
    assert_untouched(slice_dense, gm, ctx)


def test_a_second_run_changes_nothing() -> None:
    slice_dense, gm, ctx = deciding(Layer())
    assert slices_of(gm) is None
    assert_idempotent(slice_dense, gm, ctx)


def test_contract() -> None:
    slice_dense, gm, ctx = deciding(Layer())
    unresolved = replace(ctx, resolved=None)
    message = assert_requires(slice_dense, Fact.RESOLVED, gm, unresolved)
    assert "the context has no plan applied to sites" in message
