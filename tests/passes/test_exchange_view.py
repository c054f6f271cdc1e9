"""The typed view of an exchange: what it reads, and that another shape is an error."""

from __future__ import annotations

import pytest
import torch

from moeify.distributed import collectives, exchange
from moeify.errors import PassError
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.hierarchical_all_to_all import HierarchicalAllToAll
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.rewrite.exchange_view import Exchange
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import block_after


def view(passes, world=4, **parallel):
    *_, block = block_after([InsertAllToAll(), *passes], world=world, **parallel)
    return Exchange.find(block.graph, "mlp")


def test_a_round_trip():
    with fake_world(4, 2):
        found = view([], expert=4)
        assert (found.parts, found.pieces, found.coordinated, found.staged) == (1, 1, False, False)
        (trip,) = found.trips()
    names = {
        "own_counts": "own_counts",
        "send_counts": "send_counts",
        "recv_counts": "recv_counts",
        "splits": "splits",
        "send_splits": "send_splits",
        "recv_splits": "recv_splits",
        "send_rows": "send_rows",
        "recv_rows": "recv_rows",
        "results": "results",
        "returned": "returned",
        "counts": "counts",
        "capacity": "send_capacity",
    }
    assert {field: getattr(trip, field).name for field in names} == names
    assert (found.rows.name, found.result.name) == ("packed", "result")


def test_states():
    with fake_world(4, 2):
        cut = view([OverlapChunks()], expert=4, overlap_chunks=3)
        assert (cut.parts, cut.pieces, len(cut.trips())) == (3, 3, 3)
        shared = view([CoordinateAllToAll()], expert=2, tensor=2)
        assert (shared.parts, shared.pieces, shared.coordinated) == (2, 1, True)
        staged = view([HierarchicalAllToAll()], expert=4, all_to_all="hierarchical")
        assert staged.staged
        with pytest.raises(PassError, match="mlp: calls of all_to_all with send_counts: 0, not 1"):
            staged.trips()


def test_gathered_tokens_are_no_exchange():
    with fake_world(4, 2):
        assert view([], expert=4, all_to_all="allgather") is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("send_order", "mlp: calls of dispatch with send_order: 0, not 1"),
        ("recv_counts", "mlp: calls of check_counts with recv_counts: 0, not 1"),
        ("send_rows", "mlp: calls of all_to_all with send_rows: 0, not 1"),
    ],
)
def test_another_shape_is_an_error_that_names_the_node(name, message):
    with fake_world(4, 2):
        *_, block = block_after([InsertAllToAll()], expert=4)
    (found,) = (n for n in block.graph.nodes if n.name == name)
    with block.graph.inserting_after(found):
        clone = block.graph.call_function(torch.clone, (found,))
    found.replace_all_uses_with(clone, delete_user_cb=lambda user: user is not clone)
    with pytest.raises(PassError, match=message):
        Exchange.find(block.graph, "mlp").trips()


def test_two_exchanges_in_one_graph():
    with fake_world(4, 2):
        *_, block = block_after([InsertAllToAll()], expert=4)
    (capacity,) = block.graph.find_nodes(op="call_function", target=exchange.send_capacity)
    with block.graph.inserting_after(capacity):
        block.graph.node_copy(capacity)
    with pytest.raises(PassError, match="mlp: send capacities: 2, not 1"):
        Exchange.find(block.graph, "mlp")


def test_laid_out_anew():
    with fake_world(4, 2):
        found = view([], expert=4)
        found.lay_out(5)
        assert found.parts == found.capacity.args[1] == 5
        waits = found.graph.find_nodes(op="call_function", target=collectives.wait)
        assert len(waits) == 3
