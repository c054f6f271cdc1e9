"""Building the nodes of an exchange: announce, check, send, sort, run, send back."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch
from torch import fx

from moeify.distributed import collectives, exchange
from moeify.errors import PassError
from moeify.kernels import all_to_all_layout as _layouts  # noqa: F401  registers the ops
from moeify.kernels import route

ops = torch.ops.moeify


def node(graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], name: str) -> fx.Node:
    """Add a call at the insertion point, named `name` or `name_1`, ..."""
    made = graph.call_function(target, args)
    made._rename(name)
    if isinstance(target, FunctionType):
        made.meta["is_wrapped"] = True  # unpickling traces the code again, and not into this
    return made


def items(graph: fx.Graph, source: fx.Node, *names: str) -> list[fx.Node]:
    """Add the first results of a node that returns several, one for each name."""
    return [node(graph, operator.getitem, (source, i), name) for i, name in enumerate(names)]


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """Dispatch, experts, combine on one rank: what a rewrite puts an exchange around."""

    dispatch: fx.Node
    experts: fx.Node
    combine: fx.Node

    @classmethod
    def of(cls, graph: fx.Graph, path: str) -> LocalExperts:
        """Find them in the graph of the block at `path`."""
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

    @property
    def tokens(self) -> Any:
        """What is dispatched, [T, D]."""
        return self.dispatch.args[0]

    @property
    def slots(self) -> Any:
        """The row of each route, [T, K]."""
        return self.dispatch.args[2]

    @property
    def routing(self) -> Any:
        """What the router returned."""
        return self.slots.args[0]

    @property
    def offsets(self) -> Any:
        """The end of each expert's rows, [E]."""
        return self.experts.args[1]

    @property
    def weights(self) -> Any:
        """The combine weights, [T, K]."""
        return self.combine.args[1]

    def capacity(self, splits: str) -> Any:
        """Add the rows of each expert if the plan's `splits` may be even; else return -1."""
        if splits != "auto":
            return -1
        index = (self.routing, route.CAPACITY)
        return node(self.combine.graph, operator.getitem, index, "capacity")

    def replace(self, result: fx.Node) -> None:
        """Let `result` take their place."""
        self.combine.replace_all_uses_with(result)
        for dead in (self.combine, self.experts, self.dispatch):
            dead.graph.erase_node(dead)
        result.graph.eliminate_dead_code()


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


def send(
    graph: fx.Graph, rows: Any, receive: Any, out: Any, group: str, where: str, name: str
) -> fx.Node:
    """Add an all-to-all and the wait for it; return the latter."""
    args = (rows, receive, out, group, where)
    started = node(graph, collectives.all_to_all, args, f"{name}_started")
    return node(graph, collectives.wait, (started, where), name)


def round_trip(
    graph: fx.Graph, group: Group, path: str, rows: fx.Node, counts: fx.Node, capacity: fx.Node
) -> fx.Node:
    """Add all that happens between the rows that leave and the rows that return, both [R, D].

    `rows` are in the send layout; `counts`, [E] int64, are the rows for each expert; `capacity` is
    the rows of each expert in an even layout, or -1.
    """
    to, back = f"{path}: tokens to experts", f"{path}: tokens from experts"
    send_counts = node(graph, exchange.send_counts, (counts, capacity, group.size), "send_counts")
    ones = [1] * group.size
    where = f"{path}: counts"
    recv_counts = send(graph, send_counts, ones, ones, group.name, where, "recv_counts")
    args = (recv_counts, capacity, path, list(group.ranks), group.rank)
    checked = node(graph, ops.check_counts, args, "counts")
    splits = node(graph, exchange.splits, (send_counts, checked, capacity), "splits")
    out, receive = items(graph, splits, "send_splits", "recv_splits")
    send_rows = node(graph, exchange.cut, (rows, out), "send_rows")
    recv_rows = send(graph, send_rows, receive, out, group.name, to, "recv_rows")
    total = node(graph, exchange.rows_of, (recv_rows,), "recv_total")
    layout = node(graph, ops.receive_layout, (checked, total, capacity), "recv_layout")
    order, slots, offsets = items(graph, layout, "recv_order", "recv_slots", "recv_offsets")
    by_expert = node(graph, ops.dispatch, (recv_rows, order, slots), "by_expert")
    hidden = graph.call_module("experts", (by_expert, offsets))
    hidden._rename("computed")
    results = node(graph, ops.combine, (hidden, None, order, slots), "results")
    returned = send(graph, results, out, receive, group.name, back, "returned")
    return node(graph, exchange.padded, (returned, rows), "padded")
