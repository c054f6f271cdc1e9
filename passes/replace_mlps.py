"""replace-mlps: turn each planned site into a call of a MoE block, a graph of its own.

Before::

    %up   = linear(%x, h.0.mlp.up.weight)
    %gelu = gelu(%up)
    %down = linear(%gelu, h.0.mlp.down.weight)

After::

    %moe  = call_module[h.0.mlp](%x)

and the block `h.0.mlp`, printed by `print(block.code)`::

    tokens  = hidden_states.reshape(-1, 768)
    routing = self.router(tokens)
    rows    = torch.ops.moeify.dispatch(tokens, order, slots)
    hidden  = self.experts(rows, offsets)
    y       = torch.ops.moeify.combine(hidden, weights, order, slots)
    mlp     = self.mlp(tokens)
    mixed   = self.residual_mix(y, mlp, tokens)
    out     = mixed.reshape(hidden_states.shape)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

from torch import fx

from moeify.init.calibration import Calibration
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.records import NodeRecord, record_of, set_record
from moeify.passes.match.dataflow import linear_of, weight_of
from moeify.passes.rewrite.blocks import MOE_ROLE
from moeify.passes.rewrite.moe_block import build_block
from moeify.plan.layer_plan import LayerPlan
from moeify.plan.site import Site
from moeify.sites.discovery import Discovery, FoundSite, block_path, find_site


@dataclass(frozen=True, slots=True)
class ReplaceMlps:
    """Replace every planned site of the graph by a block with the chosen experts.

    Args:
        discovery: The sites of this graph.
        shares: Experts to build by layer name, where a rank keeps only some; all of them else.
        inputs: What goes into the MLPs by layer name, where `init` looks at it.
    """

    discovery: Discovery
    shares: Mapping[str, range] = field(default_factory=dict)
    inputs: Mapping[str, Calibration] = field(default_factory=dict)
    name: ClassVar[str] = "replace-mlps"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MLP_SITES, Fact.RESOLVED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS, Fact.EXPERT_CALLS})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        assert ctx.resolved is not None
        assert ctx.model is not None
        changed = False
        calls: dict[fx.Node, fx.Node] = {}  # an MLP may read what another one returned
        for layer in ctx.resolved:
            site = find_site(self.discovery, layer)
            path = block_path(site, layer)
            runs = self._runs(gm, site, layer)
            if not runs:
                continue
            share, inputs = self.shares.get(layer.name), self.inputs.get(layer.name)
            block = build_block(ctx.model, layer, site, share, inputs)
            for source, out, nodes in runs:
                live = calls.get(source, source)
                calls[out] = _call_block(gm, path, layer.name, live, out, nodes)
            gm.delete_all_unused_submodules()
            gm.add_submodule(path, block)
            changed = True
        return PassResult(gm, changed)

    def _runs(
        self, gm: fx.GraphModule, site: FoundSite | None, layer: LayerPlan
    ) -> list[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]]:
        """Return (input, output, nodes) of each run that is still in the graph."""
        if site is not None:
            return list(_marked_runs(gm.graph, layer.site))
        name, alive = layer.site.down.weight, set(gm.graph.nodes)
        found = [lin for lin in self.discovery.linear_nodes if lin.weight.name == name]
        return [(_source(lin.node), lin.out, lin.nodes) for lin in found if lin.out in alive]


def _marked_runs(
    graph: fx.Graph, site: Site
) -> Iterator[tuple[fx.Node, fx.Node, tuple[fx.Node, ...]]]:
    """Yield (input, output, nodes) of each run of an MLP, by the roles of its nodes.

    From the last node of the second projection back to the first ones: what these read belongs to
    the model, or to a run before.
    """
    marks = {node: _role(node, site.down.weight) for node in graph.nodes}
    firsts = {projection.weight for projection in site.up}
    for out, role in marks.items():
        if role != "down" or any(marks.get(user) == "down" for user in out.users):
            continue
        nodes: dict[fx.Node, None] = {}
        todo = [out]
        while todo:
            node = todo.pop()
            nodes[node] = None
            first = marks[node] == "up"
            todo += [
                source
                for source in node.all_input_nodes
                if source not in nodes and marks[source] and not (first and marks[source] == "down")
            ]
        projections = [linear_of(n) for n in marks if n in nodes and marks[n] == "up"]
        ups = [projection for projection in projections if projection is not None]
        if {up.weight.name for up in ups} == firsts:  # else another MLP with the same second one
            yield ups[0].source, out, tuple(nodes)


def _role(node: fx.Node, site: str) -> str:
    record = record_of(node)
    return "" if record is None or record.site != site else record.role or ""


def _source(projection: fx.Node) -> fx.Node:
    """Return what a projection reads now: an MLP before it may have become a block."""
    now = linear_of(projection)
    assert now is not None
    return now.source


def _call_block(
    gm: fx.GraphModule,
    path: str,
    name: str,
    source: fx.Node,
    out: fx.Node,
    nodes: tuple[fx.Node, ...],
) -> fx.Node:
    with gm.graph.inserting_before(out):
        call = gm.graph.call_module(path, (source,))
    old = record_of(out) or NodeRecord("")
    record = replace(old, module_path=path, params=(), mutates=False, site=name, role=MOE_ROLE)
    set_record(call, record)
    out.replace_all_uses_with(call)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    freed: list[fx.Node] = []
    alive = set(order)
    for node in sorted(nodes, key=order.__getitem__, reverse=True):
        freed += [source for source in node.all_input_nodes if weight_of(source) is not None]
        gm.graph.erase_node(node)
        alive.discard(node)
    while freed:  # weights and their views, once nothing reads them
        node = freed.pop()
        if not node.users and node in alive:
            freed += node.all_input_nodes
            gm.graph.erase_node(node)
            alive.discard(node)
    return call
