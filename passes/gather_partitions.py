"""gather-partitions: gather ZeRO's pieces by nodes of a block, ahead of what reads them.

Before::

    routing  = self.router(tokens)
    computed = self.experts(rows, recv_offsets)

After::

    router_weight        = graph_engine.gather(self.router, 'weight')
    experts_up_proj, ... = graph_engine.gather(self.experts, 'up_proj'), ...
    routing  = graph_engine.run(self.router, ('weight',), (router_weight,), tokens)
    computed = graph_engine.run(self.experts, ('up_proj', ...), (experts_up_proj, ...), rows, ...)

A gather returns the parameter itself until it has been partitioned, so that a conversion is proven
on whole parameters. With `prefetch` they all stand in front of the block, experts' last; without,
each right before its module. One node for each parameter: bucketing them is the compiler's job.
What other blocks and the layers between them gather is not part of this graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of
from moeify.passes.rewrite.nodes import add_node
from moeify.zero import graph_engine


@dataclass(frozen=True, slots=True)
class GatherPartitions:
    """Gather the parameters of every block by nodes, for `zero: {engine: graph}`.

    The last pass: it turns the calls of experts, which others look for, into functions.
    """

    name: ClassVar[str] = "gather-partitions"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS, Fact.PARTITIONED})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        if ctx.plan is None or ctx.mesh is None:
            return PassResult(gm, False)
        zero = ctx.plan.zero
        if zero.engine != "graph" or zero.stage < 2:
            return PassResult(gm, False)
        changed = False
        for _, block in blocks_of(gm):
            changed |= _rewrite(block, ahead=zero.prefetch > 0)
        return PassResult(gm, changed)


def _rewrite(block: fx.GraphModule, *, ahead: bool) -> bool:
    """Gather the parameters of each module that the block calls; return whether there are any."""
    calls: dict[str, list[fx.Node]] = {}
    for call in block.graph.find_nodes(op="call_module"):
        calls.setdefault(str(call.target), []).append(call)
    front = next(n for n in block.graph.nodes if n.op != "placeholder")
    changed = False
    for target in sorted(calls, key=lambda name: name == "experts"):  # else in their order
        names = tuple(name for name, _ in block.get_submodule(target).named_parameters())
        if not names:
            continue
        graph = block.graph
        with graph.inserting_before(front if ahead else calls[target][0]):
            module = graph.get_attr(target)
            module._rename(_flat(f"{target}_module"))
            values = tuple(
                add_node(graph, graph_engine.gather, (module, name), _flat(f"{target}_{name}"))
                for name in names
            )
        for call in calls[target]:
            _replace(graph, call, (module, names, values))
        changed = True
    return changed


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _replace(graph: fx.Graph, call: fx.Node, gathered: tuple[fx.node.Argument, ...]) -> None:
    name = call.name
    with graph.inserting_before(call):
        made = graph.call_function(graph_engine.run, (*gathered, *call.args), call.kwargs)
    made.meta = {**call.meta, "is_wrapped": True}  # as `add_node` says
    call.replace_all_uses_with(made)
    graph.erase_node(call)
    made._rename(name)
