"""Reading an exchange from a block's graph: its layout, its rows, and their round trips.

`Exchange` is what passes match before they rewrite one; `RoundTrip` is one way there and back, of
which an exchange in pieces has several. A graph that has an exchange of another shape than these
is an error with the node where it differs: no pass may take it for a graph without one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from moeify.distributed import collectives, exchange
from moeify.errors import PassError
from moeify.passes.rewrite.nodes import calls, ops


@dataclass(frozen=True, slots=True)
class RoundTrip:
    """Rows that go to the ranks of their experts and return, in one all-to-all each way."""

    own_counts: fx.Node  # rows for each expert, [E]
    send_counts: fx.Node  # what is announced to each rank, [N, L + 1]
    recv_counts: fx.Node  # what each rank announced to this one, once waited for
    splits: fx.Node  # rows to and from each rank: its two results follow
    send_splits: fx.Node
    recv_splits: fx.Node
    send_rows: fx.Node
    recv_rows: fx.Node  # from all ranks, once waited for
    results: fx.Node  # what the experts made of them, in the same order
    returned: fx.Node  # the results of the rows that left, once waited for

    @classmethod
    def of(cls, own_counts: fx.Node, path: str) -> RoundTrip:
        """Follow a round trip from the counts that it announces."""
        send_counts = _user(own_counts, exchange.send_counts, path)
        recv_counts = _arrived(send_counts, path)
        counts = _user(recv_counts, ops.check_counts, path)
        splits = _user(counts, exchange.splits, path, at=1)
        send_splits, recv_splits = (_item(splits, i, path) for i in (0, 1))
        send_rows = _user(send_splits, exchange.cut, path, at=1)
        back = _user(send_splits, collectives.all_to_all, path, at=1)
        return cls(
            own_counts=own_counts,
            send_counts=send_counts,
            recv_counts=recv_counts,
            splits=splits,
            send_splits=send_splits,
            recv_splits=recv_splits,
            send_rows=send_rows,
            recv_rows=_arrived(send_rows, path),
            results=back.all_input_nodes[0],
            returned=_user(back, collectives.wait, path),
        )

    @property
    def graph(self) -> fx.Graph:
        return self.returned.graph

    @property
    def counts(self) -> Any:
        """The checked counts, [N, L]."""
        return self.splits.args[1]

    @property
    def capacity(self) -> Any:
        """Rows of each expert in an even layout, or -1."""
        return self.splits.args[2]

    def replace(
        self,
        *,
        recv_counts: fx.Node,
        send_splits: fx.Node,
        recv_rows: fx.Node,
        returned: fx.Node,
    ) -> None:
        """Let other nodes carry the rows; what is between arrival and `results` stays."""
        self.recv_counts.replace_all_uses_with(recv_counts)
        self.send_splits.replace_all_uses_with(send_splits)
        self.recv_rows.replace_all_uses_with(recv_rows)
        self.returned.replace_all_uses_with(returned)
        self.graph.eliminate_dead_code()


@dataclass(frozen=True, slots=True)
class Exchange:
    """The exchange around a block's experts."""

    path: str
    layout: fx.Node  # the send layout of the routed rows, in `parts` equal parts
    part_counts: fx.Node  # rows for each expert in each part, [P, E]
    capacity: fx.Node  # rows of each expert in one part of an even layout, or -1
    rows: fx.Node  # in that layout
    result: fx.Node  # the tokens that become of them

    @classmethod
    def find(cls, graph: fx.Graph, path: str) -> Exchange | None:
        """Return the exchange in the graph of the block at `path`, or None if there is none."""
        layouts = calls(graph, ops.send_layout)
        if not layouts:
            return None
        layout = _only(layouts, f"{path}: send layouts in the graph")
        order = _item(layout, 0, path)
        return cls(
            path=path,
            layout=layout,
            part_counts=_item(layout, 2, path),
            capacity=_only(calls(graph, exchange.send_capacity), f"{path}: send capacities"),
            rows=_user(order, ops.dispatch, path, at=1),
            result=_user(order, ops.combine, path, at=2),
        )

    @property
    def graph(self) -> fx.Graph:
        return self.layout.graph

    @property
    def parts(self) -> int:
        """In how many equal parts the rows are laid out: tensor ranks times pieces."""
        parts = self.layout.args[3]
        assert isinstance(parts, int)
        return parts

    @property
    def own_counts(self) -> list[fx.Node]:
        """Rows for each expert in the parts that this rank sends, one node for each piece."""
        return list(self.part_counts.users)

    @property
    def pieces(self) -> int:
        """In how many pieces this rank's rows travel."""
        return len(self.own_counts)

    @property
    def coordinated(self) -> bool:
        """The ranks of a tensor group share out the rows."""
        return bool(calls(self.graph, collectives.share))

    @property
    def staged(self) -> bool:
        """Rows travel in two stages."""
        return bool(calls(self.graph, exchange.staged_splits))

    def trips(self) -> list[RoundTrip]:
        """Return the round trips of the rows, one for each piece."""
        return [RoundTrip.of(counts, self.path) for counts in self.own_counts]

    def lay_out(self, parts: int) -> None:
        """Lay the rows out in another number of parts."""
        self.layout.update_arg(3, parts)
        self.capacity.update_arg(1, parts)

    def refuse(self, reason: str) -> PassError:
        """Return the error of a pass that cannot rewrite this exchange."""
        return PassError(f"{self.path}: {reason}")


def _only(found: Sequence[fx.Node], what: str) -> fx.Node:
    if len(found) != 1:
        raise PassError(
            f"{what}: {len(found)}, not 1: another pass has changed the exchange; run it after "
            "the passes that rewrite exchanges"
        )
    return found[0]


def _user(source: fx.Node, target: Callable[..., Any], path: str, at: int = 0) -> fx.Node:
    """Return the one node that calls `target` with `source` as argument `at`."""
    found = [u for u in source.users if u.target is target and u.args[at] is source]
    return _only(found, f"{path}: calls of {_name(target)} with {source.name}")


def _item(source: fx.Node, index: int, path: str) -> fx.Node:
    found = [u for u in source.users if u.target is operator.getitem and u.args[1] == index]
    return _only(found, f"{path}: reads of {source.name}[{index}]")


def _arrived(sent: fx.Node, path: str) -> fx.Node:
    """Return the wait for the all-to-all that sends a node."""
    return _user(_user(sent, collectives.all_to_all, path), collectives.wait, path)


def _name(target: Callable[..., Any]) -> str:
    return getattr(target, "__name__", str(target))
