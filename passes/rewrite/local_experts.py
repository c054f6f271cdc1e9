"""Dispatch, experts and combine of one rank, as replace-mlps writes them into a block."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx

from moeify.errors import PassError
from moeify.kernels import route
from moeify.passes.rewrite.nodes import add_node, ops


@dataclass(frozen=True, slots=True)
class LocalExperts:
    """The three calls that a rewrite fuses, or puts an exchange around."""

    dispatch: fx.Node
    experts: fx.Node
    combine: fx.Node

    @classmethod
    def match(cls, call: fx.Node) -> LocalExperts | None:
        """Return what surrounds a call of experts; None if another pass has changed it."""
        rows, users = call.args[0], list(call.users)
        if not isinstance(rows, fx.Node) or rows.target != ops.dispatch or len(rows.users) != 1:
            return None
        if len(users) != 1 or users[0].target != ops.combine or users[0].args[0] is not call:
            return None
        if rows.args[1:] != users[0].args[2:]:  # rows return in another order
            return None
        return cls(rows, call, users[0])

    @classmethod
    def of(cls, graph: fx.Graph, path: str) -> LocalExperts:
        """Find them in the graph of the block at `path`."""
        for call in graph.find_nodes(op="call_module", target="experts"):
            if (found := cls.match(call)) is not None:
                return found
        raise PassError(
            f"{path}: no dispatch, experts, combine to put an exchange around: run passes that "
            "change them after it (require the fact 'dispatched')"
        )

    @property
    def tokens(self) -> Any:
        """What is dispatched, [T, D]."""
        return self.dispatch.args[0]

    @property
    def order(self) -> Any:
        """The route of each row, [N]."""
        return self.dispatch.args[1]

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
        return add_node(self.combine.graph, operator.getitem, index, "capacity")

    def replace(self, result: fx.Node) -> None:
        """Let `result` take their place."""
        self.combine.replace_all_uses_with(result)
        for dead in (self.combine, self.experts, self.dispatch):
            dead.graph.erase_node(dead)
