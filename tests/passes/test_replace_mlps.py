"""replace-mlps: the block of each kind of site, what stays, and that no number changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from moeify.errors import UnsupportedModuleError
from moeify.nn.block import DenseMLP, LinearExperts
from moeify.nn.experts import Experts
from moeify.passes.find_mlps import FindMlps
from moeify.passes.infra.base import Fact, PlanContext
from moeify.passes.infra.records import record_of
from moeify.passes.replace_mlps import ReplaceMlps
from moeify.passes.rewrite.blocks import MOE_ROLE, blocks_of
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.plan.plan import Plan
from moeify.plan.resolve import resolve_sites
from moeify.sites.discovery import Discovery, discover
from tests.conv_models import Conv, ConvModel

D, H = 8, 24


class Mlp(nn.Module):
    """Plain or gated, with biases or without, and perhaps with a dropout behind it."""

    def __init__(self, gated: bool = False, bias: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(D, H, bias=bias) if gated else None
        self.up, self.down = nn.Linear(D, H, bias=bias), nn.Linear(H, D, bias=bias)
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        up = self.up(hidden)
        up = F.gelu(up) if self.gate is None else F.silu(self.gate(hidden)) * up
        return self.dropout(self.down(up))


class Layer(nn.Module):
    """`x + mlp(norm(x))`, so that there is something around a module that is swapped."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(D), mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(hidden=self.norm(x))


class Written(Mlp):
    """The same with the MLP written out in the layer itself: no module is exactly it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.norm = nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(self.norm(x))


class Shared(nn.Module):
    """Runs one MLP twice, the second time on what the first run returned."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.norm = mlp, nn.LayerNorm(D)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm(self.mlp(x)))


def x(*shape: int) -> Tensor:
    size = shape or (2, 5, D)
    return torch.randn(*size, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    """A graph whose MLPs are marked, and what the pass needs."""

    gm: fx.GraphModule
    ctx: PlanContext
    found: Discovery

    @property
    def pass_(self) -> ReplaceMlps:
        return ReplaceMlps(self.found)


def case(model: nn.Module, *rules: Mapping[str, Any], inputs: Tensor | None = None) -> Case:
    """Record a model, apply a plan of these rules to it, and mark its MLPs."""
    torch.manual_seed(0)
    found = discover(model.eval(), x() if inputs is None else inputs)
    plan = Plan.of({"layers": list(rules or ({"select": "all", "experts": 3},))})
    resolved = resolve_sites(
        plan,
        found.sites,
        parameters=found.parameters,
        parameter_bytes=found.parameter_bytes,
        linears=found.linears,
    )
    ctx = PlanContext(plan=plan, resolved=resolved, model=model)
    gm = run_pass(FindMlps(found.regions), found.capture.graph_module, ctx).graph_module
    return Case(gm, ctx, found)


def block_of(gm: fx.GraphModule) -> fx.GraphModule:
    ((_, block),) = blocks_of(gm)
    return block


RESIDUAL = {"select": "all", "experts": 3, "top_k": 2, "residual": "coefficient"}
LINEAR = {"select": {"name": "head"}, "experts": 3, "expert": "linear"}


def head() -> nn.Module:
    """A projection to another width."""
    return nn.Sequential(OrderedDict(norm=nn.LayerNorm(D), head=nn.Linear(D, 5), act=nn.Tanh()))


# -- before and after

GOLDEN: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "module": (lambda: Layer(Mlp()), []),
    "written": (lambda: Written(gated=True, bias=False), []),
    "residual": (lambda: Layer(Mlp(gated=True)), [RESIDUAL]),
    "linear": (head, [LINEAR]),
    "shared": (lambda: Shared(Mlp()), []),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, golden):
    make, rules = GOLDEN[name]
    it = case(make(), *rules)
    golden(before_and_after(it.pass_, it.gm, it.ctx), f"replace_mlps_{name}.txt")


# -- no number changes

PLANS: dict[str, list[dict[str, Any]]] = {
    "plain": [],
    "residual": [RESIDUAL],
    "add": [{**RESIDUAL, "residual": "add"}],
}
MODELS: dict[str, Any] = {
    f"{how}, {'gated' if gated else 'plain'}, {'biases' if bias else 'no biases'}": (
        lambda how=how, gated=gated, bias=bias: (
            Layer(Mlp(gated, bias)) if how == "a module" else Written(gated=gated, bias=bias)
        )
    )
    for how in ("a module", "written out")
    for gated in (False, True)
    for bias in (False, True)
}


def assert_equal_to_dense(model: nn.Module, it: Case, inputs: Tensor) -> fx.GraphModule:
    """Replace; compare outputs and the gradients of inputs and of what stays dense."""
    gm = run_pass(it.pass_, it.gm, it.ctx).graph_module
    results = []
    for run in (model, gm.eval()):
        given = inputs.clone().requires_grad_()
        out = run(given)
        out = out[0] if isinstance(out, tuple) else out
        stays = [p for name, p in model.named_parameters() if "norm" in name]
        grads = torch.autograd.grad(out.square().sum(), [given, *stays])
        results.append([out.detach(), *grads])
    for dense, sparse in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=1e-5)
    return gm


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_no_number_changes(name, plan):
    model = MODELS[name]()
    it = case(model, *PLANS[plan])
    gm = assert_equal_to_dense(model, it, x())
    block = block_of(gm)
    assert isinstance(block.experts, Experts)
    assert block.experts.gated == ("gated" in name)
    biases = {n for n, _ in block.experts.named_parameters() if n.endswith("bias")}
    assert bool(biases) == (", biases" in name)
    assert isinstance(getattr(block, "mlp", None), DenseMLP) == (plan != "plain")


@pytest.mark.parametrize(("mlp", "path"), [(Mlp, "mlp"), (Written, "mlp.down")])
def test_a_shared_module_becomes_one_block_of_two_calls(mlp, path):
    model = Shared(mlp())
    it = case(model)
    assert it.found.sites[0].calls == 2
    gm = assert_equal_to_dense(model, it, x())
    first, second = gm.graph.find_nodes(op="call_module")
    assert first.target == second.target == path


@pytest.mark.parametrize("expert", ["mlp", "linear"])
def test_a_shared_module_right_behind_itself(expert):
    """The second call reads what the first one returns, not what is no longer there."""
    model: nn.Module
    if expert == "mlp":
        model, rules = Shared(Mlp()), []
        model.norm = nn.Identity()
    else:
        linear = nn.Linear(D, D)
        model = nn.Sequential(nn.LayerNorm(D), linear, linear, nn.Tanh())
        rules = [LINEAR | {"select": {"name": "1"}}]
    gm = assert_equal_to_dense(model, case(model, *rules), x())
    first, second = gm.graph.find_nodes(op="call_module")
    assert first.target == second.target
    assert second.args == (first,)


def test_mlps_that_read_each_other():
    model = nn.Sequential(Mlp(), Mlp(gated=True))
    gm = assert_equal_to_dense(model, case(model), x())
    first, second = gm.graph.find_nodes(op="call_module")
    assert second.args == (first,)


def test_linear_experts_come_before_their_projection():
    model = head()
    gm = assert_equal_to_dense(model, case(model, LINEAR), x())
    block = block_of(gm)
    assert isinstance(block.experts, LinearExperts)
    assert torch.equal(block.experts.weight, torch.eye(D).expand(3, D, D))
    assert block.projection is model.head  # the layer itself, which goes on training


def test_channels_first():
    model = ConvModel(Conv())
    inputs = x(2, 3, 8, 8)
    assert_equal_to_dense(model, case(model, inputs=inputs), inputs)


def test_the_block_takes_over_a_dropout_and_the_name_of_the_argument():
    it = case(Layer(Mlp(dropout=0.25)))
    block = block_of(run_pass(it.pass_, it.gm, it.ctx).graph_module)
    assert block.dropout.p == 0.25
    (argument,) = block.graph.find_nodes(op="placeholder")
    assert argument.target == "hidden"


# -- what stays


def test_what_was_not_selected_stays():
    model = nn.Sequential(Layer(Mlp()), Layer(Mlp()))
    it = case(model, {"select": {"index": 1}, "experts": 3})
    stays = [n for n in it.gm.graph.nodes if (r := record_of(n)) and r.module_path.startswith("0.")]
    gm = assert_equal_to_dense(model, it, x())
    assert [path for path, _ in blocks_of(gm)] == ["1.mlp"]
    assert set(stays) <= set(gm.graph.nodes)
    assert not [n for n in gm.graph.nodes if str(n.target).startswith("1.mlp.")]


def test_the_model_is_only_read():
    model = Layer(Mlp())
    before = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    it = case(model, RESIDUAL)
    block = block_of(run_pass(it.pass_, it.gm, it.ctx).graph_module)
    assert type(model.mlp) is Mlp
    now = dict(model.named_parameters())
    assert now.keys() == before.keys()
    for name, (parameter, value) in before.items():
        assert now[name] is parameter
        assert torch.equal(parameter, value)
    # The dense branch trains on with the parameters of the MLP; experts have their own.
    assert block.mlp.down.weight is model.mlp.down.weight
    memory = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert all(p.untyped_storage().data_ptr() not in memory for p in block.experts.parameters())


def test_the_call_says_what_it_is():
    it = case(Layer(Mlp()))
    gm = run_pass(it.pass_, it.gm, it.ctx).graph_module
    (call,) = gm.graph.find_nodes(op="call_module")
    record = record_of(call)
    assert record is not None
    assert (record.site, record.role, record.module_path) == ("mlp", MOE_ROLE, "mlp")
    assert record.shapes == ((2, 5, D),)


def test_a_share_of_the_experts():
    it = case(Layer(Mlp()))
    block = block_of(run_pass(ReplaceMlps(it.found, {"mlp": range(1, 3)}), it.gm, it.ctx)[0])
    assert block.experts.up_proj.shape == (2, H, D)
    assert block.router.weight.shape == (3, D)


def test_nothing_is_planned():
    it = case(Layer(Mlp()))
    assert it.ctx.resolved is not None
    nothing = replace(it.ctx, resolved=replace(it.ctx.resolved, layers=()))
    assert_untouched(it.pass_, it.gm, nothing)


@pytest.mark.parametrize("name", GOLDEN)
def test_a_second_run_changes_nothing(name):
    make, rules = GOLDEN[name]
    it = case(make(), *rules)
    assert_idempotent(it.pass_, it.gm, it.ctx)


# -- what it refuses


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"residual": "add"}, "head: `expert: linear` has no residual; remove it"),
        ({"init": {"experts": "drop"}}, "head: `expert: linear` has no init `drop`; remove it"),
    ],
)
def test_linear_experts_have_no_branch_and_no_other_start(options, reason):
    it = case(head(), LINEAR | options)
    with pytest.raises(UnsupportedModuleError, match=reason):
        run_pass(it.pass_, it.gm, it.ctx)


def test_contract():
    it = case(Layer(Mlp()))
    message = assert_requires(it.pass_, Fact.RESOLVED, it.gm, replace(it.ctx, resolved=None))
    assert "the context has no plan applied to sites" in message
    found = discover(it.ctx.model, x())
    gm = found.capture.graph_module
    message = assert_requires(ReplaceMlps(found), Fact.MLP_SITES, gm, it.ctx)
    assert "mlp: no nodes are marked as its projections" in message
