"""Costs of an exchange against numbers worked out by hand, and what is chosen from them."""

from __future__ import annotations

import pytest

from moeify.distributed.cost_model import (
    Topology,
    allgather,
    choose,
    coordinated,
    flat,
    hierarchical,
    local_ranks,
)

ROUND = Topology(
    world=64,
    node=8,
    node_bandwidth=100e9,
    node_latency=1e-6,
    network_bandwidth=10e9,
    network_latency=10e-6,
)
"""A machine with round numbers."""


def test_graph_has_a_vertex_per_rank_and_node_and_one_fabric():
    topology = Topology(world=20, node=8)
    kinds = [kind for kind, _ in topology.graph]
    assert {kind: kinds.count(kind) for kind in kinds} == {"rank": 20, "node": 3, "fabric": 1}
    assert topology.graph.edges[("node", 2), ("fabric", 0)]["bandwidth"] == 50e9
    assert (topology.path(0, 7).latency, topology.path(0, 7).across) == (2e-6, False)
    assert (topology.path(3, 19).latency, topology.path(3, 19).across) == (10e-6, True)


@pytest.mark.parametrize(
    "options",
    [{"node": 0}, {"node": 9}, {"network_bandwidth": 0}, {"node_latency": 1e-3}],
    ids=str,
)
def test_impossible_machines_are_refused(options):
    with pytest.raises(ValueError, match=r"node|bandwidths"):
        Topology(**{"world": 8, "node": 8, **options})


def test_flat():
    cost = flat(range(64), 64_000, ROUND)
    assert (cost.hops, cost.node_bytes, cost.network_bytes) == (63, 7_000, 56_000)
    assert cost.bytes == 63_000
    assert cost.seconds == pytest.approx(7 * 1e-6 + 56 * 10e-6 + 56_000 / 10e9)


def test_flat_within_a_node_is_bound_by_its_links():
    cost = flat(range(8), 8_000, ROUND)
    assert (cost.hops, cost.node_bytes, cost.network_bytes) == (7, 7_000, 0)
    assert cost.seconds == pytest.approx(7 * 1e-6 + 7_000 / 100e9)


def test_hierarchical_is_two_exchanges_of_everything():
    cost = hierarchical(range(64), 64_000, ROUND)
    assert (cost.hops, cost.node_bytes, cost.network_bytes) == (7 + 7, 56_000, 56_000)
    seconds = 7 * 1e-6 + 56_000 / 100e9 + 7 * 10e-6 + 56_000 / 10e9
    assert cost.seconds == pytest.approx(seconds)


@pytest.mark.parametrize("ranks", [[0, 1, 8], [0, 8, 1, 9]], ids=str)
def test_hierarchical_needs_equal_nodes_side_by_side(ranks):
    assert local_ranks(ranks, 8) == 0
    with pytest.raises(ValueError, match="equally many"):
        hierarchical(ranks, 1, ROUND)


def test_allgather_sends_each_token_once_and_doubles():
    cost = allgather(range(16), 1_000, ROUND, top_k=2)
    assert (cost.hops, cost.node_bytes, cost.network_bytes) == (15, 7 * 500, 8 * 500)
    assert cost.seconds == pytest.approx(3 * 1e-6 + 10e-6 + 4_000 / 10e9)


def test_allgather_of_odd_groups_loses_nothing():
    assert allgather(range(6), 100, ROUND).bytes == 5 * 100
    assert allgather(range(1), 100, ROUND).bytes == 0


def test_coordinated_is_an_exchange_of_a_share_and_a_gather():
    cost = coordinated(range(64), 64_000, ROUND, tensor=4)
    exchange, gather = flat(range(0, 64, 4), 16_000, ROUND), allgather(range(4), 16_000, ROUND)
    assert cost == exchange + gather
    assert cost.hops == (64 // 4 - 1) + (4 - 1)


def test_uneven_groups_count_the_rank_with_most_remote_peers():
    cost = flat([0, 1, 2, 8], 4_000, ROUND)
    assert (cost.node_bytes, cost.network_bytes) == (0, 3_000)


@pytest.mark.parametrize(
    ("ranks", "size", "kind"),
    [
        (range(8), 10_000_000, "flat"),
        (range(64), 1_000_000, "hierarchical"),
        (range(64), 1_000_000_000, "flat"),
        (range(64), 1_000, "allgather"),
        (range(0, 64, 8), 1_000_000, "flat"),  # one rank per node: nothing to do within
        (range(1), 1_000, "flat"),
    ],
    ids=["one node", "small", "large", "tiny", "one per node", "alone"],
)
def test_choice(ranks, size, kind):
    choice = choose(ranks, 8, size, top_k=1)
    assert choice.kind == kind
    assert choice.why.startswith(f"{kind}: ")
    assert choice.seconds[kind] == min(choice.seconds.values())


def test_hierarchical_is_not_offered_without_equal_nodes():
    assert set(choose([0, 1, 8], 8, 1_000, top_k=1).seconds) == {"flat", "allgather"}
    assert set(choose(range(8), 8, 1_000, top_k=1).seconds) == {"flat", "allgather"}


def test_choice_follows_the_machine_and_gives_reasons():
    slow = Topology(world=64, node=8, network_latency=2e-6)
    fast = choose(range(64), 8, 100_000_000, top_k=1)
    assert fast.kind == "hierarchical"
    other = choose(range(64), 8, 100_000_000, top_k=1, topology=slow)
    assert other.kind == "flat"
    assert "64 ranks on 8 nodes, 100,000,000 bytes per rank" in other.why
    assert "assumed 450 GB/s" in other.why


def test_more_experts_per_token_favour_the_allgather():
    few, many = (choose(range(8), 8, 2_000_000, top_k=k) for k in (1, 8))
    assert (few.kind, many.kind) == ("flat", "allgather")
