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

import copy
import operator
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from moeify.errors import UnsupportedModuleError
from moeify.init.calibration import Calibration
from moeify.init.strategies import MlpWeights, init_experts
from moeify.init.weights import expert_weights, router_weight
from moeify.kernels import route
from moeify.nn.block import DenseMLP, LinearExperts, ResidualMix, StoredLinear
from moeify.nn.experts import Experts
from moeify.nn.router import Router
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.records import NodeRecord, record_of, set_record
from moeify.passes.match.dataflow import linear_of, weight_of
from moeify.passes.match.mlp_regions import Region
from moeify.passes.match.placement import parameter_names
from moeify.passes.rewrite.blocks import MOE_ROLE
from moeify.passes.rewrite.nodes import add_node, ops
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


def build_block(
    model: nn.Module,
    layer: LayerPlan,
    found: FoundSite | None,
    share: range | None = None,
    inputs: Calibration | None = None,
) -> fx.GraphModule:
    """Build the block of one layer, with experts from the model's weights; on meta for one on meta.

    `found` is None for `expert: linear`; `share` are the experts to build, None for all; `inputs`
    is what goes into the MLP, if `layer.init` looks at it.
    """
    weight = model.get_parameter(layer.site.down.weight)
    root = nn.Module()
    root.add_module("router", _router(layer, weight, router_weight(model, layer, found, inputs)))
    if found is None:
        _linear_parts(root, model, layer, share)
        channel, tail, argument = -1, 0.0, "input"
    else:
        root.add_module("experts", _experts(model, layer, found, share, inputs))
        if layer.residual != "none":
            half = 0.5 if layer.residual == "add" else 1.0
            root.add_module("mlp", _dense(model, found.region, half))
            mix = ResidualMix(
                layer.residual, layer.site.d_in, device=weight.device, dtype=weight.dtype
            )
            root.add_module("residual_mix", mix)
        channel, tail = found.region.down.channel, found.placement.tail_dropout
        argument = found.placement.argument or "hidden_states"
    if tail:
        root.add_module("dropout", nn.Dropout(tail))
    graph = _block_graph(layer, channel, argument, root)
    return fx.GraphModule(root, graph, class_name="MoEBlock")


def _block_graph(layer: LayerPlan, channel: int, argument: str, root: nn.Module) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder(argument)
    last = x if channel == -1 else graph.call_method("movedim", (x, channel, -1))
    tokens = graph.call_method("reshape", (last, -1, layer.site.d_in))
    tokens._rename("tokens")
    routing = add_node(graph, "router", (tokens,), "routing")
    weights, slots, order, offsets = (
        add_node(graph, operator.getitem, (routing, index), name)
        for name, index in (
            ("weights", route.WEIGHTS),
            ("slots", route.SLOTS),
            ("order", route.ORDER),
            ("offsets", route.OFFSETS),
        )
    )
    rows = add_node(graph, ops.dispatch, (tokens, order, slots), "rows")
    hidden = add_node(graph, "experts", (rows, offsets), "hidden")
    y = add_node(graph, ops.combine, (hidden, weights, order, slots), "y")
    if hasattr(root, "mlp"):
        dense = add_node(graph, "mlp", (tokens,), "dense")
        y = add_node(graph, "residual_mix", (y, dense, tokens), "mixed")
    width = layer.site.d_in
    if hasattr(root, "projection"):
        y = add_node(graph, "projection", (y,), "projected")
        width = layer.site.d_out
    if hasattr(root, "dropout"):
        y = add_node(graph, "dropout", (y,), "dropped")
    shape = graph.call_function(getattr, (last, "shape"))
    if width != layer.site.d_in:
        lead = graph.call_function(operator.getitem, (shape, slice(None, -1)))
        shape = graph.call_function(operator.add, (lead, (width,)))
    out = graph.call_method("reshape", (y, shape))
    out._rename("out")
    if channel != -1:
        out = graph.call_method("movedim", (out, -1, channel))
    graph.output(out)
    return graph


def _router(layer: LayerPlan, like: Tensor, weight: Tensor) -> Router:
    spec = layer.router
    router = Router(
        layer.site.d_in,
        experts=layer.experts,
        top_k=layer.top_k,
        score=spec.score,
        combine=spec.combine,
        noise=spec.noise,
        jitter_eps=spec.jitter_eps,
        capacity_factor=spec.capacity_factor,
        eval_capacity_factor=spec.eval_capacity_factor,
        min_capacity=spec.min_capacity,
        drop=spec.drop,
        balance=spec.balance,
        aux_loss=spec.aux_loss,
        z_loss=spec.z_loss,
        bias_update=spec.bias_update,
        calls=layer.site.calls,
        device="meta",
        dtype=like.dtype,
    )
    router.weight = nn.Parameter(weight)
    for name, buffer in list(router.named_buffers()):
        setattr(router, name, torch.zeros_like(buffer, device=like.device))
    return router


def _experts(
    model: nn.Module,
    layer: LayerPlan,
    found: FoundSite,
    share: range | None,
    inputs: Calibration | None,
) -> Experts:
    weights = expert_weights(model, layer, found, None, share, inputs)
    region = found.region
    program = region.program
    experts = Experts(
        experts=layer.experts,
        d_in=layer.site.d_in,
        d_ff=weights.down.shape[2],
        activation=program.activation if program.module is None else "identity",
        gated=weights.gated,
        up_bias=weights.up_bias is not None,
        down_bias=weights.down_bias is not None,
        inner=None if program.module is None else copy.deepcopy(program.module),
        inner_params=len(weights.inner),
        dropout=program.dropout,
        device="meta",
        dtype=weights.up.dtype,
    )
    trains = model.get_parameter(region.down.weight.name).requires_grad
    dense = {model.get_parameter(n).untyped_storage().data_ptr() for n in parameter_names(region)}
    for name, value in weights.named().items():
        setattr(experts, name, nn.Parameter(_owned(value, dense), requires_grad=trains))
    return experts


def _owned(value: Tensor, others: AbstractSet[int]) -> Tensor:
    """Return a contiguous tensor that shares no storage with others."""
    if value.is_contiguous() and value.untyped_storage().data_ptr() not in others:
        return value
    return value.clone(memory_format=torch.contiguous_format)


def _dense(model: nn.Module, region: Region, scale: float) -> DenseMLP:
    """Move the dense MLP's own parameters into a module of its own; `scale` the last projection."""
    linears = (*region.ups, region.down)
    names = _leaf_names([linear.weight.name for linear in linears])
    modules = []
    for linear, name in zip(linears, names, strict=True):
        weight = model.get_parameter(linear.weight.name)
        bias = None if linear.bias is None else model.get_parameter(linear.bias.name)
        if linear is region.down and scale != 1.0:
            weight = nn.Parameter(weight.detach() * scale, requires_grad=weight.requires_grad)
            if bias is not None:
                bias = nn.Parameter(bias.detach() * scale, requires_grad=bias.requires_grad)
        modules.append((name, StoredLinear(weight, bias, transposed=linear.transposed)))
    program = region.program
    return DenseMLP(
        modules[:-1],
        modules[-1],
        activation=program.activation,
        gated=program.gated,
        swap=program.swap,
        inner=None if program.module is None else copy.deepcopy(program.module),
        params={f"inner_{i}": model.get_parameter(n) for i, n in enumerate(program.params)},
        dropout=program.dropout,
    )


def _leaf_names(weights: list[str]) -> list[str]:
    """Shorten parameter names to distinct module names: `h.0.mlp.c_fc.weight` -> `c_fc`."""
    parts = [w.removesuffix(".weight").split(".") for w in weights]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["_".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"projection_{i}" for i in range(len(weights))]


def _linear_parts(root: nn.Module, model: nn.Module, layer: LayerPlan, share: range | None) -> None:
    """`expert: linear`: square linear experts, then the layer itself.

    There is no square map to copy, so experts start as the identity, which keeps step 0; `random`
    draws them from N(0, 1/D).
    """
    if layer.residual != "none" or layer.init.experts not in ("copy", "random"):
        what = "residual" if layer.residual != "none" else f"init `{layer.init.experts}`"
        raise UnsupportedModuleError(layer.name, f"`expert: linear` has no {what}; remove it")
    own = model.get_submodule(layer.site.name)
    weight = model.get_parameter(layer.site.down.weight)
    width = layer.site.d_in
    identity = torch.eye(width, dtype=weight.dtype, device=weight.device)
    dense = MlpWeights(identity, None, identity, None, (), False)
    stacked = init_experts(dense, layer.experts, layer.init, layer.name, share=share).up
    if layer.init.experts == "random" and not weight.is_meta:
        stacked = stacked / identity.float().std(correction=0).to(stacked.dtype) / width**0.5
    bias = torch.zeros(stacked.shape[0], width, dtype=weight.dtype, device=weight.device)
    trains = weight.requires_grad
    experts = LinearExperts(
        nn.Parameter(stacked.contiguous(), requires_grad=trains),
        nn.Parameter(bias, requires_grad=trains),
    )
    root.add_module("experts", experts)
    root.add_module("projection", own)


__all__ = ["ReplaceMlps", "build_block", "expert_weights", "router_weight"]
