"""Building the nodes of an exchange: announce, check, send, sort, run, send back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from moeify.distributed import allgather, collectives, exchange
from moeify.passes.rewrite.nodes import add_node, calls, items, ops


@dataclass(frozen=True, slots=True)
class Group:
    """A process group as graphs know it."""

    name: str
    ranks: tuple[int, ...]  # global, in order
    rank: int  # this one, globally

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def place(self) -> int:
        """Place of this rank in the group."""
        return self.ranks.index(self.rank)

    @classmethod
    def of(cls, mesh: Any, dimension: str, rank: int) -> Group:
        """Return this rank's group along one dimension of a device mesh."""
        part = mesh[dimension]
        group = part.get_group()
        return cls(group.group_name, tuple(part.mesh.flatten().tolist()), rank)


def has_exchange(graph: fx.Graph) -> bool:
    """Tell whether a block's graph exchanges tokens with other ranks, in either form."""
    return bool(calls(graph, collectives.all_to_all) or calls(graph, allgather.gather))


def send(
    graph: fx.Graph, rows: Any, receive: Any, out: Any, group: str, where: str, name: str
) -> fx.Node:
    """Add an all-to-all and the wait for it; return the latter."""
    args = (rows, receive, out, group, where)
    started = add_node(graph, collectives.all_to_all, args, f"{name}_started")
    return add_node(graph, collectives.wait, (started, where), name)


def round_trip(
    graph: fx.Graph, group: Group, path: str, rows: fx.Node, counts: fx.Node, capacity: fx.Node
) -> fx.Node:
    """Add all that happens between the rows that leave and the rows that return, both [R, D].

    `rows` are in the send layout; `counts`, [E] int64, are the rows for each expert; `capacity` is
    the rows of each expert in an even layout, or -1.
    """
    to, back = f"{path}: tokens to experts", f"{path}: tokens from experts"
    send_counts = add_node(
        graph, exchange.send_counts, (counts, capacity, group.size), "send_counts"
    )
    ones = [1] * group.size
    where = f"{path}: counts"
    recv_counts = send(graph, send_counts, ones, ones, group.name, where, "recv_counts")
    args = (recv_counts, capacity, path, list(group.ranks), group.rank)
    checked = add_node(graph, ops.check_counts, args, "counts")
    splits = add_node(graph, exchange.splits, (send_counts, checked, capacity), "splits")
    out, receive = items(graph, splits, "send_splits", "recv_splits")
    send_rows = add_node(graph, exchange.cut, (rows, out), "send_rows")
    recv_rows = send(graph, send_rows, receive, out, group.name, to, "recv_rows")
    total = add_node(graph, exchange.rows_of, (recv_rows,), "recv_total")
    layout = add_node(graph, ops.receive_layout, (checked, total, capacity), "recv_layout")
    order, slots, offsets = items(graph, layout, "recv_order", "recv_slots", "recv_offsets")
    by_expert = add_node(graph, ops.dispatch, (recv_rows, order, slots), "by_expert")
    hidden = add_node(graph, "experts", (by_expert, offsets), "computed")
    results = add_node(graph, ops.combine, (hidden, None, order, slots), "results")
    returned = send(graph, results, out, receive, group.name, back, "returned")
    return add_node(graph, exchange.padded, (returned, rows), "padded")
