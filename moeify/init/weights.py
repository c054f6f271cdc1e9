"""The starting weights of the experts and the router of one site, given the dense model.

Each expert can be made alone, so that the model need not be in memory and a rank makes only its
own experts.

Shapes: T tokens, D model width, F hidden width, E experts; `wide` is F, or 2F if gated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from moeify.distributed.agreement import assert_same_on_ranks
from moeify.errors import MoeifyError, UnsupportedModuleError
from moeify.init.calibration import Calibration
from moeify.init.from_checkpoints import read_like, sources_for
from moeify.init.router import cluster_rows, excitation_rows, hidden_rows
from moeify.init.split import neuron_groups, split_experts
from moeify.init.strategies import (
    MlpWeights,
    generator_for,
    init_experts,
    init_router,
    inner_names,
    scaled,
    stacked,
)
from moeify.nn.activations import activation
from moeify.passes.match.dataflow import Linear
from moeify.passes.match.mlp_regions import Region
from moeify.plan.layer_plan import LayerPlan
from moeify.sites.discovery import Discovery, FoundSite, find_site
from moeify.storage.tensor_source import TensorSource


def router_weight(
    model: nn.Module,
    layer: LayerPlan,
    found: FoundSite | None,
    inputs: Calibration | None = None,
) -> Tensor:
    """Return the weight [E, D] that a layer's router starts from.

    Of the dense model only the parameters of this MLP are read. `found` is None for
    `expert: linear`; `inputs` are needed if `layer.init.needs_activations`.

    Raises:
        MoeifyError: The inputs are missing, or too few.
    """
    init, like = layer.init, model.get_parameter(layer.site.down.weight)
    shape = (layer.experts, layer.site.d_in)
    if like.is_meta or init.router in ("normal", "zeros"):
        return init_router(shape, like, init, layer.name)
    if init.router == "clusters":
        assert found is not None
        dense, groups = _split(model, layer, found, inputs)
        rows = cluster_rows(dense, groups, init.router_std)
    elif inputs is None:
        raise MoeifyError(
            f"{layer.name}: `router: {init.router}` needs the whole model, to run it on the "
            "example inputs: convert it in memory, or use `router: normal`"
        )
    elif init.experts == "split" and init.router == "hidden":
        assert found is not None
        dense, groups = _split(model, layer, found, inputs)
        hidden = hidden_values(dense, found.region, inputs.rows)
        rows = excitation_rows(inputs, hidden, groups, init.router_std)
    else:
        rows = hidden_rows(
            inputs,
            layer.experts,
            init.seed,
            layer.name,
            init.router_std,
            prompts=init.router == "prompts",
        )
    return rows.to(device=like.device, dtype=like.dtype)


def expert_weights(
    model: nn.Module,
    layer: LayerPlan,
    found: FoundSite,
    scale: float | None = None,
    share: range | None = None,
    inputs: Calibration | None = None,
) -> MlpWeights:
    """Return the stacked weights that the experts in `share` (None for all) start from.

    Of the dense model only the parameters of this MLP are read; the rest may be on `meta`, and with
    the MLP on `meta` the result is too. Weights may be views of the model's: do not write to them.
    Clusters of neurons and open checkpoints are cached. `scale` is a factor on the last projection,
    `branch_scale` if None.

    Raises:
        MoeifyError: `inputs` are missing, which `clusters: coactivation` needs.
        CheckpointError: A checkpoint of `init: {experts: models}` does not fit.
        UnsupportedModuleError: The hidden neurons of this MLP do not work independently.
    """
    init, region = layer.init, found.region
    share = range(layer.experts) if share is None else share
    if scale is None:
        scale = branch_scale(layer)
    down = model.get_parameter(region.down.weight.name)
    if init.experts == "models" and not down.is_meta:
        sources = sources_for(model, layer)
        each = [_of_source(model, sources[number % len(sources)], region) for number in share]
        return scaled(stacked(each), scale)
    if init.experts == "split":
        dense, groups = _split(model, layer, found, inputs)
        return experts_from(dense, layer, share, scale, groups)
    dense = mlp_weights(_values_of(model), region)
    if init.experts == "granular":
        _check_independent(layer, region, dense)
    return experts_from(dense, layer, share, scale)


def experts_from(
    dense: MlpWeights,
    layer: LayerPlan,
    share: range,
    scale: float,
    groups: Tensor | None = None,
) -> MlpWeights:
    """Return the stacked weights that experts start from, differentiably, given the dense ones.

    `groups` [E, w] int64 are the hidden neurons of each expert, for `init: split`.
    """
    if groups is not None:
        return scaled(split_experts(dense, groups, share, layer.top_k), scale)
    return init_experts(dense, layer.experts, layer.init, layer.name, scale=scale, share=share)


def split_groups(
    model: nn.Module, layer: LayerPlan, found: FoundSite, inputs: Calibration | None
) -> Tensor | None:
    """Return the hidden neurons [E, w] int64 of each expert of `init: split`; None for others."""
    if layer.init.experts != "split":
        return None
    return _split(model, layer, found, inputs)[1]


def _origin(layer: LayerPlan) -> str:
    return "from the example inputs" if layer.init.needs_activations else "from its weights"


def _digest_of_start(
    model: nn.Module, layer: LayerPlan, found: FoundSite | None, inputs: Calibration | None = None
) -> str:
    """Return a digest of the clusters of neurons and tokens that a layer starts from."""
    rows = router_weight(model, layer, found, inputs)
    if rows.is_meta:
        return ""
    digest = hashlib.sha256(rows.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    if layer.init.experts == "split":
        assert found is not None
        digest.update(_split(model, layer, found, inputs)[1].numpy().data)
    return digest.hexdigest()[:12]


def assert_same_starts(
    model: nn.Module,
    layers: Iterable[LayerPlan],
    discovery: Discovery,
    inputs: Mapping[str, Calibration],
) -> None:
    """Compare clusters over all ranks: one different bit may move a neuron to another cluster.

    Clusters from example inputs need the same inputs on all ranks.

    Raises:
        PlanError: Ranks differ.
        DispatchError: A rank died.
    """
    facts = {
        f"the clusters of {layer.name} ({_origin(layer)})": _digest_of_start(
            model, layer, find_site(discovery, layer), inputs.get(layer.name)
        )
        for layer in layers
        if layer.init.experts == "split" or layer.init.router in ("hidden", "prompts")
    }
    if facts:
        assert_same_on_ranks(facts, "give every rank the same weights and example inputs")


def branch_scale(layer: LayerPlan) -> float:
    """Return the factor on the experts' output that makes room for the dense branch."""
    return 0.5 if layer.residual in ("add", "sigmoid") else 1.0


def _of_source(model: nn.Module, source: TensorSource, region: Region) -> MlpWeights:
    def parameter(name: str) -> Tensor:
        return read_like(source, name, model.get_parameter(name))

    return mlp_weights(parameter, region)


def _split(
    model: nn.Module, layer: LayerPlan, found: FoundSite, inputs: Calibration | None
) -> tuple[MlpWeights, Tensor]:
    """Return the dense weights of a site that is split, and the neurons of each expert."""
    region = found.region
    dense, hidden = mlp_weights(_values_of(model), region), None
    _check_independent(layer, region, dense)
    if layer.init.clusters == "coactivation" and inputs is not None and not dense.up.is_meta:
        hidden = hidden_values(dense, region, inputs.rows)
    return dense, neuron_groups(dense, layer.experts, layer.init, layer.name, hidden)


def _check_independent(layer: LayerPlan, region: Region, dense: MlpWeights) -> None:
    """Refuse to slice where a hidden value depends on other neurons (a softmax over them)."""
    module, width = region.program.module, dense.down.shape[1]
    if module is None or layer.slices == 1 or dense.inner:
        return
    part, halves = width // layer.slices, 2 if dense.gated else 1
    generator = generator_for(0, layer.name, "independent")
    rows = torch.randn(4, halves, width, generator=generator, device="cpu")
    with torch.no_grad():
        try:
            whole = module(rows.flatten(1))[:, :part]
            alone = module(rows[:, :, :part].flatten(1))
            same = torch.allclose(whole, alone, rtol=1e-4, atol=1e-5)
        except (RuntimeError, TypeError):  # it needs the whole width
            same = False
    if not same:
        what = layer.init.experts
        reason = f"its hidden neurons depend on one another: {what} cannot slice them; use copy"
        raise UnsupportedModuleError(layer.name, reason)


def hidden_values(dense: MlpWeights, region: Region, rows: Tensor) -> Tensor:
    """Return the hidden values [T, F] of a dense MLP without inner parameters, on the CPU."""
    bias = None if dense.up_bias is None else dense.up_bias.float().cpu()
    with torch.no_grad():
        hidden = nn.functional.linear(rows, dense.up.float().cpu(), bias)
        program = region.program
        if program.module is not None:
            found: Tensor = program.module(hidden)
            return found
        function = activation(program.activation)
        if not dense.gated:
            return function(hidden)
        gate, linear = hidden.chunk(2, 1)
        return function(gate) * linear


def _values_of(model: nn.Module) -> Callable[[str], Tensor]:
    """Return a function that reads a parameter without its graph, by its name."""
    return lambda name: model.get_parameter(name).detach()


def mlp_weights(parameter: Callable[[str], Tensor], region: Region) -> MlpWeights:
    """Return the dense weights of a site; `parameter` returns one by its name."""
    program = region.program
    ups = [_oriented(parameter, up) for up in region.ups]
    biases = [_bias(parameter, up) for up in region.ups]
    if program.swap and len(ups) == 2:
        ups, biases = ups[::-1], biases[::-1]
    up = ups[0] if len(ups) == 1 else torch.cat(ups)
    bias = None
    if any(b is not None for b in biases):
        full = [
            torch.zeros(u.shape[0], dtype=u.dtype, device=u.device) if b is None else b
            for u, b in zip(ups, biases, strict=True)
        ]
        bias = full[0] if len(full) == 1 else torch.cat(full)
    if program.swap and len(ups) == 1:
        up = torch.cat(up.chunk(2)[::-1])
        bias = None if bias is None else torch.cat(bias.chunk(2)[::-1])
    width = region.down.in_features
    names = zip(inner_names(program.params), program.params, strict=True)
    inner = {name: parameter(dense).expand(width) for name, dense in names}
    gated = up.shape[0] == 2 * width
    down = _oriented(parameter, region.down)
    return MlpWeights(up, bias, down, _bias(parameter, region.down), inner, gated)


def _oriented(parameter: Callable[[str], Tensor], linear: Linear) -> Tensor:
    weight = parameter(linear.weight.name)
    weight = weight.flatten(1) if weight.dim() > 2 else weight
    return weight.t() if linear.transposed else weight


def _bias(parameter: Callable[[str], Tensor], linear: Linear) -> Tensor | None:
    return None if linear.bias is None else parameter(linear.bias.name)
