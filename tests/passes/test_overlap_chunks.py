"""overlap-chunks: before and after, when it stays away, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeify.distributed import collectives
from moeify.errors import PassError, PassOrderError
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.hierarchical_all_to_all import HierarchicalAllToAll
from moeify.passes.infra.printer import print_graph
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.rewrite.exchange_view import Exchange
from moeify.passes.testing import run_pass
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import assert_unchanged, block_after, text_of

PASSES = [InsertAllToAll(), OverlapChunks()]


def test_golden(golden):
    with fake_world(4, 2):
        *_, block = block_after([InsertAllToAll()], expert=4, overlap_chunks=2)
        golden(text_of(block), "insert_all_to_all.txt")
        *_, block = block_after(PASSES, expert=4, overlap_chunks=2)
        golden(text_of(block), "overlap_chunks.txt")


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
        ctx, _, gm, _ = block_after(PASSES, expert=4, overlap_chunks=2)
        assert_unchanged(OverlapChunks(), gm, ctx)


@pytest.mark.parametrize(
    "parallel",
    [{}, {"overlap_chunks": 1}, {"overlap_chunks": 2, "all_to_all": "allgather"}],
    ids=["not asked for", "one piece", "gathered tokens"],
)
def test_nothing_to_cut(parallel):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], expert=4, **parallel)
        assert_unchanged(OverlapChunks(), gm, ctx)


def test_two_stages_are_refused():
    with fake_world(4, 2):
        passes = [InsertAllToAll(), HierarchicalAllToAll()]
        parallel = {"overlap_chunks": 2, "all_to_all": "hierarchical"}
        ctx, _, gm, block = block_after(passes, expert=4, **parallel)
        before = print_graph(block)
        with pytest.raises(PassError, match=r"mlp: its rows travel in two stages, .* before"):
            OverlapChunks().run(gm, ctx)
        assert print_graph(block) == before


def test_contract():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], expert=4, overlap_chunks=2)
        with pytest.raises(PassOrderError, match="dispatched"):
            run_pass(OverlapChunks(), gm, replace(ctx, facts=frozenset()))
