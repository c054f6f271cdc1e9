"""overlap-chunks: rows travel in pieces, so that one is under way while another is computed.

Every piece holds an equal share of every expert's rows. Before::

    recv_rows = collectives.wait(collectives.all_to_all(send_rows, ...))
    computed  = self.experts(...)
    returned  = collectives.wait(collectives.all_to_all(results, ...))

After, for two pieces, in this order::

    announce both pieces
    start piece 0
    start piece 1;  wait for piece 0, run its experts, start its way back
                    wait for piece 1, run its experts, start its way back;  wait for piece 0
                                                                            wait for piece 1
    whole_rows = torch.cat(pieces)

Source:
    Tutel (Hwang et al. 2022) section 3.2, adaptive pipelining.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moeify.distributed import exchange
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of
from moeify.passes.rewrite.exchange_view import Exchange, RoundTrip
from moeify.passes.rewrite.nodes import add_node


@dataclass(frozen=True, slots=True)
class OverlapChunks:
    """Cut the exchange of every block in `parallel.overlap_chunks` pieces."""

    name: ClassVar[str] = "overlap-chunks"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED, Fact.COORDINATED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.OVERLAPPED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        pieces = 1 if ctx.plan is None else ctx.plan.parallel.overlap_chunks
        changed = False
        for path, block in blocks_of(gm) if pieces > 1 else ():
            found = Exchange.find(block.graph, path)
            if found is None or found.pieces > 1:
                continue
            _check(found)
            _rewrite(found, pieces)
            changed = True
        return PassResult(gm, changed)


def _check(found: Exchange) -> None:
    if found.staged:
        raise found.refuse(
            "its rows travel in two stages, and only an exchange in one can be cut into pieces; "
            "run overlap-chunks before it is split over nodes"
        )


def _rewrite(found: Exchange, pieces: int) -> None:
    graph, parts = found.graph, found.parts
    (trip,) = found.trips()
    announce, *steps = _steps(found, trip)
    returned, place = found.result.args[0], trip.own_counts.args[1]
    assert isinstance(returned, fx.Node)
    assert isinstance(place, int)
    found.lay_out(parts * pieces)
    with graph.inserting_before(found.result):
        cut = add_node(graph, exchange.pieces, (found.rows, pieces), "pieces")
        copies: list[dict[fx.Node, fx.Node]] = []
        for piece in range(pieces):
            own = add_node(graph, operator.getitem, (cut, piece), f"piece_{piece}")
            copies.append({found.rows: own})
        for piece, copied in enumerate(copies):  # small, and a group is a queue: before any rows
            index = (found.part_counts, place + piece * parts)
            copied[trip.own_counts] = add_node(graph, operator.getitem, index, "own_counts")
            _copy(graph, announce, copied)
        for turn in range(pieces + len(steps) - 1):
            for late, step in enumerate(steps):
                if 0 <= turn - late < pieces:
                    _copy(graph, step, copies[turn - late])
        whole = add_node(graph, torch.cat, ([copied[returned] for copied in copies],), "whole_rows")
    found.result.replace_input_with(returned, whole)
    graph.eliminate_dead_code()


def _steps(found: Exchange, trip: RoundTrip) -> list[list[fx.Node]]:
    """Cut a trip before it sends and where it waits: announce, start, run, finish."""
    begins = {trip.send_rows: 1, trip.recv_rows: 2, trip.returned: 3}
    sources = (found.rows, trip.own_counts)
    step = dict.fromkeys(sources, 0)
    for each in found.graph.nodes:
        if each is found.result:
            break
        earlier = [step[source] for source in each.all_input_nodes if source in step]
        if earlier:
            step[each] = max(begins.get(each, 0), *earlier)
    return [[n for n in step if step[n] == place and n not in sources] for place in range(4)]


def _copy(graph: fx.Graph, nodes: list[fx.Node], copied: dict[fx.Node, fx.Node]) -> None:
    """Copy nodes, with the copies of what they read."""
    for each in nodes:
        copied[each] = graph.node_copy(each, lambda source: copied.get(source, source))
