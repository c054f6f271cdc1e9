"""hierarchical-all-to-all: rows go over the node first, then between nodes.

An all-to-all among p ranks takes each of them p - 1 messages. In two stages, first among the G
ranks of a node, which sort what they hold by the local place of its destination, then among the
ranks of equal place on all nodes, it takes (G - 1) + (p / G - 1), for twice the volume.

Before::

    recv_rows = collectives.wait(collectives.all_to_all(send_rows, recv_splits, send_splits, 'ep'))
    ...                                                               results of the experts
    returned  = collectives.wait(collectives.all_to_all(results, send_splits, recv_splits, 'ep'))

After, where a sort is `receive_layout` and the `dispatch` that it is for::

    local_sorted   = sort(send_rows)                                  by place, then by node
    local_rows     = collectives.wait(collectives.all_to_all(local_sorted, ..., 'local'))
    node_sorted    = sort(local_rows)                                 by node, then by place
    node_rows      = collectives.wait(collectives.all_to_all(node_sorted, ..., 'node'))
    ...                                                               results of the experts
    node_results   = collectives.wait(collectives.all_to_all(results, ..., 'node'))
    node_returned  = torch.ops.moeify.combine(node_results, None, ...)       undoes node_sorted
    local_results  = collectives.wait(collectives.all_to_all(node_returned, ..., 'local'))
    local_returned = torch.ops.moeify.combine(local_results, None, ...)      undoes local_sorted

The counts that are announced before travel in the same two stages.

Source:
    DeepSpeed-MoE (Rajbhandari et al. 2022) section 5.3, hierarchical all-to-all, figure 7.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from moeify.distributed import exchange
from moeify.errors import PassError
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import spread_blocks
from moeify.passes.rewrite.exchange_choice import chosen_form
from moeify.passes.rewrite.exchange_nodes import Group, send
from moeify.passes.rewrite.exchange_view import Exchange, RoundTrip
from moeify.passes.rewrite.nodes import add_node, items, ops


@dataclass(frozen=True, slots=True)
class HierarchicalAllToAll:
    """Split the all-to-alls of every block in two stages, where that was chosen."""

    name: ClassVar[str] = "hierarchical-all-to-all"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED, Fact.OVERLAPPED})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        world = ctx.mesh
        if world is None or ctx.plan is None or ctx.resolved is None:
            return PassResult(gm, False)
        parallel, changed, spread = ctx.plan.parallel, False, False
        for path, block, layer in spread_blocks(gm, ctx):
            if chosen_form(parallel, world, layer, gm, path).kind != "hierarchical":
                continue
            mesh = world.staged(layer.experts)
            if mesh is None:
                continue  # a smaller group of a pyramid may lie on one node
            spread = True
            found = Exchange.find(block.graph, path)
            if found is None:
                raise PassError(f"{path}: its rows travel in no all-to-all that two could replace")
            if found.staged:
                continue
            for trip in found.trips():
                _rewrite(trip, _Groups.of(mesh, world.rank, path))
            changed = True
        if parallel.all_to_all == "hierarchical" and not spread:
            raise ctx.plan.fault(
                ("parallel", "all_to_all"),
                f"hierarchical: no layer's {parallel.expert} expert ranks are spread evenly over "
                f"nodes of {world.node} ranks (torchrun's LOCAL_WORLD_SIZE); use flat or auto",
            )
        return PassResult(gm, changed)


@dataclass(frozen=True, slots=True)
class _Groups:
    """The ranks of this node, and those of this rank's place on all nodes."""

    local: Group
    node: Group
    path: str

    @classmethod
    def of(cls, mesh: Any, rank: int, path: str) -> _Groups:
        return cls(Group.of(mesh, "local", rank), Group.of(mesh, "node", rank), path)

    def where(self, *texts: str) -> tuple[str, ...]:
        return tuple(f"{self.path}: {text}" for text in texts)


@dataclass(frozen=True, slots=True)
class _Stage:
    """One stage: rows are sorted by the place in a group that they go to, and go there."""

    name: str  # what the nodes' names begin with
    group: Group  # the ranks among which they travel
    where: tuple[str, ...]  # block and stage, for messages: on the way there, and on the way back
    segments: fx.Node  # how many rows lie next to each other before they are sorted, [A, B]
    send: fx.Node  # rows to each rank of the group
    receive: fx.Node  # rows from each rank of the group

    def carry(self, graph: fx.Graph, rows: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Add the way there; return the rows that arrive, and how those that left were sorted."""
        name, group, where = self.name, self.group.name, self.where[0]
        total = add_node(graph, exchange.rows_of, (rows,), f"{name}_total")
        layout = add_node(graph, ops.receive_layout, (self.segments, total, -1), f"{name}_layout")
        order, slots = items(graph, layout, f"{name}_order", f"{name}_slots")
        rows = add_node(graph, ops.dispatch, (rows, order, slots), f"{name}_sorted")
        rows = send(graph, rows, self.receive, self.send, group, where, f"{name}_rows")
        return rows, [order, slots]

    def bring_back(self, graph: fx.Graph, results: fx.Node, sorting: list[fx.Node]) -> fx.Node:
        """Add the way back; return the results in the order of the rows before the sort."""
        name, group, where = self.name, self.group.name, self.where[1]
        rows = send(graph, results, self.send, self.receive, group, where, f"{name}_results")
        return add_node(graph, ops.combine, (rows, None, *sorting), f"{name}_returned")


def _rewrite(trip: RoundTrip, groups: _Groups) -> None:
    """Build a trip in two stages beside one in one, and let it take its place."""
    graph = trip.graph
    with graph.inserting_before(trip.recv_counts):
        local_counts, recv_counts = _exchange_counts(graph, trip, groups)
    with graph.inserting_before(trip.splits):
        first, second, send_splits = _stages(graph, trip, local_counts, groups)
    with graph.inserting_before(trip.recv_rows):
        local_rows, by_place = first.carry(graph, trip.send_rows)
        node_rows, by_node = second.carry(graph, local_rows)
    with graph.inserting_before(trip.returned):
        node_returned = second.bring_back(graph, trip.results, by_node)
        local_returned = first.bring_back(graph, node_returned, by_place)
    trip.replace(
        recv_counts=recv_counts,
        send_splits=send_splits,
        recv_rows=node_rows,
        returned=local_returned,
    )


def _exchange_counts(graph: fx.Graph, trip: RoundTrip, groups: _Groups) -> tuple[fx.Node, fx.Node]:
    """Add the way of the counts; return those that reach the node, and those that arrive."""
    local, across = groups.local, groups.node
    on_node, over_nodes = groups.where("counts on the node", "counts over nodes")
    args = (trip.send_counts, across.size, local.size)
    rows = add_node(graph, exchange.transposed, args, "counts_by_place")
    each = [across.size] * local.size
    local_counts = send(graph, rows, each, each, local.name, on_node, "local_counts")
    args = (local_counts, local.size, across.size)
    rows = add_node(graph, exchange.transposed, args, "counts_by_node")
    each = [local.size] * across.size
    return local_counts, send(graph, rows, each, each, across.name, over_nodes, "recv_counts")


def _stages(
    graph: fx.Graph, trip: RoundTrip, local_counts: fx.Node, groups: _Groups
) -> tuple[_Stage, _Stage, fx.Node]:
    """Add the sizes of both stages; return the stages, and the splits of all rows that leave."""
    places, nodes, capacity = groups.local.size, groups.node.size, trip.capacity
    counts = (trip.send_counts, local_counts, trip.counts)
    splits = add_node(
        graph, exchange.staged_splits, (*counts, capacity, nodes, places), "stage_splits"
    )
    names = ("local_send", "local_recv", "node_send", "node_recv")
    local_send, local_recv, node_send, node_recv = items(graph, splits, *names)
    args = (trip.send_counts, capacity, nodes, places)
    local_segments = add_node(graph, exchange.segments, args, "local_segments")
    args = (local_counts, capacity, places, nodes)
    node_segments = add_node(graph, exchange.segments, args, "node_segments")
    send_splits = add_node(graph, operator.getitem, (splits, 4), "send_splits")
    where = groups.where("tokens on the node", "results on the node")
    first = _Stage("local", groups.local, where, local_segments, local_send, local_recv)
    where = groups.where("tokens to experts over nodes", "tokens from experts over nodes")
    second = _Stage("node", groups.node, where, node_segments, node_send, node_recv)
    return first, second, send_splits
