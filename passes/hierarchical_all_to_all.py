"""hierarchical-all-to-all: rows go over the node first, then between nodes.

An all-to-all among p ranks takes each of them p - 1 messages. In two stages, first among the G
ranks of a node, which sort what they hold by the local place of its destination, then among the
ranks of equal place on all nodes, it takes (G - 1) + (p / G - 1), for twice the volume.

Before::

    there = collectives.wait(collectives.all_to_all(leaving, receive, send, 'ep', ...))

After::

    turned  = torch.ops.moeify.arrivals(leaving_segments, rows, -1)     by place, then by node
    local   = collectives.wait(collectives.all_to_all(dispatch(leaving, turned), ..., 'local', ...))
    turned  = torch.ops.moeify.arrivals(local_segments, rows, -1)       by node, then by place
    there   = collectives.wait(collectives.all_to_all(dispatch(local, turned), ..., 'node', ...))

The counts that are announced before travel in the same two stages, the results back in reverse.

Source:
    DeepSpeed-MoE (Rajbhandari et al. 2022) section 5.3, hierarchical all-to-all, figure 7.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify import collectives, exchange
from moeify.mesh import World
from moeify.passes.base import Fact, PassResult, PlanContext
from moeify.passes.blocks import blocks_of, layer_at
from moeify.passes.exchange_choice import chosen_form
from moeify.passes.exchange_nodes import Group, node, ops, send


@dataclass(frozen=True, slots=True)
class HierarchicalAllToAll:
    """Split the all-to-alls of every block in two stages, where that was chosen."""

    name: ClassVar[str] = "hierarchical-all-to-all"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.DISPATCHED, Fact.OVERLAPPED})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        """Rewrite the exchanges of all blocks.

        Raises:
            PlanError: The plan asks for it, and the ranks of a layer are not spread evenly over
                several nodes.
        """
        world: World | None = ctx.mesh
        if world is None or ctx.plan is None or ctx.resolved is None:
            return PassResult(gm, False)
        parallel, changed = ctx.plan.parallel, False
        for path, block in blocks_of(gm):
            layer = layer_at(gm, path, ctx.resolved)
            if world.layout.ep(layer.experts) == 1:
                continue
            if chosen_form(parallel, world, layer, gm, path).kind != "hierarchical":
                continue
            mesh = world.staged(layer.experts)
            if mesh is None:
                continue  # a smaller group of a pyramid may lie on one node
            stages = _Stages(
                Group.of(mesh, "local", world.rank), Group.of(mesh, "node", world.rank), path
            )
            for splits in block.graph.find_nodes(op="call_function", target=exchange.splits):
                _rewrite(block.graph, splits, stages)
                changed = True
            block.graph.eliminate_dead_code()
            block.graph.lint()
            block.recompile()
        if parallel.all_to_all == "hierarchical" and not changed and not _staged(gm):
            raise ctx.plan.fault(
                ("parallel", "all_to_all"),
                f"hierarchical: no layer's {parallel.expert} expert ranks are spread evenly over "
                f"nodes of {world.node} ranks (torchrun's LOCAL_WORLD_SIZE); use flat or auto",
            )
        return PassResult(gm, changed)


@dataclass(frozen=True, slots=True)
class _Stages:
    local: Group
    node: Group
    path: str

    def where(self, what: str) -> str:
        return f"{self.path}: {what}"


def _staged(gm: fx.GraphModule) -> bool:
    target = exchange.staged_splits
    return any(
        block.graph.find_nodes(op="call_function", target=target) for _, block in blocks_of(gm)
    )


def _rewrite(graph: fx.Graph, splits: fx.Node, stages: _Stages) -> None:
    said, checked, capacity = splits.args
    assert isinstance(said, fx.Node)
    assert isinstance(checked, fx.Node)
    places, nodes = stages.local.size, stages.node.size
    heard = checked.args[0]
    assert isinstance(heard, fx.Node)
    with graph.inserting_before(heard):
        turned = node(graph, exchange.turned, (said, nodes, places), "said_by_place")
        one = [nodes] * places
        middle = send(
            graph, turned, one, one, stages.local.name, stages.where("counts on the node"), "told"
        )
        turned = node(graph, exchange.turned, (middle, places, nodes), "told_by_node")
        one = [places] * nodes
        arrived = send(
            graph, turned, one, one, stages.node.name, stages.where("counts over nodes"), "heard"
        )
    heard.replace_all_uses_with(arrived)
    out = next(user for user in splits.users if user.args[1] == 0)
    receive = next(user for user in splits.users if user.args[1] == 1)
    to = next(u for u in out.users if u.target is collectives.all_to_all and u.args[2] is out)
    back = next(u for u in out.users if u.target is collectives.all_to_all and u.args[1] is out)
    with graph.inserting_before(splits):
        args = (said, middle, checked, capacity, nodes, places)
        both = node(graph, exchange.staged_splits, args, "stages")
        sizes = [node(graph, operator.getitem, (both, i), f"stage_{i}") for i in range(4)]
        first = node(graph, exchange.segments, (said, capacity, nodes, places), "first_segments")
        second = node(graph, exchange.segments, (middle, capacity, places, nodes), "then_segments")
        cut_at = node(graph, operator.getitem, (both, 4), "send")
    for user in [u for u in out.users if u.target is exchange.cut]:
        user.replace_input_with(out, cut_at)
    (there,) = to.users
    (home,) = back.users
    leaving, done = to.args[0], back.args[0]
    with graph.inserting_before(there):
        one_order, one_slots = _turn(graph, first, leaving, "by_place")
        rows = node(graph, ops.dispatch, (leaving, one_order, one_slots), "by_place")
        rows = send(
            graph, rows, sizes[1], sizes[0], stages.local.name,
            stages.where("tokens on the node"), "gathered",
        )  # fmt: skip
        two_order, two_slots = _turn(graph, second, rows, "by_node")
        rows = node(graph, ops.dispatch, (rows, two_order, two_slots), "by_node")
        rows = send(
            graph, rows, sizes[3], sizes[2], stages.node.name,
            stages.where("tokens to experts over nodes"), "there",
        )  # fmt: skip
    there.replace_all_uses_with(rows)
    with graph.inserting_before(home):
        rows = send(
            graph, done, sizes[2], sizes[3], stages.node.name,
            stages.where("tokens from experts over nodes"), "results",
        )  # fmt: skip
        rows = node(graph, ops.combine, (rows, None, two_order, two_slots), "results_by_place")
        rows = send(
            graph, rows, sizes[0], sizes[1], stages.local.name,
            stages.where("results on the node"), "spread",
        )  # fmt: skip
        rows = node(graph, ops.combine, (rows, None, one_order, one_slots), "home")
    home.replace_all_uses_with(rows)
    for dead in (home, back, there, to, receive, out, splits, heard, heard.args[0]):
        assert isinstance(dead, fx.Node)
        graph.erase_node(dead)


def _turn(graph: fx.Graph, counts: fx.Node, rows: object, name: str) -> tuple[fx.Node, fx.Node]:
    """Add the transposition of a layout of segments; return its order and slots."""
    size = node(graph, exchange.rows_of, (rows,), f"{name}_rows")
    turned = node(graph, ops.arrivals, (counts, size, -1), f"{name}_turned")
    return (
        node(graph, operator.getitem, (turned, 0), f"{name}_order"),
        node(graph, operator.getitem, (turned, 1), f"{name}_slots"),
    )
