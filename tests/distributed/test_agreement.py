"""Ranks that disagree: each raises at once, names the ranks, and has its dense model back."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import fx, nn
from torch.distributed.device_mesh import DeviceMesh

import moeify as mf
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of
from moeify.plan.plan import Plan
from moeify.sites.record import ATTRIBUTE
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import WIDTH, Net, dense, plan

WORLD = 3

Call = dict[str, Any]


@dataclass(frozen=True)
class Fails:
    """A user's pass that raises, on chosen ranks."""

    ranks: tuple[int, ...]
    name: ClassVar[str] = "fails"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.SHARDED})  # so it comes before others

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        if ctx.mesh.rank in self.ranks:
            raise ValueError(f"not on rank {ctx.mesh.rank}")
        return PassResult(gm, False)


@dataclass(frozen=True)
class Doubles:
    """A user's pass that spoils the blocks of one rank."""

    on: int
    name: ClassVar[str] = "doubles"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        for _, block in blocks_of(gm) if ctx.mesh.rank == self.on else ():
            (output,) = block.graph.find_nodes(op="output")
            (y,) = output.all_input_nodes
            with block.graph.inserting_before(output):
                output.replace_input_with(y, block.graph.call_function(torch.add, (y, y)))
            block.recompile()
        return PassResult(gm, ctx.mesh.rank == self.on)


@dataclass(frozen=True)
class Patches(Fails):
    """A user's pass after which a module of rank 1 cannot be replaced any more."""

    ranks: tuple[int, ...] = (1,)

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        if ctx.mesh.rank in self.ranks:
            ctx.model.b.forward = type(ctx.model.b).forward.__get__(ctx.model.b)
        return PassResult(gm, False)


class Deeper(Net):
    """One more MLP; its forward runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Sequential(nn.Linear(WIDTH, 8), nn.ReLU(), nn.Linear(8, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(super().forward(x))


def experts() -> Call:
    return {"layers": [{"select": "all", "experts": 6, "top_k": 2}]}


def same_but(**changes: Any) -> Call:
    return {"plan": plan(expert=WORLD) | experts()} | changes


def disagreeing_plans(rank: int) -> Call:
    layers = [{"select": "all", "experts": 6, "top_k": 1 + (rank == 1)}]
    return {"plan": plan(expert=WORLD) | {"layers": layers}}


def a_plan_that_is_none(rank: int) -> Call:
    return same_but(plan={"layers": "every"}) if rank == 2 else same_but()


def a_file_on_one_rank(rank: int) -> Call:
    folder = tempfile.mkdtemp()  # each rank has its own disk
    path = Path(folder, "plan.yaml")
    if rank == 0:
        Plan.of(same_but()["plan"]).save(path)
    return {"plan": path}


def depth(rank: int) -> Call:
    torch.manual_seed(3)
    return same_but(model=Deeper() if rank == 2 else Net())


def one_more_head(rank: int) -> Call:
    model = dense()
    if rank == 1:
        model.head = nn.Linear(2, 2)
    return same_but(model=model)


def seeds(rank: int) -> Call:
    torch.manual_seed(rank)
    return same_but(model=Net())


def one_bit(rank: int) -> Call:
    model = dense()
    if rank == 2:
        model.norm.bias.data[3] = -0.0
    return same_but(model=model)


def inputs(rank: int) -> Call:
    return same_but(example_inputs=torch.ones(4 + rank // 2, WIDTH))


def verifying(rank: int) -> Call:
    return same_but(verify=rank != 0)


def failing_pass(rank: int) -> Call:
    return same_but(passes=[Fails((1,))])


def failing_passes(rank: int) -> Call:
    return same_but(passes=[Fails((1, 2))])


def wrong_block(rank: int) -> Call:
    made = same_but()["plan"] | {"init": {"experts": "copy"}}
    return same_but(plan=made, passes=[Doubles(1)])


def patched_module(rank: int) -> Call:
    return same_but(passes=[Patches()])


def no_model(rank: int) -> Call:
    return same_but(model=nn.DataParallel(dense())) if rank == 0 else same_but()


def wrong_inputs(rank: int) -> Call:
    return same_but(example_inputs=torch.ones(4, WIDTH + (rank == 1)))


def world_of_three(rank: int) -> Call:
    return {"plan": plan(expert=2)}


def mesh_of(ranks: Any, *names: str) -> DeviceMesh:
    return DeviceMesh("cpu", ranks, mesh_dim_names=names)


def mesh_on_one_rank(rank: int) -> Call:
    mesh = mesh_of([[0], [1], [2]], "dp", "tp")
    return same_but(mesh=mesh if rank == 0 else None)


def mesh_of_other_names(rank: int) -> Call:
    return same_but(mesh=mesh_of([[0], [1], [2]], "data", "model"))


def mesh_of_other_sizes(rank: int) -> Call:
    return same_but(mesh=mesh_of([[0, 1, 2]], "dp", "tp"))


def mesh_of_other_order(rank: int) -> Call:
    return same_but(mesh=mesh_of([[2], [0], [1]], "dp", "tp"))


def no_mesh_at_all(rank: int) -> Call:
    return same_but(mesh="dp")


REFUSED: list[tuple[Callable[[int], Call], str | dict[int, str], list[str]]] = [
    # on every rank the same type and text; or the types of some ranks, MoeifyError on others
    (disagreeing_plans, "PlanError", ["ranks disagree on the plan (ranks 0, 2: ", "; rank 1: "]),
    (a_plan_that_is_none, {2: "PlanError"}, ["rank 2 could not take model and plan", "layers"]),
    (a_file_on_one_rank, {1: "PlanError", 2: "PlanError"}, ["ranks 1, 2 could not take", "plan.y"]),
    (depth, "PlanError", ["ranks disagree on the number of layers (ranks 0, 1: 2; rank 2: 3)"]),
    (one_more_head, "PlanError", ["the weights of head (ranks 0, 2: nothing; rank 1: "]),
    (seeds, "PlanError", ["ranks disagree on the weights of a.0 (rank 0: ", "; rank 2: "]),
    (one_bit, "PlanError", ["ranks disagree on the weights of norm (ranks 0, 1: ", "; rank 2: "]),
    (inputs, "PlanError", ["the example inputs (ranks 0, 1: ", "[4, 16]", "rank 2: ", "[5, 16]"]),
    (verifying, "PlanError", ["ranks disagree on `verify` (rank 0: False; ranks 1, 2: True)"]),
    (failing_pass, {1: "ValueError"}, ["rank 1 could not build its blocks", "not on rank 1"]),
    (
        failing_passes,
        {1: "ValueError", 2: "ValueError"},
        ["ranks 1, 2 could not build its blocks, so all ranks stop: ", "not on rank 1"],
    ),
    # Its gradients are in the mean of all ranks.
    (wrong_block, "VerificationError", ["differ from the dense model's"]),
    (patched_module, {1: "UnsupportedModuleError"}, ["rank 1 could not install", "b: its forward"]),
    (
        no_model,
        {0: "UnsupportedModuleError"},
        ["rank 0 could not take model and plan, so", "inside"],
    ),
    (wrong_inputs, {1: "CaptureError"}, ["rank 1 could not apply the plan, so all ranks stop"]),
    (world_of_three, "PlanError", ["parallel.expert: ", "a world of 3: ", "expert may be 1, 3"]),
    (mesh_on_one_rank, "PlanError", ["ranks disagree on `mesh` (rank 0: ", "ranks 1, 2: none)"]),
    (mesh_of_other_names, "PlanError", ["('data', 'model')", "the plan needs ('dp', 'tp')"]),
    (mesh_of_other_sizes, "PlanError", ["of sizes (1, 3)", "of sizes (3, 1): init_device_mesh("]),
    (mesh_of_other_order, "PlanError", ["holds the ranks [[2], [0], [1]]", "in ascending order"]),
    (no_mesh_at_all, "PlanError", ["mesh has dimensions ()", "init_device_mesh("]),
]


def state(model: nn.Module) -> Any:
    modules = [(path, id(module), type(module)) for path, module in model.named_modules()]
    values = {n: (id(p), p.detach().clone()) for n, p in model.named_parameters()}
    hooks = [len(p._backward_hooks or ()) for p in model.parameters()]
    return modules, values, hooks


def is_same(before: Any, now: Any) -> bool:
    if before[0] != now[0] or before[2] != now[2] or before[1].keys() != now[1].keys():
        return False
    pairs = [(before[1][name], now[1][name]) for name in before[1]]
    return all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in pairs)


def convert(call: Call) -> tuple[nn.Module, Any, Exception | None]:
    model = call.pop("model", None) or dense()
    made = call.pop("plan")
    before = state(model)
    call = {"example_inputs": torch.ones(4, WIDTH)} | call
    try:
        mf.moeify(model, made, **call)
    except Exception as error:
        return model, before, error
    return model, before, None


def all_refused(rank: int) -> Any:
    """One after the other in one world: after an error all ranks are where they were."""
    outcomes = []
    for scenario, _, _ in REFUSED:
        start = time.monotonic()
        model, before, error = convert(scenario(rank))
        same = is_same(before, state(model)) and ATTRIBUTE not in model.__dict__
        notes = " ".join(getattr(error, "__notes__", ()))
        outcomes.append((type(error).__name__, f"{error} {notes}", same, time.monotonic() - start))
    model, _, error = convert(same_but())
    assert error is None
    assert type(model.a).__name__ == "MoEBlock"
    dist.barrier()  # one rank may be done while another still connects to it
    return outcomes


@pytest.fixture(scope="module")
def refused():
    return run_ranks(all_refused, WORLD, timeout=30.0, deadline=100.0)


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=[f.__name__ for f, _, _ in REFUSED])
def test_every_rank_refuses_and_keeps_the_dense_model(refused, number):
    _, types, words = REFUSED[number]
    for rank in range(WORLD):
        kind, text, same, seconds = refused[rank][number]
        own = types if isinstance(types, str) else types.get(rank, "MoeifyError")
        assert kind == own, text
        assert same, text
        assert seconds < 10.0
        if isinstance(types, str) or rank not in types:
            assert all(word in text for word in words), text


def dead_before(rank: int) -> Any:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    _, _, error = convert(same_but())
    return type(error).__name__, str(error), time.monotonic() - start


def test_a_rank_that_died_before():
    answers = run_ranks(dead_before, WORLD, timeout=3.0, deadline=30.0, dies=(1,))
    for rank in (0, 2):
        kind, text, seconds = answers[rank]
        assert kind == "DispatchError"
        assert "could not take model and plan with the other ranks: rank 1 did not come" in text
        assert seconds < 10.0


def with_mesh(rank: int, given: bool) -> Any:
    """Return what a converted model computes with the user's mesh, and this rank's experts."""
    model, _, error = convert(
        same_but(mesh=mesh_of([[0], [1], [2]], "dp", "tp") if given else None)
    )
    assert error is None, error
    x = torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH) * (rank + 1)
    return model.eval()(x).detach(), next(model.a.experts.parameters()).to_local().detach()


def test_the_users_own_mesh():
    usual, given = run_ranks(with_mesh, WORLD, False), run_ranks(with_mesh, WORLD, True)
    for rank in range(WORLD):
        assert all(map(torch.equal, usual[rank], given[rank]))


def alone_in_the_world(rank: int, with_mesh: bool) -> Any:
    mesh = mesh_of([[0]], "dp", "tp") if with_mesh else None
    model, _, error = convert({"plan": plan(), "mesh": mesh})
    assert error is None
    assert not any(hasattr(p, "to_local") for p in model.parameters())
    y = model.train()(torch.ones(4, WIDTH))
    (y.square().mean() + mf.aux_loss(model)).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients


@pytest.mark.parametrize("mesh", [False, True])
def test_a_world_of_one_rank_runs_as_one_process(mesh):
    (found,) = run_ranks(alone_in_the_world, 1, mesh)
    assert not dist.is_initialized()
    y, gradients = alone_in_the_world(0, False)
    assert torch.equal(found[0], y)
    assert found[1].keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "mesh", "words"),
    [
        ({"expert": 4}, None, ["parallel.expert", "start 4 processes (torchrun"]),
        ({"expert": 2, "tensor": 3}, None, ["a world of 1: ", "start 6 processes"]),
        ({"tensor": 2}, None, ["parallel.tensor", "start 2 processes"]),
        ({}, "mesh", ["mesh: torch.distributed does not run: call init_process_group first"]),
    ],
)
def test_one_process_gets_advice_to_start_more(changes, mesh, words):
    model, before, error = convert({"plan": plan(**changes), "mesh": mesh})
    assert isinstance(error, mf.PlanError)
    assert all(word in str(error) for word in words), error
    assert is_same(before, state(model))
