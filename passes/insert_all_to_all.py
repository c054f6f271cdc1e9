"""insert-all-to-all: carry rows to the ranks that hold their experts, and back.

Before::

    rows   = torch.ops.moeify.dispatch(tokens, order, slots)
    hidden = self.experts(rows, offsets)
    y      = torch.ops.moeify.combine(hidden, weights, order, slots)

After::

    send_layout = torch.ops.moeify.send_layout(slots, offsets, capacity, 1)
    packed      = torch.ops.moeify.dispatch(tokens, send_order, send_slots)
    send_counts = exchange.send_counts(own_counts, send_capacity, 4)
    recv_counts = collectives.wait(collectives.all_to_all(send_counts, ...))
    counts      = torch.ops.moeify.check_counts(recv_counts, send_capacity, 'h.1.mlp', ...)
    splits      = exchange.splits(send_counts, counts, send_capacity)
    send_rows   = exchange.cut(packed, send_splits)
    recv_rows   = collectives.wait(collectives.all_to_all(send_rows, recv_splits, send_splits, ...))
    recv_layout = torch.ops.moeify.receive_layout(counts, recv_total, send_capacity)
    by_expert   = torch.ops.moeify.dispatch(recv_rows, recv_order, recv_slots)
    computed    = self.experts(by_expert, recv_offsets)
    results     = torch.ops.moeify.combine(computed, None, recv_order, recv_slots)
    returned    = collectives.wait(collectives.all_to_all(results, send_splits, recv_splits, ...))
    padded      = exchange.padded(returned, packed)
    result      = torch.ops.moeify.combine(padded, weights, send_order, send_slots)

While a capacity limits the experts all splits are even and known before the routing is; else they
are exchanged and checked first, and the host waits for them. Where `all_to_all: allgather` is
asked for or cheaper, the tokens themselves are gathered instead (`passes.rewrite.gather_tokens`).
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify.distributed import exchange
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import spread_blocks
from moeify.passes.rewrite.exchange_choice import chosen_form
from moeify.passes.rewrite.exchange_nodes import Group, has_exchange, round_trip
from moeify.passes.rewrite.gather_tokens import gather_tokens
from moeify.passes.rewrite.local_experts import LocalExperts
from moeify.passes.rewrite.nodes import add_node, items, ops

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class InsertAllToAll:
    """Exchange rows in every block whose experts are spread over ranks."""

    name: ClassVar[str] = "insert-all-to-all"
    requires: ClassVar[frozenset[str]] = frozenset(
        {Fact.MOE_BLOCKS, Fact.EXPERT_CALLS, Fact.SHARDED}
    )
    provides: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        world = ctx.mesh
        if world is None or ctx.plan is None:
            return PassResult(gm, False)
        changed = False
        for path, block, layer in spread_blocks(gm, ctx):
            if has_exchange(block.graph):
                continue
            group = Group.of(world.sparse(layer.experts), "ep", world.rank)
            splits = ctx.plan.parallel.splits
            choice = chosen_form(ctx.plan.parallel, world, layer, gm, path)
            log.info("%s: %s: %s", path, choice.kind, choice.why)
            if choice.kind == "allgather":
                gather_tokens(block.graph, group, layer.experts, path, splits)
            else:
                _rewrite(block.graph, group, path, splits)
            changed = True
        return PassResult(gm, changed)


def _rewrite(graph: fx.Graph, group: Group, path: str, splits: str) -> None:
    """Put the exchange around one block's experts."""
    local = LocalExperts.of(graph, path)
    with graph.inserting_before(local.combine):
        capacity = local.capacity(splits)
        args = (local.slots, local.offsets, capacity, 1)
        layout = add_node(graph, ops.send_layout, args, "send_layout")
        order, slots, counts = items(graph, layout, "send_order", "send_slots", "part_counts")
        rows = add_node(graph, ops.dispatch, (local.tokens, order, slots), "packed")
        own = add_node(graph, operator.getitem, (counts, 0), "own_counts")
        each = add_node(graph, exchange.send_capacity, (capacity, 1), "send_capacity")
        returned = round_trip(graph, group, path, rows, own, each)
        result = add_node(graph, ops.combine, (returned, local.weights, order, slots), "result")
    local.replace(result)
    graph.eliminate_dead_code()
