"""insert-all-to-all: carry rows to the ranks that hold their experts, and back.

Before::

    rows   = torch.ops.moeify.dispatch(tokens, order, slots)
    hidden = self.experts(rows, offsets)
    y      = torch.ops.moeify.combine(hidden, weights, order, slots)

After::

    wire     = torch.ops.moeify.wire(slots, offsets, capacity, 1)
    packed   = torch.ops.moeify.dispatch(tokens, wire_order, wire_slots)
    notice   = exchange.notice(announced, wire_capacity, 4)
    heard    = collectives.wait(collectives.all_to_all(notice, ...))
    counts   = torch.ops.moeify.check_counts(heard, wire_capacity, 'h.1.mlp', ...)
    splits   = exchange.splits(notice, counts, wire_capacity)
    leaving  = exchange.cut(packed, send)
    there    = collectives.wait(collectives.all_to_all(leaving, receive, send, ...))
    landed   = torch.ops.moeify.arrivals(counts, arrived, wire_capacity)
    mine     = torch.ops.moeify.dispatch(there, landed_order, landed_slots)
    computed = self.experts(mine, landed_offsets)
    done     = torch.ops.moeify.combine(computed, None, landed_order, landed_slots)
    home     = collectives.wait(collectives.all_to_all(done, send, receive, ...))
    returned = exchange.padded(home, packed)
    result   = torch.ops.moeify.combine(returned, weights, wire_order, wire_slots)

While a capacity limits the experts all splits are even and known before the routing is; else they
are exchanged and checked first, and the host waits for them. Where `all_to_all: allgather` is
asked for or cheaper, the tokens themselves are gathered instead (`passes.gather_tokens`).
"""

from __future__ import annotations

import logging
import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from moeify import collectives, exchange, gathering
from moeify.kernels import route
from moeify.mesh import World
from moeify.passes.base import Fact, PassResult, PlanContext
from moeify.passes.blocks import blocks_of, layer_at
from moeify.passes.exchange_choice import chosen_form
from moeify.passes.exchange_nodes import Group, Middle, node, ops, round_trip
from moeify.passes.gather_tokens import gather_tokens

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class InsertAllToAll:
    """Exchange rows in every block whose experts are spread over ranks."""

    name: ClassVar[str] = "insert-all-to-all"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.EXPERT_CALLS, Fact.SHARDED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        """Rewrite the blocks.

        Raises:
            PassError: A block's graph has no dispatch, experts, combine in this order.
        """
        world: World | None = ctx.mesh
        changed = False
        if world is None or ctx.resolved is None or ctx.plan is None:
            return PassResult(gm, False)
        for path, block in blocks_of(gm):
            layer = layer_at(gm, path, ctx.resolved)
            ranks = world.layout.ep(layer.experts)
            if ranks == 1 or _exchanges(block.graph):
                continue
            group = Group.of(world.sparse(layer.experts), "ep", world.rank)
            splits = ctx.plan.parallel.splits
            choice = chosen_form(ctx.plan.parallel, world, layer, gm, path)
            log.info("%s: %s: %s", path, choice.kind, choice.why)
            if choice.kind == "allgather":
                gather_tokens(block.graph, group, layer.experts, path, splits)
            else:
                _exchange(block.graph, group, path, splits)
            block.graph.lint()
            block.recompile()
            changed = True
        return PassResult(gm, changed)


def _exchanges(graph: fx.Graph) -> bool:
    """Tell whether a block's graph has its exchange."""
    return any(n.target in (collectives.all_to_all, gathering.gather) for n in graph.nodes)


def _exchange(graph: fx.Graph, group: Group, path: str, splits: str) -> None:
    """Put the exchange around one block's experts."""
    middle = Middle.of(graph, path)
    tokens, _, packed = middle.rows.args
    offsets, weights = middle.experts.args[1], middle.combine.args[1]
    assert isinstance(packed, fx.Node)
    with graph.inserting_before(middle.combine):
        capacity: Any = -1
        if splits == "auto":
            index = (packed.args[0], route.CAPACITY)
            capacity = node(graph, operator.getitem, index, "capacity")
        wire = node(graph, ops.wire, (packed, offsets, capacity, 1), "wire")
        order, slots, counts = (
            node(graph, operator.getitem, (wire, i), f"wire_{name}")
            for i, name in enumerate(("order", "slots", "counts"))
        )
        rows = node(graph, ops.dispatch, (tokens, order, slots), "packed")
        announced = node(graph, operator.getitem, (counts, 0), "announced")
        each = node(graph, exchange.wire_capacity, (capacity, 1), "wire_capacity")
        home = round_trip(graph, group, path, rows, announced, each)
        y = node(graph, ops.combine, (home, weights, order, slots), "result")
    middle.combine.replace_all_uses_with(y)
    for dead in (middle.combine, middle.experts, middle.rows):
        graph.erase_node(dead)
    graph.eliminate_dead_code()
