"""Building the block that takes the place of an MLP: a graph, and the modules that it calls."""

from __future__ import annotations

import copy
import operator
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor, fx, nn

from moeify.errors import UnsupportedModuleError
from moeify.init.calibration import Calibration
from moeify.init.strategies import MlpWeights, init_experts, inner_names
from moeify.init.weights import expert_weights, router_weight
from moeify.kernels import route
from moeify.nn.block import DenseMLP, LinearExperts, ResidualMix, StoredLinear
from moeify.nn.experts import Experts
from moeify.nn.router import Router
from moeify.nn.watch import MoEBlock
from moeify.passes.match.mlp_regions import Region
from moeify.passes.match.placement import parameter_names
from moeify.passes.rewrite.nodes import add_node, ops
from moeify.plan.layer_plan import LayerPlan
from moeify.sites.discovery import FoundSite


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
    return MoEBlock(root, graph, class_name="MoEBlock")


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
        inner_params=tuple(weights.inner),
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
        params={
            name: model.get_parameter(dense)
            for name, dense in zip(inner_names(program.params), program.params, strict=True)
        },
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
    dense = MlpWeights(identity, None, identity, None, {}, False)
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
