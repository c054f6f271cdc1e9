"""Gathers as nodes: golden graph, where they stand, and what they do to whole parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from moeify.errors import PassOrderError, UnsupportedModuleError
from moeify.passes.gather_partitions import GatherPartitions
from moeify.passes.infra.base import Fact, PlanContext
from moeify.passes.infra.manager import PassManager
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.lower_kernels import LowerKernels
from moeify.passes.partition_zero import PartitionZero
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.simulate.counter import fake_world
from moeify.zero import graph_engine
from tests.passes.parallel_block import (
    alone_after,
    block_after,
    dense_graph,
    show_block,
    stage,
)

GRAPH = {"engine": "graph", "stage": 3}


def lowered(zero: dict[str, Any]) -> tuple[Any, fx.GraphModule, fx.GraphModule]:
    """Return context, graph and block of a lowered block of four ranks, with ZeRO decided."""
    passes = [InsertAllToAll(), PartitionZero(), LowerKernels(kernel="cpu")]
    ctx, _, gm, block = block_after(passes, expert=2, zero=zero)
    return ctx, gm, block


def test_golden(golden):
    with fake_world(4, 2):
        ctx, gm, _ = lowered(GRAPH)
        text = before_and_after(GatherPartitions(), gm, ctx, show_block)
        golden(text, "gather_partitions.txt")


def test_a_second_run_changes_nothing():
    with fake_world(4, 2):
        ctx, gm, _ = lowered(GRAPH)
        assert_idempotent(GatherPartitions(), gm, ctx)


@pytest.mark.parametrize("zero", [{}, {"stage": 3}, {"stage": 2, "engine": "fsdp2"}, {"stage": 1}])
def test_other_engines_and_stages(zero):
    with fake_world(4, 2):
        ctx, gm, block = lowered(zero)
        assert_untouched(GatherPartitions(), gm, ctx)
        assert not block.graph.find_nodes(op="call_function", target=graph_engine.gather)


def test_without_ranks_nothing_is_gathered():
    ctx, _, gm, _ = alone_after([])
    assert_untouched(GatherPartitions(), gm, ctx)


def test_where_gathers_stand():
    """Ahead of the block, experts' last; without prefetching right before their module."""
    with fake_world(4, 2):
        for prefetch, ahead in ((1, True), (0, False)):
            ctx, gm, block = lowered({**GRAPH, "prefetch": prefetch})
            run_pass(GatherPartitions(), gm, ctx)
            order = [n.target for n in block.graph.nodes]
            gathers = [i for i, target in enumerate(order) if target is graph_engine.gather]
            runs = [i for i, target in enumerate(order) if target is graph_engine.run]
            assert len(gathers) == 5
            assert len(runs) == 2
            assert (max(gathers) < min(runs)) == ahead
            names = [n.args[1] for n in block.graph.nodes if n.target is graph_engine.gather]
            assert names == ["weight", "up_proj", "up_bias", "down_proj", "down_bias"]
            if not ahead:
                assert gathers[-1] == runs[1] - 1


def test_facts():
    ctx = PlanContext(facts=frozenset({Fact.MOE_BLOCKS}))
    with pytest.raises(PassOrderError, match="partitioned"):
        PassManager([GatherPartitions()]).run(fx.symbolic_trace(nn.Identity()), ctx)


def test_contract():
    with fake_world(4, 2):
        ctx, gm, _ = stage(InsertAllToAll(), zero=GRAPH)
        message = assert_requires(GatherPartitions(), Fact.MOE_BLOCKS, dense_graph(ctx), ctx)
        assert "mlp: no node calls its block" in message
        message = assert_requires(GatherPartitions(), Fact.PARTITIONED, gm, ctx)
        assert "the graph's meta holds no decision" in message


def test_whole_parameters():
    module = nn.Sequential(nn.Linear(3, 2))
    assert graph_engine.gather(module, "0.weight") is module[0].weight
    x = torch.randn(4, 3)
    ones, zeros = torch.ones(2, 3), torch.zeros(2)
    made = graph_engine.run(module, ("0.weight", "0.bias"), (ones, zeros), x)
    assert torch.equal(made, x @ ones.t())
    assert made.requires_grad is False
    assert module[0].weight.requires_grad


def test_modules_that_read_past_their_names():
    graph, root = fx.Graph(), nn.Module()
    root.w = nn.Parameter(torch.ones(2))
    graph.output(graph.get_attr("w"))
    for module, reason in (
        (nn.GRU(2, 2), "as recurrent layers do"),
        (torch.jit.script(nn.Linear(2, 2)), "scripted"),
        (fx.GraphModule(root, graph), "rebuilds its class"),
    ):
        with pytest.raises(UnsupportedModuleError, match=f"inner.*{reason}"):
            graph_engine._check(nn.ModuleDict({"inner": module}))
