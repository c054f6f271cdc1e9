"""overlap-chunks: rows travel in pieces, so that one is under way while another is computed.

Every piece holds an equal share of every expert's rows. Before::

    there = collectives.wait(collectives.all_to_all(leaving, ...))
    hidden = self.experts(...)
    home  = collectives.wait(collectives.all_to_all(done, ...))

After, for two pieces, in this order::

    announce both pieces
    start piece 0
    start piece 1;  wait for piece 0, run its experts, start its way back
                    wait for piece 1, run its experts, start its way back;  wait for piece 0
                                                                            wait for piece 1
    returned = torch.cat(pieces)

Source:
    Tutel (Hwang et al. 2022) section 3.2, adaptive pipelining.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from moeify import collectives, exchange
from moeify.passes.base import Fact, PassResult, PlanContext
from moeify.passes.blocks import blocks_of
from moeify.passes.exchange_nodes import node, ops


@dataclass(frozen=True, slots=True)
class OverlapChunks:
    """Cut the exchange of every block in `parallel.overlap_chunks` pieces."""

    name: ClassVar[str] = "overlap-chunks"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED, Fact.COORDINATED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.OVERLAPPED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        """Rewrite the exchanges of all blocks; 1 piece changes nothing."""
        pieces = 1 if ctx.plan is None else ctx.plan.parallel.overlap_chunks
        changed = False
        for _, block in blocks_of(gm) if pieces > 1 else ():
            graph = block.graph
            wires = graph.find_nodes(op="call_function", target=ops.wire)
            if not wires or graph.find_nodes(op="call_function", target=exchange.pieces):
                continue
            _cut(graph, wires[0], pieces)
            graph.lint()
            block.recompile()
            changed = True
        return PassResult(gm, changed)


def _cut(graph: fx.Graph, wire: fx.Node, pieces: int) -> None:
    parts = wire.args[3]
    assert isinstance(parts, int)
    wire.update_arg(3, parts * pieces)
    for each in graph.find_nodes(op="call_function", target=exchange.wire_capacity):
        each.update_arg(1, parts * pieces)
    order = next(user for user in wire.users if user.args[1] == 0)
    rows = next(user for user in order.users if user.target == ops.dispatch)
    y = next(user for user in order.users if user.target == ops.combine)
    last = y.args[0]
    assert isinstance(last, fx.Node)
    region = _between(graph, rows, wire, y)
    there, home = (n for n in region if n.target is collectives.wait and _has_rows(n))
    first, *stages = _stages(region, there, home)
    with graph.inserting_before(y):
        cut = node(graph, exchange.pieces, (rows, pieces), "pieces")
        copies: list[dict[fx.Node, fx.Node]] = []
        for piece in range(pieces):
            own = node(graph, operator.getitem, (cut, piece), f"piece_{piece}")
            copies.append({rows: own})
        for piece, known in enumerate(copies):  # small, and a group is a queue: before any rows
            _copy(graph, first, known, piece * parts, wire)
        for step in range(pieces + len(stages) - 1):
            for depth, stage in enumerate(stages):
                piece = step - depth
                if 0 <= piece < pieces:
                    _copy(graph, stage, copies[piece], piece * parts, wire)
        whole = graph.call_function(torch.cat, ([known[last] for known in copies],))
        whole._rename("whole_rows")
    y.replace_input_with(last, whole)
    for dead in reversed(region):
        graph.erase_node(dead)


def _has_rows(wait: fx.Node) -> bool:
    """Tell whether rows are waited for, whose splits are nodes, and not the counts before them."""
    (started,) = wait.all_input_nodes
    return isinstance(started.args[1], fx.Node)


def _between(graph: fx.Graph, rows: fx.Node, wire: fx.Node, y: fx.Node) -> list[fx.Node]:
    """Return the nodes that read the rows or their counts, up to `y`, in order."""
    counts = {user for user in wire.users if user.args[1] == 2}
    reached: dict[fx.Node, None] = {}
    for each in graph.nodes:
        if each is y:
            break
        if any(
            source is rows or source in counts or source in reached
            for source in each.all_input_nodes
        ):
            reached[each] = None
    return list(reached)


def _stages(region: list[fx.Node], there: fx.Node, home: fx.Node) -> list[list[fx.Node]]:
    """Cut a region where it waits: announcing, sending, computing, coming home."""
    depth: dict[fx.Node, int] = {}
    for each in region:
        own = {there: 2, home: 3}.get(each, int(each.target is exchange.cut))
        depth[each] = max([own, *(depth.get(source, 0) for source in each.all_input_nodes)])
    return [[n for n in region if depth[n] == stage] for stage in range(4)]


def _copy(
    graph: fx.Graph, stage: list[fx.Node], known: dict[fx.Node, fx.Node], shift: int, wire: fx.Node
) -> None:
    for old in stage:
        new = graph.node_copy(old, lambda source: known.get(source, source))
        counts: Any = old.args[0] if old.args else None
        if old.target is operator.getitem and counts in wire.users and counts.args[1] == 2:
            new.update_arg(1, old.args[1] + shift)  # type: ignore[operator]
        known[old] = new
