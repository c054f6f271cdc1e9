"""The nodes of one exchange: announce, check, send, sort, run, send back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx

from moeify import collectives, exchange
from moeify.errors import PassError
from moeify.kernels import wire as _wire  # noqa: F401  registers the ops

ops = torch.ops.moeify


def node(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], name: str) -> fx.Node:
    """Add a call at the insertion point, named `name` or `name_1`, ..."""
    made = graph.call_function(target, args)
    made._rename(name)
    if isinstance(target, FunctionType):
        made.meta["is_wrapped"] = True  # unpickling traces the code again, and not into this
    return made


@dataclass(frozen=True, slots=True)
class Middle:
    """The three nodes of a block that a rewrite replaces."""

    rows: fx.Node
    experts: fx.Node
    combine: fx.Node

    @classmethod
    def of(cls, graph: fx.Graph, path: str) -> Middle:
        """Find them.

        Raises:
            PassError: Another pass has changed them.
        """
        for call in graph.find_nodes(op="call_module", target="experts"):
            rows, users = call.args[0], list(call.users)
            if (
                isinstance(rows, fx.Node)
                and rows.target == ops.dispatch
                and len(users) == 1
                and users[0].target == ops.combine
            ):
                return cls(rows, call, users[0])
        raise PassError(
            f"{path}: no dispatch, experts, combine to put an exchange around: run passes that "
            "change them after it (require the fact 'dispatched')"
        )


@dataclass(frozen=True, slots=True)
class Group:
    """A process group as graphs know it.

    Attributes:
        name: Its name.
        ranks: Its global ranks, in order.
        rank: This rank, globally.
    """

    name: str
    ranks: tuple[int, ...]
    rank: int

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


def send(
    graph: fx.Graph, rows: Any, receive: Any, out: Any, group: str, where: str, name: str
) -> fx.Node:
    """Add an all-to-all and the wait for it; return the latter."""
    started = node(
        graph, collectives.all_to_all, (rows, receive, out, group, where), f"{name}_sent"
    )
    return node(graph, collectives.wait, (started, where), name)


def round_trip(
    graph: fx.Graph,
    group: Group,
    path: str,
    rows: fx.Node,
    counts: fx.Node,
    capacity: fx.Node,
) -> fx.Node:
    """Add everything between the rows that leave and the rows that come home.

    Args:
        graph: With its insertion point.
        group: The ranks that share the experts.
        path: The block, for messages.
        rows: [R, D] on the wire.
        counts: [E] int64, rows for each expert.
        capacity: Rows of each expert in an even layout, or -1.

    Returns:
        The node of the rows that came home, [R, D].
    """
    to, back = f"{path}: tokens to experts", f"{path}: tokens from experts"
    said = node(graph, exchange.notice, (counts, capacity, group.size), "notice")
    ones = [1] * group.size
    heard = send(graph, said, ones, ones, group.name, f"{path}: counts", "heard")
    checked = node(
        graph,
        ops.check_counts,
        (heard, capacity, path, list(group.ranks), group.rank),
        "counts",
    )
    both = node(graph, exchange.splits, (said, checked, capacity), "splits")
    out = node(graph, operator.getitem, (both, 0), "send")
    receive = node(graph, operator.getitem, (both, 1), "receive")
    leaving = node(graph, exchange.cut, (rows, out), "leaving")
    there = send(graph, leaving, receive, out, group.name, to, "there")
    size = node(graph, exchange.rows_of, (there,), "arrived")
    landed = node(graph, ops.arrivals, (checked, size, capacity), "landed")
    order, slots, offsets = (
        node(graph, operator.getitem, (landed, i), f"landed_{name}")
        for i, name in enumerate(("order", "slots", "offsets"))
    )
    mine = node(graph, ops.dispatch, (there, order, slots), "mine")
    hidden = graph.call_module("experts", (mine, offsets))
    hidden._rename("computed")
    done = node(graph, ops.combine, (hidden, None, order, slots), "done")
    home = send(graph, done, out, receive, group.name, back, "home")
    return node(graph, exchange.padded, (home, rows), "returned")
