"""coordinate-all-to-all: the ranks of a tensor group divide the rows that they all hold.

Behind a sliced layer every rank of its tensor group has the same tokens. Without coordination each
sends all of them; with it each sends 1/tp of every expert's rows through the all-to-all of its own
place in the group, and an all-gather within the group puts the results together. The all-to-all
shrinks from O(p) to O(p/L), and the expert gradients count each token once.

Before::

    send_layout = torch.ops.moeify.send_layout(slots, offsets, capacity, 1)
    packed      = torch.ops.moeify.dispatch(tokens, send_order, send_slots)
    ...                                                     packed leaves and returns
    result      = torch.ops.moeify.combine(padded, weights, send_order, send_slots)

After::

    send_layout = torch.ops.moeify.send_layout(slots, offsets, capacity, 2)
    packed      = torch.ops.moeify.dispatch(tokens, send_order, send_slots)
    part        = collectives.share(packed, 0, 2, 'tp', ...)
    ...                                                     part leaves and returns
    whole       = collectives.unshare(padded, 0, 2, 'tp', ...)
    result      = torch.ops.moeify.combine(whole, weights, send_order, send_slots)

Source:
    DeepSpeed-MoE (Rajbhandari et al. 2022) section 5.3, parallelism coordinated communication.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify.distributed import collectives
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of
from moeify.passes.rewrite.exchange_nodes import Group
from moeify.passes.rewrite.exchange_view import Exchange
from moeify.passes.rewrite.nodes import add_node

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class CoordinateAllToAll:
    """Let each rank of a tensor group send 1/tp of the rows, where experts are not sliced."""

    name: ClassVar[str] = "coordinate-all-to-all"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.COORDINATED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        world = ctx.mesh
        if world is None or ctx.plan is None or world.layout.tensor == 1:
            return PassResult(gm, False)
        if ctx.plan.parallel.coordinated is False or world.layout.etp > 1:
            return PassResult(gm, False)
        group = Group.of(world.dense, "tp", world.rank)
        changed = False
        for path, block in blocks_of(gm):
            found = Exchange.find(block.graph, path)
            if found is None or found.coordinated:
                continue
            _check(found)
            _rewrite(found, group)
            log.info("%s: each of %d tensor ranks sends its share", path, group.size)
            changed = True
        return PassResult(gm, changed)


def _check(found: Exchange) -> None:
    if found.pieces > 1:
        raise found.refuse(
            f"its rows travel in {found.pieces} pieces, and only whole rows can be shared out "
            "over a tensor group; run coordinate-all-to-all before the exchange is cut"
        )


def _rewrite(found: Exchange, group: Group) -> None:
    graph = found.graph
    arguments = (group.place, group.size, group.name, f"{found.path}: rows of a tensor group")
    found.lay_out(group.size)
    (own,) = found.own_counts
    own.update_arg(1, group.place)
    with graph.inserting_after(found.rows):
        part = add_node(graph, collectives.share, (found.rows, *arguments), "part")
    found.rows.replace_all_uses_with(part, delete_user_cb=lambda user: user is not part)
    returned = found.result.args[0]
    assert isinstance(returned, fx.Node)
    with graph.inserting_before(found.result):
        whole = add_node(graph, collectives.unshare, (returned, *arguments), "whole")
    found.result.replace_input_with(returned, whole)
