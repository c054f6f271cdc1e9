"""coordinate-all-to-all: the ranks of a tensor group share out the rows that they all hold.

Behind a sliced layer every rank of its tensor group has the same tokens. Without coordination each
sends all of them; with it each sends 1/tp of every expert's rows through the all-to-all of its own
place in the group, and an all-gather within the group puts the results together. The all-to-all
shrinks from O(p) to O(p/L), and the expert gradients count each token once.

Before::

    wire   = torch.ops.moeify.wire(slots, offsets, capacity, 1)
    packed = torch.ops.moeify.dispatch(tokens, wire_order, wire_slots)
    ...                                                     packed leaves and returns
    result = torch.ops.moeify.combine(returned, weights, wire_order, wire_slots)

After::

    wire   = torch.ops.moeify.wire(slots, offsets, capacity, 2)
    packed = torch.ops.moeify.dispatch(tokens, wire_order, wire_slots)
    part   = collectives.share(packed, 0, 2, 'tp', ...)
    ...                                                     part leaves and returns
    whole  = collectives.unshare(returned, 0, 2, 'tp', ...)
    result = torch.ops.moeify.combine(whole, weights, wire_order, wire_slots)

Source:
    DeepSpeed-MoE (Rajbhandari et al. 2022) section 5.3, parallelism coordinated communication.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify import collectives, exchange
from moeify.mesh import World
from moeify.passes.base import Fact, PassResult, PlanContext
from moeify.passes.blocks import blocks_of
from moeify.passes.exchange_nodes import Group, node, ops

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class CoordinateAllToAll:
    """Let each rank of a tensor group send 1/tp of the rows, where experts are not sliced."""

    name: ClassVar[str] = "coordinate-all-to-all"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.COORDINATED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        """Rewrite the exchanges of all blocks."""
        world: World | None = ctx.mesh
        if world is None or ctx.plan is None or world.layout.tensor == 1:
            return PassResult(gm, False)
        asked = ctx.plan.parallel.coordinated
        if asked is False or world.layout.etp > 1:
            return PassResult(gm, False)
        changed = False
        for path, block in blocks_of(gm):
            wires = block.graph.find_nodes(op="call_function", target=ops.wire)
            for wire in [w for w in wires if w.args[3] == 1]:
                group = Group.of(world.dense, "tp", world.rank)
                _coordinate(block.graph, wire, group, path)
                log.info("%s: each of %d tensor ranks sends its share", path, group.size)
                changed = True
            block.graph.lint()
            block.recompile()
        return PassResult(gm, changed)


def _coordinate(graph: fx.Graph, wire: fx.Node, group: Group, path: str) -> None:
    parts = group.size
    wire.update_arg(3, parts)
    for counts in [user for user in wire.users if user.args[1] == 2]:
        for announced in list(counts.users):
            announced.update_arg(1, group.place)
    for each in graph.find_nodes(op="call_function", target=exchange.wire_capacity):
        each.update_arg(1, parts)
    order = next(user for user in wire.users if user.args[1] == 0)
    rows = next(user for user in order.users if user.target == ops.dispatch)
    y = next(user for user in order.users if user.target == ops.combine)
    where = f"{path}: rows of a tensor group"
    leaving = list(rows.users)
    with graph.inserting_after(rows):
        args = (rows, group.place, parts, group.name, where)
        part = node(graph, collectives.share, args, "part")
    for user in leaving:
        user.replace_input_with(rows, part)
    returned = y.args[0]
    assert isinstance(returned, fx.Node)
    with graph.inserting_before(y):
        args = (returned, group.place, parts, group.name, where)
        whole = node(graph, collectives.unshare, args, "whole")
    y.replace_input_with(returned, whole)
