"""Facts of moeify's passes against graphs for which they do not hold."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from moeify.errors import PassError
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.find_mlps import FindMlps
from moeify.passes.gather_partitions import GatherPartitions
from moeify.passes.infra.base import Fact, Pass, PassResult, PlanContext
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.lower_kernels import LowerKernels
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.partition_zero import PartitionZero
from moeify.passes.replace_mlps import ReplaceMlps
from moeify.passes.rewrite.facts import CHECKS
from moeify.passes.testing import assert_requires, run_pass
from moeify.simulate.counter import fake_world
from moeify.sites.discovery import discover
from tests.passes.parallel_block import block_after, hide_experts, stage


@pytest.fixture(autouse=True)
def _world() -> Iterator[None]:
    with fake_world(4, 2):
        yield


def problems(fact: Fact, gm: Any, ctx: Any) -> list[str]:
    return CHECKS[fact](gm, ctx)


def test_captured():
    gm = torch.fx.symbolic_trace(lambda x: torch.relu(x))
    (problem,) = problems(Fact.CAPTURED, gm, PlanContext())
    assert "no node has a record" in problem
    found = discover(nn.Sequential(nn.Linear(2, 2)), torch.ones(1, 2))
    assert not problems(Fact.CAPTURED, found.capture.graph_module, PlanContext())


def test_resolved():
    ctx, gm, _ = stage()
    assert not problems(Fact.RESOLVED, gm, ctx)
    assert problems(Fact.RESOLVED, gm, replace(ctx, resolved=None))


def test_mlp_sites_and_blocks():
    """Marks until a site is replaced, its block from then on."""
    ctx, done, _ = stage()
    found = discover(ctx.model, torch.ones(6, 8))
    gm = found.capture.graph_module
    marks = ["mlp: no nodes are marked as its projections"]
    assert problems(Fact.MLP_SITES, gm, ctx) == marks
    assert problems(Fact.MOE_BLOCKS, gm, ctx) == ["mlp: no node calls its block"]
    assert problems(Fact.MOE_BLOCKS, gm, PlanContext()) == ["no node calls a MoE block"]
    assert assert_requires(ReplaceMlps(found), Fact.MLP_SITES, gm, ctx)
    run_pass(FindMlps(found.regions), gm, ctx)
    assert not problems(Fact.MLP_SITES, gm, ctx)
    assert not problems(Fact.MLP_SITES, done, ctx)
    assert not problems(Fact.MOE_BLOCKS, done, ctx)


def test_replace_mlps_goes_by_the_marks():
    ctx, *_ = stage()
    found = discover(ctx.model, torch.ones(6, 8))
    gm = found.capture.graph_module
    run_pass(FindMlps(found.regions), gm, ctx)
    for node in found.regions[0].interior:
        del node.meta["moeify"]
    # Nothing leads from the second projection to the first ones: this is not a whole site.
    message = "replace-mlps provides 'moe-blocks', which does not hold after it: mlp: no node calls"
    with pytest.raises(PassError, match=message):
        run_pass(ReplaceMlps(found), gm, ctx)


def test_expert_calls():
    ctx, gm, _ = stage(InsertAllToAll())
    assert not problems(Fact.EXPERT_CALLS, gm, ctx)
    ctx = hide_experts(gm, ctx)
    assert problems(Fact.EXPERT_CALLS, gm, ctx) == ["mlp: does not call its experts as a module"]
    assert assert_requires(LowerKernels(), Fact.EXPERT_CALLS, gm, ctx)


def test_sharded():
    ctx, gm, block = stage()
    assert not problems(Fact.SHARDED, gm, ctx)
    block.experts.up_proj = nn.Parameter(torch.ones(8, 16, 8))
    assert problems(Fact.SHARDED, gm, ctx) == ["mlp: experts.up_proj is whole on each of 2 ranks"]
    assert not problems(Fact.SHARDED, gm, replace(ctx, mesh=None))
    assert assert_requires(InsertAllToAll(), Fact.SHARDED, gm, ctx)


@pytest.mark.parametrize("way", ["flat", "allgather"])
def test_dispatched(way):
    ctx, gm, _ = stage(all_to_all=way)
    reach = ["mlp: its tokens reach only the experts of this rank"]
    assert problems(Fact.DISPATCHED, gm, ctx) == reach
    assert assert_requires(CoordinateAllToAll(), Fact.DISPATCHED, gm, ctx)
    run_pass(InsertAllToAll(), gm, ctx)
    assert not problems(Fact.DISPATCHED, gm, ctx)


def test_dispatched_where_each_rank_has_all_experts():
    ctx, gm, _ = stage(expert=1)
    assert not problems(Fact.DISPATCHED, gm, ctx)


def test_coordinated():
    ctx, gm, _ = stage(InsertAllToAll())
    shares = ["mlp: each of 2 tensor ranks sends all rows that they share"]
    assert problems(Fact.COORDINATED, gm, ctx) == shares
    run_pass(CoordinateAllToAll(), gm, ctx)
    assert not problems(Fact.COORDINATED, gm, ctx)
    for parallel in ({"coordinated": False}, {"tensor": 1}, {"experts_in_tp": "slice"}):
        ctx, gm, _ = stage(InsertAllToAll(), **parallel)
        assert not problems(Fact.COORDINATED, gm, ctx)
    ctx, gm, _ = stage(InsertAllToAll(), all_to_all="allgather")
    assert not problems(Fact.COORDINATED, gm, ctx)


def test_pieces_are_not_cut_before_rows_are_shared_out():
    """Coordination cannot share out rows that are in pieces: neither pass goes on unseen."""
    ctx, gm, _ = stage(InsertAllToAll(), overlap_chunks=2)
    assert assert_requires(OverlapChunks(), Fact.COORDINATED, gm, ctx)
    assert OverlapChunks().run(gm, ctx).modified
    with pytest.raises(PassError, match="mlp: its rows travel in 2 pieces, and only whole rows"):
        run_pass(CoordinateAllToAll(), gm, ctx)
    # A manager that may order them does.
    passes: list[Pass] = [InsertAllToAll(), OverlapChunks(), CoordinateAllToAll()]
    ctx, manager, *_ = block_after(passes, expert=2, tensor=2, overlap_chunks=2)
    order = [p.name for p in manager.passes]
    assert order.index("coordinate-all-to-all") < order.index("overlap-chunks")
    assert {Fact.COORDINATED, Fact.OVERLAPPED} <= manager.facts


def test_a_pass_that_does_nothing_provides_nothing():
    ctx, gm, _ = stage(InsertAllToAll())
    message = "idle provides 'coordinated', which does not hold after it: mlp: each of 2 tensor"
    with pytest.raises(PassError, match=message):
        run_pass(_Idle(), gm, ctx)


class _Idle:
    name = "idle"
    requires = frozenset({Fact.DISPATCHED})
    provides: frozenset[str] = frozenset({Fact.COORDINATED})

    def run(self, gm: Any, ctx: PlanContext) -> PassResult:
        return PassResult(gm, False)


def test_overlapped():
    ctx, gm, _ = stage(InsertAllToAll(), CoordinateAllToAll(), overlap_chunks=2)
    pieces = ["mlp: its rows travel in one piece, not in 2"]
    assert problems(Fact.OVERLAPPED, gm, ctx) == pieces
    run_pass(OverlapChunks(), gm, ctx)
    assert not problems(Fact.OVERLAPPED, gm, ctx)


def test_partitioned():
    ctx, gm, _ = stage()
    assert problems(Fact.PARTITIONED, gm, ctx)
    assert assert_requires(GatherPartitions(), Fact.PARTITIONED, gm, ctx)
    assert not problems(Fact.PARTITIONED, gm, replace(ctx, mesh=None))
    run_pass(PartitionZero(), gm, ctx)
    assert not problems(Fact.PARTITIONED, gm, ctx)


def test_lowered():
    ctx, gm, _ = stage(expert=1)
    calls = ["mlp: dispatch, experts and combine are three calls"]
    assert problems(Fact.LOWERED, gm, ctx) == calls
    run_pass(LowerKernels(kernel="cpu"), gm, ctx)
    assert not problems(Fact.LOWERED, gm, ctx)
