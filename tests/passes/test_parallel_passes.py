"""Golden graphs of the passes that put a block on several ranks, in a simulated world."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import fx, nn

from moeify.discovery import discover
from moeify.errors import PassError, PlanError, UnsupportedModuleError
from moeify.layout import Layout
from moeify.mesh import World
from moeify.passes.base import Fact, Pass, PassResult, PlanContext
from moeify.passes.blocks import blocks_of
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.facts import CHECKS
from moeify.passes.find_mlps import FindMlps
from moeify.passes.hierarchical_all_to_all import HierarchicalAllToAll
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.join_routers import JoinRouters
from moeify.passes.lower_kernels import LowerKernels
from moeify.passes.manager import PassManager
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.printer import print_graph
from moeify.passes.replace_mlps import ReplaceMlps
from moeify.passes.shard_experts import ShardExperts
from moeify.passes.slice_experts import SliceExperts
from moeify.plan import Plan
from moeify.resolve import resolve_sites
from moeify.simulate_counter import fake_world


def block_after(passes: list[Pass], *, world: int = 4, node: int = 2, **parallel: Any) -> Any:
    """Run passes on a two-layer net; return (context, manager, graph)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            mlp=nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), last=nn.Tanh()
        )
    )
    inputs = torch.ones(6, 8)
    made = {
        "layers": [{"select": "all", "experts": parallel.pop("experts", 8)}],
        "parallel": {"all_to_all": "flat"} | parallel,
    }
    plan = Plan.of(made)
    found = discover(model, inputs)
    resolved = resolve_sites(
        plan, found.sites, parameters=found.parameters, parameter_bytes=found.parameter_bytes
    )
    mesh = World.create(Layout.of(plan.parallel, world))
    mesh.node = node
    ctx = PlanContext(plan=plan, resolved=resolved, mesh=mesh, model=model)
    first: list[Pass] = [FindMlps(found.regions), ReplaceMlps(found), ShardExperts()]
    manager = PassManager([*first, *passes], checks=CHECKS)
    gm = manager.run(found.capture.graph_module, ctx).graph_module
    ((_, block),) = blocks_of(gm)
    return ctx, manager, gm, block


def text_of(block: fx.GraphModule) -> str:
    """Print a block; group names, which count the groups of a process, become their place."""
    text = print_graph(block, meta=False)
    names: dict[str, str] = {}
    pattern = r"'(\d+|[0-9a-f]{8,}[^']*)'"
    return re.sub(pattern, lambda m: names.setdefault(m[0], f"'group {len(names)}'"), text)


CASES: dict[str, tuple[list[Pass], dict[str, Any]]] = {
    "flat": ([InsertAllToAll()], {"expert": 4}),
    "uneven": ([InsertAllToAll()], {"expert": 4, "splits": "uneven"}),
    "allgather": ([InsertAllToAll()], {"expert": 4, "all_to_all": "allgather"}),
    "coordinated": ([InsertAllToAll(), CoordinateAllToAll()], {"expert": 2, "tensor": 2}),
    "hierarchical": (
        [InsertAllToAll(), HierarchicalAllToAll()],
        {"expert": 4, "all_to_all": "hierarchical"},
    ),
    "overlapped": ([InsertAllToAll(), OverlapChunks()], {"expert": 4, "overlap_chunks": 2}),
    "sliced": (
        [InsertAllToAll(), SliceExperts()],
        {"expert": 2, "tensor": 2, "experts_in_tp": "slice"},
    ),
    "lowered": ([InsertAllToAll(), LowerKernels(kernel="cpu")], {"expert": 4}),
}


@pytest.mark.parametrize("name", list(CASES))
def test_golden(name, golden):
    passes, parallel = CASES[name]
    with fake_world(4, 2):
        *_, block = block_after(passes, **parallel)
        golden(text_of(block), f"parallel_{name}.txt")


@pytest.mark.parametrize("name", [n for n in CASES if n != "lowered"])
def test_a_second_run_changes_nothing(name):
    passes, parallel = CASES[name]
    with fake_world(4, 2):
        ctx, _, gm, block = block_after(passes, **parallel)
        before = print_graph(block)
        for again in passes:
            assert not again.run(gm, ctx).modified
        assert print_graph(block) == before


def test_without_ranks_nothing_changes():
    block = _alone([ShardExperts(), InsertAllToAll(), CoordinateAllToAll(), OverlapChunks()])
    assert not [n for n in block.graph.nodes if "collectives" in str(n.target)]


def _alone(passes: list[Pass]) -> Any:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Tanh())
    plan = Plan.of({"layers": [{"select": "all", "experts": 4}]})
    found = discover(model, torch.ones(6, 8))
    resolved = resolve_sites(
        plan, found.sites, parameters=found.parameters, parameter_bytes=found.parameter_bytes
    )
    ctx = PlanContext(plan=plan, resolved=resolved, model=model)
    manager = PassManager([FindMlps(found.regions), ReplaceMlps(found), *passes], checks=CHECKS)
    gm = manager.run(found.capture.graph_module, ctx).graph_module
    ((_, block),) = blocks_of(gm)
    return block


def test_shards():
    with fake_world(4, 2):
        *_, block = block_after([], expert=4)
        weight = block.experts.up_proj
        assert weight.shape == (8, 16, 8)
        assert weight.to_local().shape == (2, 16, 8)
        *_, block = block_after([], expert=4, experts=2)  # a smaller group
        assert block.experts.up_proj.to_local().shape == (1, 16, 8)


def test_slices():
    with fake_world(4, 2):
        *_, block = block_after(
            [InsertAllToAll(), SliceExperts()], expert=2, tensor=2, experts_in_tp="slice"
        )
        experts = block.experts
        assert experts.up_proj.to_local().shape == (4, 8, 8)
        assert experts.down_proj.to_local().shape == (4, 8, 8)
        assert experts.down_bias.to_local().shape == (4, 4)
        assert experts.up_proj.shape == (8, 16, 8)


def test_widths_that_do_not_slice():
    with fake_world(3, 3), pytest.raises(PlanError, match="does not slice over a tensor axis of 3"):
        block_after([SliceExperts()], world=3, node=3, tensor=3, experts_in_tp="slice")
    with fake_world(16, 16), pytest.raises(UnsupportedModuleError, match="16 and 8 do not slice"):
        block_after([SliceExperts()], world=16, node=16, tensor=16, experts_in_tp="slice")


def test_stages_need_several_nodes():
    with fake_world(4, 4), pytest.raises(PlanError, match="LOCAL_WORLD_SIZE") as caught:
        block_after(CASES["hierarchical"][0], node=4, expert=4, all_to_all="hierarchical")
    (note,) = caught.value.__notes__  # and not the graph
    assert note.startswith("while running pass 'hierarchical-all-to-all', after find-mlps, ")


def test_a_block_that_another_pass_has_changed():
    with fake_world(4, 2), pytest.raises(PassError, match="no dispatch, experts, combine"):
        block_after([_Rename(), InsertAllToAll()], expert=4)


class _Rename:
    name = "rename"
    requires = frozenset({Fact.MOE_BLOCKS})
    provides: frozenset[str] = frozenset({Fact.SHARDED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        ((_, block),) = blocks_of(gm)
        for call in block.graph.find_nodes(op="call_module", target="experts"):
            with block.graph.inserting_after(call):
                clone = block.graph.call_function(torch.clone, (call,))
            call.replace_all_uses_with(clone)
            clone.args = (call,)
        return PassResult(gm, True)


def test_routers_learn_their_groups():
    with fake_world(4, 2):
        *_, block = block_after([JoinRouters()], expert=2, tensor=2)
        router = block.router
        assert router.group
        assert router.tensor_group
        assert router.group != router.tensor_group
        assert router.where == "mlp"
