"""The all-gather form of insert-all-to-all: tokens go to all ranks, sums come back.

Before::

    rows   = torch.ops.moeify.dispatch(tokens, order, slots)
    hidden = self.experts(rows, offsets)
    y      = torch.ops.moeify.combine(hidden, weights, order, slots)

After::

    most     = allgather.most_tokens(tokens, capacity, ...)
    everyone = allgather.gather(tokens, most, ...)
    gates    = allgather.gather(weights, most, ...)
    routes   = allgather.gather(allgather.kept_ids(ids, slots), most, ...)
    local    = torch.ops.moeify.local_routes(routes, first + 1, experts)
    packed   = torch.ops.moeify.dispatch(everyone, local_order, local_slots)
    computed = self.experts(packed, local_offsets)
    part     = torch.ops.moeify.combine(computed, gates, local_order, local_slots)
    result   = allgather.scatter_sum(part, tokens, ...)
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from moeify.distributed import allgather
from moeify.kernels import route
from moeify.passes.rewrite.exchange_nodes import Group
from moeify.passes.rewrite.local_experts import LocalExperts
from moeify.passes.rewrite.nodes import add_node, items, ops


def gather_tokens(graph: fx.Graph, group: Group, experts: int, path: str, splits: str) -> None:
    """Rewrite one block's graph.

    `experts` counts those of the layer over all ranks; `splits` is the plan's `parallel.splits`.
    """
    local = LocalExperts.of(graph, path)
    each = experts // group.size

    def gathered(rows: Any, most: fx.Node, what: str, name: str) -> fx.Node:
        args = (rows, most, group.size, group.name, f"{path}: {what}")
        return add_node(graph, allgather.gather, args, name)

    with graph.inserting_before(local.combine):
        capacity = local.capacity(splits)
        sizes = (local.tokens, capacity, group.name, list(group.ranks), group.rank, path)
        most = add_node(graph, allgather.most_tokens, sizes, "most")
        ids = add_node(graph, operator.getitem, (local.routing, route.IDS), "ids")
        kept = add_node(graph, allgather.kept_ids, (ids, local.slots), "kept")
        everyone = gathered(local.tokens, most, "tokens to all ranks", "everyone")
        gates = gathered(local.weights, most, "weights to all ranks", "gates")
        routes = gathered(kept, most, "routes to all ranks", "routes")
        first = group.place * each + 1
        found = add_node(graph, ops.local_routes, (routes, first, each), "local")
        slots, order, offsets = items(graph, found, "local_slots", "local_order", "local_offsets")
        rows = add_node(graph, ops.dispatch, (everyone, order, slots), "packed")
        hidden = add_node(graph, "experts", (rows, offsets), "computed")
        part = add_node(graph, ops.combine, (hidden, gates, order, slots), "part")
        back = (part, local.tokens, group.size, group.name, f"{path}: sums from experts")
        result = add_node(graph, allgather.scatter_sum, back, "result")
    local.replace(result)
    graph.eliminate_dead_code()
