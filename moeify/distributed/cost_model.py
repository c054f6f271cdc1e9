"""The cost of an exchange on a machine: a graph of ranks, node switches and a fabric.

The numbers on its edges are *assumptions*, typical of today's clusters and yours to change. They
serve to choose and to rank; nothing here is a measurement. Hops are counted as in DeepSpeed-MoE:
the point-to-point steps that one rank takes, `p - 1` for a collective of p ranks.

Seconds are those of the rank with most peers on other nodes: the latencies of its messages in
sequence, plus the bytes on its busiest link over that link's bandwidth.

In all functions `ranks` is the group in its order, and `bytes_per_rank` what each rank sends to the
whole group, itself included.

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
    """The path of a message."""

    latency: float  # seconds
    across: bool  # leaves the node


@dataclass(frozen=True, slots=True)
class Topology:
    """Ranks behind node switches, and switches behind one fabric.

    Bandwidths are bytes per second and rank, latencies seconds of a message. The graph has vertices
    `("rank", i)`, `("node", n)` and `("fabric", 0)`, and `bandwidth` and `latency` on each edge.

    Example:
        >>> Topology(world=16, node=8).path(0, 8)
        Path(latency=1e-05, across=True)
    """

    world: int
    node: int  # ranks per node
    node_bandwidth: float = 450e9  # NVLink 4
    node_latency: float = 2e-6
    network_bandwidth: float = 50e9  # 400 Gb/s
    network_latency: float = 10e-6
    graph: nx.Graph[tuple[str, int]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 1 <= self.node <= self.world:
            raise ValueError(f"node: {self.node} ranks per node; it must be 1 to {self.world}")
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
        """Return the path of a message from one rank to another."""
        return self.paths(source, [target])[0]

    def paths(self, source: int, targets: Sequence[int]) -> list[Path]:
        """Return the paths of messages from one rank to several."""
        found = nx.single_source_shortest_path(self.graph, ("rank", source))
        return [self._path(found[("rank", target)]) for target in targets]

    def _path(self, vertices: Sequence[tuple[str, int]]) -> Path:
        edges = [self.graph.edges[edge] for edge in nx.utils.pairwise(vertices)]
        return Path(round(sum(edge["latency"] for edge in edges), 12), FABRIC in vertices)


@dataclass(frozen=True, slots=True)
class Cost:
    """What an exchange costs one rank."""

    hops: int  # point-to-point steps
    node_bytes: int  # sent within the node
    network_bytes: int  # sent to other nodes
    seconds: float  # estimated

    @property
    def bytes(self) -> int:
        return self.node_bytes + self.network_bytes

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of one exchange after the other."""
        return Cost(
            self.hops + other.hops,
            self.node_bytes + other.node_bytes,
            self.network_bytes + other.network_bytes,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen form of an exchange."""

    kind: str  # "flat", "hierarchical" or "allgather"
    why: str  # one sentence with the numbers
    seconds: Mapping[str, float]  # estimate for each kind that is possible


def flat(ranks: Sequence[int], bytes_per_rank: int, topology: Topology) -> Cost:
    """Count one all-to-all: a message to every other rank of the group."""
    source = _outermost(ranks, topology)
    peers = topology.paths(source, [rank for rank in ranks if rank != source])
    share = bytes_per_rank / len(ranks)
    return _cost(topology, [(path, share) for path in peers], len(peers))


def hierarchical(ranks: Sequence[int], bytes_per_rank: int, topology: Topology) -> Cost:
    """Count a hierarchical all-to-all: one within the node, then one among equal local ranks."""
    local = local_ranks(ranks, topology.node)
    if local == 0:
        raise ValueError("a hierarchical all-to-all needs equally many ranks on each node")
    within = flat(ranks[:local], bytes_per_rank, topology)
    return within + flat(ranks[::local], bytes_per_rank, topology)


def allgather(
    ranks: Sequence[int], bytes_per_rank: int, topology: Topology, *, top_k: int = 1
) -> Cost:
    """Count an all-gather of the tokens; the reduce-scatter on the way back costs the same.

    A token is sent once, whatever `top_k` is. Shards can be forwarded, so short messages need
    `ceil(log2 p)` rounds only, each twice as long as the one before and twice as far (Thakur et al.
    2005); the seconds count that, while the hops are `p - 1` as in the paper.
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

    `ranks` are all ranks, tensor ranks side by side; those hold the same rows.
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
    """Choose the form of an exchange by its estimated time; the simplest of equally fast ones.

    "hierarchical" only for a group with an equal number of ranks, more than one, on each of several
    nodes. Without a topology, a typical one with `node` ranks per node.

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
    """Return how many ranks of a group are on each of its nodes.

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
    # Every message uses the rank's own link; those to other nodes also a slower one.
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
