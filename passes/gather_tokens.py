"""The all-gather form of insert-all-to-all: tokens go to all ranks, sums come back.

Before::

    rows   = torch.ops.moeify.dispatch(tokens, order, slots)
    hidden = self.experts(rows, offsets)
    y      = torch.ops.moeify.combine(hidden, weights, order, slots)

After::

    most     = gathering.most_tokens(tokens, capacity, ...)
    everyone = gathering.gather(tokens, most, ...)
    gates    = gathering.gather(weights, most, ...)
    routes   = gathering.gather(gathering.kept_ids(ids, slots), most, ...)
    own      = torch.ops.moeify.own_routes(routes, first + 1, experts)
    packed   = torch.ops.moeify.dispatch(everyone, own_order, own_slots)
    computed = self.experts(packed, own_offsets)
    part     = torch.ops.moeify.combine(computed, gates, own_order, own_slots)
    result   = gathering.scatter_sum(part, tokens, ...)
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from moeify import gathering
from moeify.kernels import route
from moeify.passes.exchange_nodes import Group, Middle, node, ops


def gather_tokens(graph: fx.Graph, group: Group, experts: int, path: str, splits: str) -> None:
    """Rewrite one block's graph.

    Args:
        graph: The graph.
        group: The ranks that share its experts.
        experts: Experts of the layer, over all ranks.
        path: The block, for messages.
        splits: The plan's `parallel.splits`.
    """
    middle = Middle.of(graph, path)
    tokens, _, packed = middle.rows.args
    weights = middle.combine.args[1]
    assert isinstance(packed, fx.Node)
    routing = packed.args[0]
    each = experts // group.size
    ranks = list(group.ranks)

    def gathered(rows: Any, most: fx.Node, what: str, name: str) -> fx.Node:
        args = (rows, most, group.size, group.name, f"{path}: {what}")
        return node(graph, gathering.gather, args, name)

    with graph.inserting_before(middle.combine):
        capacity: Any = -1
        if splits == "auto":
            index = (routing, route.CAPACITY)
            capacity = node(graph, operator.getitem, index, "capacity")
        said = (tokens, capacity, group.name, ranks, group.rank, path)
        most = node(graph, gathering.most_tokens, said, "most")
        ids = node(graph, operator.getitem, (routing, route.IDS), "ids")
        kept = node(graph, gathering.kept_ids, (ids, packed), "kept")
        everyone = gathered(tokens, most, "tokens to all ranks", "everyone")
        gates = gathered(weights, most, "weights to all ranks", "gates")
        routes = gathered(kept, most, "routes to all ranks", "routes")
        first = group.place * each + 1
        own = node(graph, ops.own_routes, (routes, first, each), "own")
        slots, order, offsets = (
            node(graph, operator.getitem, (own, i), f"own_{name}")
            for i, name in enumerate(("slots", "order", "offsets"))
        )
        rows = node(graph, ops.dispatch, (everyone, order, slots), "packed")
        hidden = graph.call_module("experts", (rows, offsets))
        hidden._rename("computed")
        part = node(graph, ops.combine, (hidden, gates, order, slots), "part")
        back = (part, tokens, group.size, group.name, f"{path}: sums from experts")
        y = node(graph, gathering.scatter_sum, back, "result")
    middle.combine.replace_all_uses_with(y)
    for dead in (middle.combine, middle.experts, middle.rows):
        graph.erase_node(dead)
    graph.eliminate_dead_code()
