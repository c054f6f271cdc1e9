"""What an exchange costs on a machine: ranks, node switches and a fabric as a graph.

The numbers on its edges are *assumptions*, typical of today's clusters and yours to change. They
serve to choose and to rank; nothing here is a measurement. Hops are counted as DeepSpeed-MoE counts
them: the point-to-point steps that one rank takes, `p - 1` for a collective of p ranks.

Seconds are those of the rank that has most peers on other nodes: the latencies of its messages, one
after the other, and the bytes on its busiest link over that link's bandwidth.

Legend: p ranks of a group, G of them on each node, L tensor ranks.

Source:
    DeepSpeed-MoE (Rajbhandari et al. 2022), section 5.3: hierarchical all-to-all,
    `O(p) -> O(G + p/G)` hops for twice the volume; parallelism-coordinated communication,
    `O(p) -> O(p/L) + O(L)`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import networkx as nx

__all__ = [
    "Choice",
    "Cost",
    "Topology",
    "allgather",
    "choose",
    "coordinated",
    "flat",
    "hierarchical",
    "local_ranks",
]


FABRIC = ("fabric", 0)


@dataclass(frozen=True, slots=True)
class Path:
    """The way of a message.

    Attributes:
        latency: Seconds.
        across: Whether it leaves the node.
    """

    latency: float
    across: bool


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks behind node switches, and switches behind one fabric.

    Args:
        world: Number of ranks.
        node: Ranks per node.
        node_bandwidth: Bytes per second that each rank gets within its node (NVLink 4).
        node_latency: Seconds of a message within a node.
        network_bandwidth: Bytes per second that each rank gets between nodes (400 Gb/s).
        network_latency: Seconds of a message between nodes.

    Attributes:
        graph: Vertices `("rank", i)`, `("node", n)` and `("fabric", 0)`; an edge has `bandwidth`,
            the share of one rank when all of them use it, and `latency`.

    Example:
        >>> Topology(world=16, node=8).path(0, 8)
        Path(latency=1e-05, across=True)
    """

    world: int
    node: int
    node_bandwidth: float = 450e9
    node_latency: float = 2e-6
    network_bandwidth: float = 50e9
    network_latency: float = 10e-6
    graph: nx.Graph[tuple[str, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.node <= self.world:
            raise ValueError(f"node: {self.node} ranks per node must lie in 1 ... {self.world}")
        rates = (self.node_bandwidth, self.network_bandwidth)
        if min(rates) <= 0 or not 0 <= self.node_latency <= self.network_latency:
            raise ValueError(
                "bandwidths must be positive, and a message between nodes no faster than within"
            )
        graph: nx.Graph[tuple[str, int]] = nx.Graph()
        half, rest = self.node_latency / 2, (self.network_latency - self.node_latency) / 2
        for rank in range(self.world):
            switch = ("node", rank // self.node)
            graph.add_edge(("rank", rank), switch, bandwidth=self.node_bandwidth, latency=half)
            graph.add_edge(switch, FABRIC, bandwidth=self.network_bandwidth, latency=rest)
        object.__setattr__(self, "graph", graph)

    def path(self, source: int, target: int) -> Path:
        """Return the way of a message from one rank to another."""
        return self.paths(source, [target])[0]

    def paths(self, source: int, targets: Sequence[int]) -> list[Path]:
        """Return the ways of messages from one rank to several."""
        found = nx.single_source_shortest_path(self.graph, ("rank", source))
        return [self._path(found[("rank", target)]) for target in targets]

    def _path(self, vertices: Sequence[tuple[str, int]]) -> Path:
        edges = [self.graph.edges[edge] for edge in nx.utils.pairwise(vertices)]
        return Path(round(sum(edge["latency"] for edge in edges), 12), FABRIC in vertices)


@dataclass(frozen=True, slots=True)
class Cost:
    """What an exchange costs one rank.

    Attributes:
        hops: Point-to-point steps.
        node_bytes: Bytes sent within the node.
        network_bytes: Bytes sent to other nodes.
        seconds: Estimated time.
    """

    hops: int
    node_bytes: int
    network_bytes: int
    seconds: float

    @property
    def bytes(self) -> int:
        """All bytes sent."""
        return self.node_bytes + self.network_bytes

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of one after the other."""
        return Cost(
            self.hops + other.hops,
            self.node_bytes + other.node_bytes,
            self.network_bytes + other.network_bytes,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """How rows are to travel.

    Attributes:
        kind: "flat", "hierarchical" or "allgather".
        why: One sentence with the numbers.
        seconds: Estimate by kind that was possible.
    """

    kind: str
    why: str
    seconds: Mapping[str, float]


def flat(ranks: Sequence[int], bytes_per_rank: int, topology: Topology) -> Cost:
    """Count one all-to-all: a message to every other rank of the group.

    Args:
        ranks: The group.
        bytes_per_rank: What each rank has for all of the group, itself included.
        topology: The machine.
    """
    source = _outermost(ranks, topology)
    peers = topology.paths(source, [rank for rank in ranks if rank != source])
    share = bytes_per_rank / len(ranks)
    return _cost(topology, [(path, share) for path in peers], len(peers))


def hierarchical(ranks: Sequence[int], bytes_per_rank: int, topology: Topology) -> Cost:
    """Count a hierarchical all-to-all: one within the node, then one among equal local ranks.

    Args:
        ranks: The group, with an equal number of ranks on each of its nodes.
        bytes_per_rank: What each rank has for all of the group, itself included.
        topology: The machine.

    Raises:
        ValueError: The nodes hold different numbers of the group's ranks.
    """
    local = local_ranks(ranks, topology.node)
    if local == 0:
        raise ValueError("a hierarchical all-to-all needs equally many ranks on each node")
    within = flat(ranks[:local], bytes_per_rank, topology)
    return within + flat(ranks[::local], bytes_per_rank, topology)


def allgather(
    ranks: Sequence[int], bytes_per_rank: int, topology: Topology, *, top_k: int = 1
) -> Cost:
    """Count an all-gather of the tokens; the reduce-scatter on the way back costs the same.

    A token travels once, however many experts it has. Shards can be passed on, so short messages
    need `ceil(log2 p)` rounds only, each twice as long as the one before and twice as far (Thakur
    et al. 2005); that is what the seconds count, while the hops are `p - 1` as in the paper.

    Args:
        ranks: The group.
        bytes_per_rank: Bytes of a rank's rows, `top_k` for each token.
        topology: The machine.
        top_k: Experts per token.
    """
    count = len(ranks)
    steps = [2**i for i in range((count - 1).bit_length())]
    peers = topology.paths(ranks[0], [ranks[step] for step in steps])
    shard = bytes_per_rank / top_k
    sizes = [min(step, count - step) * shard for step in steps]
    return _cost(topology, list(zip(peers, sizes, strict=True)), count - 1)


def coordinated(
    ranks: Sequence[int], bytes_per_rank: int, topology: Topology, *, tensor: int
) -> Cost:
    """Count an all-to-all among equal tensor ranks and the all-gather among tensor ranks (PCC).

    Args:
        ranks: All ranks, tensor ranks side by side.
        bytes_per_rank: Bytes of a rank's rows, which are those of all its tensor ranks.
        topology: The machine.
        tensor: L.
    """
    share = bytes_per_rank // tensor
    gathered = allgather(ranks[:tensor], share, topology)
    return flat(ranks[::tensor], share, topology) + gathered


def choose(
    ranks: Sequence[int],
    node: int,
    bytes_per_rank: int,
    *,
    top_k: int,
    topology: Topology | None = None,
) -> Choice:
    """Choose how the rows of a group travel, by the estimated time of one exchange.

    Args:
        ranks: The group, in its order.
        node: Ranks per node.
        bytes_per_rank: Bytes of the rows that a rank has for its experts, `top_k` for each token.
        top_k: Experts per token.
        topology: The machine; a typical one with that many ranks per node if None.

    Returns:
        The fastest kind; of equals the simplest. "hierarchical" only for a group with an equal
        number of ranks, more than one, on each of several nodes.

    Example:
        >>> choose(range(64), 8, 1_000_000, top_k=2).kind
        'hierarchical'
        >>> choose(range(8), 8, 10_000_000, top_k=2).kind
        'flat'
    """
    if topology is None:
        topology = Topology(max(max(ranks) + 1, node), node)
    if len(ranks) == 1:
        return Choice("flat", "flat: one rank, nothing to exchange", {"flat": 0.0})
    costs = {"flat": flat(ranks, bytes_per_rank, topology)}
    if 1 < local_ranks(ranks, topology.node) < len(ranks):
        costs["hierarchical"] = hierarchical(ranks, bytes_per_rank, topology)
    costs["allgather"] = allgather(ranks, bytes_per_rank, topology, top_k=top_k)
    seconds = {kind: cost.seconds for kind, cost in costs.items()}
    kind = min(seconds, key=seconds.__getitem__)
    return Choice(kind, _why(kind, ranks, bytes_per_rank, costs, topology), seconds)


def local_ranks(ranks: Sequence[int], node: int) -> int:
    """Return how many ranks of a group are on each of its nodes, or 0.

    0 if that differs or the ranks of a node are not side by side in the group.
    """
    nodes = [rank // node for rank in ranks]
    counts = set(Counter(nodes).values())
    return counts.pop() if len(counts) == 1 and nodes == sorted(nodes) else 0


def _outermost(ranks: Sequence[int], topology: Topology) -> int:
    """Return the rank with most peers on other nodes."""
    beside = Counter(rank // topology.node for rank in ranks)
    return min(ranks, key=lambda rank: beside[rank // topology.node])


def _cost(topology: Topology, messages: Iterable[tuple[Path, float]], hops: int) -> Cost:
    latency = within = across = 0.0
    for path, size in messages:
        latency += path.latency
        if path.across:
            across += size
        else:
            within += size
    # every message leaves through the rank's own link, those to other nodes through a slower one
    transfer = max((within + across) / topology.node_bandwidth, across / topology.network_bandwidth)
    return Cost(hops, round(within), round(across), latency + transfer)


def _why(
    kind: str, ranks: Sequence[int], count: int, costs: Mapping[str, Cost], topology: Topology
) -> str:
    nodes = len({rank // topology.node for rank in ranks})
    others = ", ".join(f"{k} {_micro(c.seconds)}" for k, c in costs.items() if k != kind)
    where = "1 node" if nodes == 1 else f"{nodes} nodes"
    return (
        f"{kind}: {len(ranks)} ranks on {where}, {count:,} bytes per rank, estimated "
        f"{_micro(costs[kind].seconds)}; {others} (assumed {topology.node_bandwidth / 1e9:g} GB/s "
        f"within a node, {topology.network_bandwidth / 1e9:g} GB/s between nodes)"
    )


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:,.0f} us"
