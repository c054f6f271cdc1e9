"""overlap-chunks: before and after, when it stays away, and what it refuses."""

from __future__ import annotations

import pytest

from moeify.distributed import collectives
from moeify.errors import PassError
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.hierarchical_all_to_all import HierarchicalAllToAll
from moeify.passes.infra.base import Fact
from moeify.passes.infra.printer import print_graph
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.rewrite.exchange_view import Exchange
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import alone_after, block_after, show_block, stage


def test_golden(golden):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], expert=4, overlap_chunks=2)
        golden(before_and_after(OverlapChunks(), gm, ctx, show_block), "overlap_chunks.txt")


def test_each_piece_of_what_a_tensor_group_shares_out_has_counts_of_its_own():
    with fake_world(4, 2):
        passes = [InsertAllToAll(), CoordinateAllToAll(), OverlapChunks()]
        *_, block = block_after(passes, expert=2, tensor=2, overlap_chunks=3)
        found = Exchange.find(block.graph, "mlp")
        assert found is not None
        assert (found.parts, found.pieces) == (6, 3)
        assert [counts.args[1] for counts in found.own_counts] == [0, 2, 4]
        shares = block.graph.find_nodes(op="call_function", target=collectives.share)
        assert len(shares) == 3


def test_a_second_run_changes_nothing():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], expert=4, overlap_chunks=2)
        assert_idempotent(OverlapChunks(), gm, ctx)


@pytest.mark.parametrize(
    "parallel",
    [{}, {"overlap_chunks": 1}, {"overlap_chunks": 2, "all_to_all": "allgather"}],
    ids=["not asked for", "one piece", "gathered tokens"],
)
def test_nothing_to_cut(parallel):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], expert=4, **parallel)
        assert_untouched(OverlapChunks(), gm, ctx)


def test_without_ranks_nothing_changes():
    ctx, _, gm, _ = alone_after([])
    assert_untouched(OverlapChunks(), gm, ctx)


def test_two_stages_are_refused():
    with fake_world(4, 2):
        parallel = {"overlap_chunks": 2, "all_to_all": "hierarchical"}
        ctx, _, gm, block = block_after([InsertAllToAll()], expert=4, **parallel)
        assert HierarchicalAllToAll().run(gm, ctx).modified  # past its manager, which would refuse
        before = print_graph(block)
        with pytest.raises(PassError, match=r"mlp: its rows travel in two stages, .* before"):
            run_pass(OverlapChunks(), gm, ctx)
        assert print_graph(block) == before


def test_contract():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=4, overlap_chunks=2)
        message = assert_requires(OverlapChunks(), Fact.DISPATCHED, gm, ctx)
        assert "mlp: its tokens reach only the experts of this rank" in message
        ctx, gm, _ = stage(InsertAllToAll(), overlap_chunks=2)
        message = assert_requires(OverlapChunks(), Fact.COORDINATED, gm, ctx)
        assert "mlp: each of 2 tensor ranks sends all rows that they share" in message
