"""coordinate-all-to-all: before and after, when it stays away, and what it refuses."""

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
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import alone_after, block_after, show_block, stage

TENSOR = {"expert": 2, "tensor": 2}


def test_golden(golden):
    with fake_world(4, 2):
        ctx, gm, _ = stage(InsertAllToAll())
        text = before_and_after(CoordinateAllToAll(), gm, ctx, show_block)
        golden(text, "coordinate_all_to_all.txt")


def test_a_second_run_changes_nothing():
    with fake_world(4, 2):
        ctx, gm, _ = stage(InsertAllToAll())
        assert_idempotent(CoordinateAllToAll(), gm, ctx)


def test_a_second_run_over_pieces_changes_nothing():
    """What it has shared out may be cut into pieces behind it."""
    with fake_world(4, 2):
        passes = [InsertAllToAll(), CoordinateAllToAll(), OverlapChunks()]
        ctx, gm, _ = stage(*passes, overlap_chunks=2)
        assert_untouched(CoordinateAllToAll(), gm, ctx)


@pytest.mark.parametrize(
    "parallel",
    [
        {"expert": 4},
        TENSOR | {"coordinated": False},
        TENSOR | {"experts_in_tp": "slice"},
        TENSOR | {"all_to_all": "allgather"},
    ],
    ids=["no tensor ranks", "not asked for", "sliced experts", "gathered tokens"],
)
def test_nothing_to_share_out(parallel):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], **parallel)
        assert_untouched(CoordinateAllToAll(), gm, ctx)


def test_an_exchange_in_pieces_is_refused():
    with fake_world(4, 2):
        ctx, gm, block = stage(InsertAllToAll(), overlap_chunks=2)
        assert OverlapChunks().run(gm, ctx).modified  # past its manager, which would refuse it
        before = print_graph(block)
        with pytest.raises(PassError, match=r"mlp: its rows travel in 2 pieces, .* before"):
            run_pass(CoordinateAllToAll(), gm, ctx)
        assert print_graph(block) == before


def test_an_exchange_in_two_stages():
    """Stages stay as they are: what is shared out are the rows that leave and return."""
    with fake_world(8, 4):
        passes = [InsertAllToAll(), HierarchicalAllToAll()]
        parallel = {"expert": 4, "tensor": 2, "all_to_all": "hierarchical"}
        *_, stages_first = block_after([*passes, CoordinateAllToAll()], world=8, node=4, **parallel)
        passes.insert(1, CoordinateAllToAll())
        *_, stages_last = block_after(passes, world=8, node=4, **parallel)
        assert _targets(stages_first) == _targets(stages_last)
        (part,) = stages_first.graph.find_nodes(op="call_function", target=collectives.share)
        assert part.args[0].name == "packed"


def _targets(block):
    return sorted(str(n.target) for n in block.graph.nodes)


def test_without_ranks_nothing_changes():
    ctx, _, gm, _ = alone_after([])
    assert_untouched(CoordinateAllToAll(), gm, ctx)


def test_contract():
    with fake_world(4, 2):
        ctx, gm, _ = stage()
        message = assert_requires(CoordinateAllToAll(), Fact.DISPATCHED, gm, ctx)
        assert "mlp: its tokens reach only the experts of this rank" in message
