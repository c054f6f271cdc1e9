"""lower-kernels: what it fuses, what it leaves alone, and that no number changes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import moeify as mf
from moeify.passes.find_mlps import FindMlps
from moeify.passes.infra.base import Fact, PlanContext
from moeify.passes.infra.manager import PassManager
from moeify.passes.infra.printer import print_graph
from moeify.passes.infra.records import record_of
from moeify.passes.lower_kernels import LowerKernels, workload
from moeify.passes.replace_mlps import ReplaceMlps
from moeify.passes.rewrite.blocks import blocks_of
from moeify.passes.rewrite.facts import CHECKS
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.plan.plan import Plan
from moeify.plan.resolve import resolve_sites
from moeify.simulate.counter import fake_world
from moeify.sites.discovery import discover
from tests.passes.parallel_block import hide_experts, stage

D, H = 16, 24
ALL = {"layers": [{"select": "all", "experts": 3, "top_k": 2}]}


class Mlp(nn.Module):
    def __init__(self, width: int = D, inner: nn.Module | None = None, dropout: float = 0.0):
        super().__init__()
        self.up, self.down = nn.Linear(width, H), nn.Linear(H, width)
        self.inner, self.dropout = inner or nn.Identity(), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(nn.functional.gelu(self.up(x)))
        return self.down(self.dropout(hidden))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(D, H, bias=False), nn.Linear(D, H, bias=False)
        self.down = nn.Linear(H, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def stack(**options: Any) -> nn.Module:
    return nn.Sequential(Mlp(**options), Gated(), nn.LayerNorm(options.get("width", D)))


def x(width: int = D) -> Tensor:
    return torch.randn(40, width, generator=torch.Generator().manual_seed(1))


def replaced(model: nn.Module, plan: dict[str, Any] = ALL) -> tuple[fx.GraphModule, PlanContext]:
    """A graph with MoE blocks that are not lowered, and the context of the pass."""
    found = discover(model, x())
    chosen = Plan.of(plan)
    resolved = resolve_sites(
        chosen,
        found.sites,
        parameters=found.parameters,
        parameter_bytes=found.parameter_bytes,
        linears=found.linears,
    )
    ctx = PlanContext(
        plan=chosen, resolved=resolved, facts=frozenset({Fact.CAPTURED, Fact.RESOLVED}), model=model
    )
    passes = PassManager([FindMlps(found.regions), ReplaceMlps(found)])
    gm = passes.run(found.capture.graph_module, ctx).graph_module
    facts = frozenset({Fact.MOE_BLOCKS})
    return gm, PlanContext(plan=chosen, resolved=resolved, facts=facts, model=model)


def calls_of(block: nn.Module) -> list[str]:
    assert isinstance(block, fx.GraphModule)
    names = {torch.ops.moeify.dispatch: "dispatch", torch.ops.moeify.combine: "combine"}
    targets = [names.get(node.target, node.target) for node in block.graph.nodes]
    return [target for target in targets if target in ("dispatch", "experts", "combine")]


def kernel_of(block: nn.Module) -> str:
    assert isinstance(block, fx.GraphModule)
    (call,) = block.graph.find_nodes(op="call_module", target="experts")
    return str(call.kwargs["kernel"])


def convert(
    model: nn.Module, plan: dict[str, Any] = ALL, *, lower: bool = True, **options: Any
) -> nn.Module:
    """Convert a copy, with or without the pass, and make its experts different from each other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEIFY_DISABLE", "" if lower else "lower-kernels")
        got = mf.moeify(copy.deepcopy(model), plan, **{"example_inputs": x(), **options})
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in got.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=g)
    return got


def results(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Output and gradients of one training step, on numbers of its own."""
    torch.manual_seed(seed)
    model.zero_grad()
    tokens = x().flip(0).requires_grad_()
    out = model(tokens)
    (out.float().square().sum() + mf.aux_loss(model)).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {"out": out.detach(), "tokens": tokens.grad, **grads}


def check(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    """Compare by name, relative to the largest value of each."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype, name
        atol = tolerance * float(value.detach().abs().max())
        torch.testing.assert_close(got[name], value, rtol=tolerance, atol=atol, msg=name)


def show_first(gm: fx.GraphModule) -> str:
    (_, block), _ = blocks_of(gm)
    return print_graph(block)


def test_before_and_after(golden: Callable[[str, str], None]) -> None:
    gm, ctx = replaced(stack())
    golden(before_and_after(LowerKernels(), gm, ctx, show_first), "lower_kernels.txt")


def test_the_call_keeps_its_record() -> None:
    gm, ctx = replaced(stack())
    (_, block), _ = blocks_of(gm)
    run_pass(LowerKernels(), gm, ctx)
    (call,) = block.graph.find_nodes(op="call_module", target="experts")
    assert record_of(call) is not None


def test_a_second_run_finds_nothing() -> None:
    gm, ctx = replaced(stack())
    assert_idempotent(LowerKernels(), gm, ctx)


def test_the_fact_is_needed_and_given() -> None:
    gm, ctx = replaced(stack())
    dense = discover(stack(), x()).capture.graph_module
    message = assert_requires(LowerKernels(), Fact.MOE_BLOCKS, dense, ctx)
    assert "no node calls its block; " in message
    manager = PassManager([LowerKernels()], checks=CHECKS)
    manager.run(gm, ctx)
    assert Fact.LOWERED in manager.facts


def test_experts_must_be_called_as_modules() -> None:
    with fake_world(4, 2):
        ctx, gm, _ = stage()
        message = assert_requires(LowerKernels(), Fact.EXPERT_CALLS, gm, hide_experts(gm, ctx))
        assert "mlp: does not call its experts as a module" in message


def test_without_a_resolved_plan_every_block_gets_the_default() -> None:
    gm, _ = replaced(stack(), {"layers": [{**ALL["layers"][0], "kernel": "reference"}]})
    run_pass(LowerKernels(kernel="grouped_mm"), gm)
    assert [kernel_of(block) for _, block in blocks_of(gm)] == ["grouped_mm", "grouped_mm"]


def test_the_default_yields_to_the_plan() -> None:
    rules = [*ALL["layers"], {"select": {"index": 1}, "kernel": "reference"}]
    gm, ctx = replaced(stack(), {"layers": rules})
    run_pass(LowerKernels(kernel="triton"), gm, ctx)
    assert [kernel_of(block) for _, block in blocks_of(gm)] == ["triton", "reference"]


def between_dispatch_and_experts(graph: fx.Graph, dispatch: fx.Node, *_: fx.Node) -> None:
    with graph.inserting_after(dispatch):
        new = graph.call_method("clone", (dispatch,))
    dispatch.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def between_experts_and_combine(graph: fx.Graph, _: fx.Node, experts: fx.Node, *__: Any) -> None:
    with graph.inserting_after(experts):
        new = graph.call_function(torch.mul, (experts, 1.0))
    experts.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def rows_read_twice(graph: fx.Graph, dispatch: fx.Node, _: fx.Node, combine: fx.Node) -> None:
    with graph.inserting_after(combine):
        total = graph.call_method("sum", (dispatch,))
    with graph.inserting_after(total):
        new = graph.call_function(torch.add, (combine, total))
    combine.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def outputs_read_twice(graph: fx.Graph, _: fx.Node, experts: fx.Node, combine: fx.Node) -> None:
    rows_read_twice(graph, experts, experts, combine)


def another_order_back(graph: fx.Graph, _: fx.Node, __: fx.Node, combine: fx.Node) -> None:
    hidden, weights, order, slots = combine.args
    with graph.inserting_before(combine):
        copied = graph.call_method("clone", (slots,))
    combine.args = (hidden, weights, order, copied)


@pytest.mark.parametrize(
    "change",
    [
        between_dispatch_and_experts,
        between_experts_and_combine,
        rows_read_twice,
        outputs_read_twice,
        another_order_back,
    ],
)
def test_what_lies_between_is_left_alone(
    change: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="moeify")
    gm, ctx = replaced(stack())
    (path, block), _ = blocks_of(gm)
    ops = torch.ops.moeify
    (dispatch,) = block.graph.find_nodes(op="call_function", target=ops.dispatch)
    (experts,) = block.graph.find_nodes(op="call_module", target="experts")
    (combine,) = block.graph.find_nodes(op="call_function", target=ops.combine)
    change(block.graph, dispatch, experts, combine)
    block.recompile()
    expected = block(x())
    text = print_graph(block)
    assert run_pass(LowerKernels(), gm, ctx).modified  # the other block is fused
    assert print_graph(block) == text
    assert f"{path}: not fused: other nodes lie between its experts" in caplog.messages
    assert torch.equal(block(x()), expected)
    assert [calls_of(b) for _, b in blocks_of(gm)] == [
        ["dispatch", "experts", "combine"],
        ["experts"],
    ]


def test_no_block_has_anything_to_fuse() -> None:
    """Linear experts have no fused kernel, and nothing else here is a block."""
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))
    gm, ctx = replaced(
        model, {"layers": [{"select": {"name": "0"}, "expert": "linear", "experts": 2}]}
    )
    assert_untouched(LowerKernels(), gm, ctx)


def test_linear_experts_stay() -> None:
    plan = {"layers": [{"select": {"name": "0"}, "expert": "linear", "experts": 2}]}
    model = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D))
    mf.moeify(model, plan, example_inputs=x())
    assert calls_of(model[0]) == ["dispatch", "experts", "combine"]


PLANS = {
    "top 2": ALL,
    "straight through": {"layers": [{"select": "all", "experts": 4}]},
    "dropping": {**ALL, "router": {"capacity_factor": 0.6, "min_capacity": 1, "drop": "score"}},
    "random": {**ALL, "router": {"capacity_factor": 0.6, "min_capacity": 1, "drop": "random"}},
    "residual": {"layers": [{**ALL["layers"][0], "residual": "coefficient"}]},
    "balanced": {**ALL, "router": {"aux_loss": 0.1, "z_loss": 0.01, "score": "sigmoid"}},
}


@pytest.mark.parametrize(
    ("name", "kernel"),
    [(name, "auto") for name in PLANS]
    + [("dropping", kernel) for kernel in ("reference", "cpu", "grouped_mm", "triton")],
)
@pytest.mark.thin(2)
def test_no_number_changes(name: str, kernel: str) -> None:
    model, plan = stack(), PLANS[name]
    asked = {**plan, "layers": [{**rule, "kernel": kernel} for rule in plan["layers"]]}
    fused, plain = convert(model, asked).train(), convert(model, plan, lower=False).train()
    assert [calls_of(fused[i]) for i in (0, 1)] == [["experts"]] * 2
    assert calls_of(plain[0]) == ["dispatch", "experts", "combine"]
    assert kernel_of(fused[0]) == ("cpu" if kernel == "auto" else kernel)
    check(results(fused), results(plain))
    a, b = (m[0].router.last_stats for m in (fused, plain))
    assert torch.equal(a["counts"], b["counts"])
    assert torch.equal(a["dropped"], b["dropped"])


def test_dropout_between_the_projections_unfuses_training_alone() -> None:
    model = stack(dropout=0.4)
    fused, plain = convert(model).train(), convert(model, lower=False).train()
    check(results(fused, 3), results(plain, 3))
    assert not torch.equal(results(fused, 3)["out"], results(fused, 4)["out"])
    assert not fused[0].experts.fused
    assert fused.eval()[0].experts.fused
    torch.testing.assert_close(fused(x()), plain.eval()(x()))


def test_a_module_of_the_model_s_own_runs_on_the_reference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="moeify")
    model = stack(inner=nn.LayerNorm(H))
    fused, plain = convert(model), convert(model, lower=False)
    assert calls_of(fused[0]) == ["experts"]
    assert kernel_of(fused[0]) == "reference"
    assert any("a module of the model's own, which is not fused" in m for m in caplog.messages)
    check(results(fused), results(plain))


def test_autocast() -> None:
    model = nn.Sequential(Gated())
    fused, plain = convert(model), convert(model, lower=False)
    with torch.autocast("cpu", torch.bfloat16):
        check(results(fused), results(plain), 3e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kernel", ["auto", "grouped_mm", "triton"])
@pytest.mark.thin(3)
def test_a_model_that_is_cast_later_still_runs(kernel: str, dtype: torch.dtype) -> None:
    asked = {"layers": [{**ALL["layers"][0], "kernel": kernel}]}
    model = nn.Sequential(Gated())
    fused, plain = convert(model, asked), convert(model, lower=False)
    got, expected = ({"out": m.eval().to(dtype)(x().to(dtype))} for m in (fused, plain))
    check(got, expected, 1e-9 if dtype == torch.float64 else 3e-2)


def test_choices_and_reasons_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="moeify")
    convert(stack(), {"layers": [*ALL["layers"], {"select": {"index": 0}, "kernel": "triton"}]})
    assert [m for m in caplog.messages if ": kernel " in m] == [
        "0: kernel triton: the plan asks for it",
        "1: kernel cpu: float32 on cpu, fused",
    ]


def test_what_a_block_s_experts_are() -> None:
    model = convert(stack(dropout=0.1).bfloat16(), example_inputs=x().bfloat16())
    work = workload(model[0].experts)
    assert (work.device, work.dtype, work.widths) == ("cpu", torch.bfloat16, (D, H, D))
    assert (work.activation, work.dropout) == ("gelu", True)
    assert workload(model[1].experts).activation == "silu"


@pytest.mark.parametrize(
    ("kernel", "options", "why"),
    [
        ("triton", {"dtype": torch.float64}, "Triton has no matmul for float64"),
        ("grouped_mm", {"dtype": torch.float64}, "torch's grouped matmul has no float64"),
        ("cpu", {"inner": True}, "a module of the model's own, which is not fused"),
    ],
)
def test_a_kernel_that_cannot_run_a_layer_is_named(
    kernel: str, options: dict[str, Any], why: str
) -> None:
    dtype = options.get("dtype", torch.float32)
    inner = nn.LayerNorm(H) if "inner" in options else None
    model = nn.Sequential(Gated(), Mlp(inner=inner)).to(dtype)
    before = copy.deepcopy(model.state_dict())
    plan = {"layers": [*ALL["layers"], {"select": {"index": 1}, "kernel": kernel}]}
    with pytest.raises(mf.PlanError, match=f"1: kernel '{kernel}' cannot run here: .*{why}"):
        mf.moeify(model, plan, example_inputs=x().to(dtype))
    assert isinstance(model[0], Gated)
    assert isinstance(model[1], Mlp)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_unknown_kernel_is_no_plan() -> None:
    with pytest.raises(mf.PlanError, match="kernel"):
        Plan.of({"layers": [{"select": "all", "experts": 2, "kernel": "cutlass"}]})


def test_disabled_by_name() -> None:
    model = convert(stack(), lower=False)
    assert calls_of(model[0]) == calls_of(model[1]) == ["dispatch", "experts", "combine"]


def test_kernels_survive_save_and_load(tmp_path: Any) -> None:
    rules = [{**ALL["layers"][0], "kernel": "grouped_mm"},
             {"select": {"index": 1}, "kernel": "triton"}]  # fmt: skip
    model = convert(stack(), {"layers": rules}).eval()
    mf.save(model, tmp_path / "saved")
    loaded = mf.load(tmp_path / "saved", model=stack())
    assert [kernel_of(loaded[i]) for i in (0, 1)] == ["grouped_mm", "triton"]
    assert torch.equal(loaded(x()), model(x()))
    wide = mf.load(tmp_path / "saved", model=stack(), dtype=torch.bfloat16)
    assert [kernel_of(wide[i]) for i in (0, 1)] == ["grouped_mm", "triton"]


def test_a_model_on_meta_is_lowered_too() -> None:
    with torch.device("meta"):
        model = stack()
    mf.moeify(model, ALL, example_inputs=torch.empty(40, D, device="meta"))
    assert calls_of(model[0]) == ["experts"]
    assert kernel_of(model[0]) == "cpu"
    assert model(torch.empty(7, D, device="meta")).shape == (7, D)


def test_copies_keep_the_kernel() -> None:
    model = convert(stack()).eval()
    twin = copy.deepcopy(model)
    assert kernel_of(twin[0]) == "cpu"
    assert torch.equal(twin(x()), model(x()))
