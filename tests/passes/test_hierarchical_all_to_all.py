"""hierarchical-all-to-all: before and after, when it stays away, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeify.distributed import collectives, exchange
from moeify.errors import PassError, PlanError
from moeify.passes.hierarchical_all_to_all import HierarchicalAllToAll
from moeify.passes.infra.base import Fact
from moeify.passes.infra.printer import print_graph
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.slice_experts import SliceExperts
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import alone_after, block_after, plan_of, show_block

STAGED = {"expert": 4, "all_to_all": "hierarchical"}
PASSES = [InsertAllToAll(), HierarchicalAllToAll()]


def test_golden(golden):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], **STAGED)
        text = before_and_after(HierarchicalAllToAll(), gm, ctx, show_block)
        golden(text, "hierarchical_all_to_all.txt")


def test_each_piece_travels_in_two_stages():
    with fake_world(4, 2):
        passes = [InsertAllToAll(), OverlapChunks(), HierarchicalAllToAll()]
        ctx, _, gm, block = block_after(passes, overlap_chunks=3, **STAGED)
        assert len(_calls(block, exchange.staged_splits)) == 3
        assert len(_calls(block, collectives.all_to_all)) == 3 * 6  # counts, rows, results
        assert not _calls(block, exchange.splits)
        assert_untouched(HierarchicalAllToAll(), gm, ctx)


def test_what_surrounds_the_experts_stays():
    with fake_world(8, 4):
        passes = [InsertAllToAll(), SliceExperts(), HierarchicalAllToAll()]
        parallel = STAGED | {"tensor": 2, "experts_in_tp": "slice"}
        *_, block = block_after(passes, world=8, node=4, **parallel)
        (experts,) = block.graph.find_nodes(op="call_module", target="experts")
        assert experts.args[0].target is collectives.copy_to_slices
        assert [user.target for user in experts.users] == [collectives.sum_of_slices]


def _calls(block, target):
    return block.graph.find_nodes(op="call_function", target=target)


def test_a_second_run_changes_nothing():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], **STAGED)
        assert_idempotent(HierarchicalAllToAll(), gm, ctx)


@pytest.mark.parametrize("form", ["flat", "allgather"])
def test_other_forms_stay_as_they_are(form):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], expert=4, all_to_all=form)
        assert_untouched(HierarchicalAllToAll(), gm, ctx)


def test_stages_need_several_nodes():
    with fake_world(4, 4), pytest.raises(PlanError, match="LOCAL_WORLD_SIZE"):
        block_after(PASSES, node=4, **STAGED)


def test_gathered_tokens_are_refused():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([InsertAllToAll()], expert=4, all_to_all="allgather")
        before = print_graph(block)
        with pytest.raises(PassError, match="mlp: its rows travel in no all-to-all"):
            run_pass(HierarchicalAllToAll(), gm, replace(ctx, plan=plan_of(**STAGED)))
        assert print_graph(block) == before


def test_without_ranks_nothing_changes():
    ctx, _, gm, _ = alone_after([])
    assert_untouched(HierarchicalAllToAll(), gm, ctx)


def test_contract():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], **STAGED)
        message = assert_requires(HierarchicalAllToAll(), Fact.DISPATCHED, gm, ctx)
        assert "mlp: its tokens reach only the experts of this rank" in message
        ctx, _, gm, _ = block_after([InsertAllToAll()], overlap_chunks=2, **STAGED)
        message = assert_requires(HierarchicalAllToAll(), Fact.OVERLAPPED, gm, ctx)
        assert "mlp: its rows travel in one piece, not in 2" in message
