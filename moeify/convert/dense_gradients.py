"""Gradients by dense weights of a converted model, from the gradients of what took their place.

Experts that start as copies or slices are a linear map of the dense weights, `P = A W`:

    dense weights W --A--> experts P --block--> output

A block that computes the dense function does so for all W, so by the chain rule the dense gradient
is `A^T dP`: for copies, the sum over the experts. A dense branch beside them adds its own. This
holds whatever else of the model trains.

Shapes: E experts, w hidden neurons of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from moeify.convert.world import gradient_factor
from moeify.distributed.layout import Layout
from moeify.init.calibration import Calibration
from moeify.init.weights import branch_scale, experts_from, mlp_weights, split_groups
from moeify.nn.block import DenseMLP
from moeify.nn.experts import Experts
from moeify.passes.match.mlp_regions import Region
from moeify.passes.match.placement import parameter_names
from moeify.plan.layer_plan import LayerPlan, ResolvedPlan
from moeify.sites.discovery import Discovery, find_site
from moeify.sites.record import ConvertedLayer, Fate


@dataclass(frozen=True, slots=True)
class Source:
    """A parameter, and what its gradient adds to the gradients by dense weights."""

    parameter: nn.Parameter
    into: Callable[[Tensor], Mapping[str, Tensor]]  # by name in the dense model


def untouched(model: nn.Module, names: Iterable[str]) -> list[Source]:
    """Return those of the named parameters that are in the model and train, as they are."""
    parameters = dict(model.named_parameters())
    found = ((name, parameters[name]) for name in names if name in parameters)
    return [Source(p, partial(_itself, name)) for name, p in found if p.requires_grad]


class ReplacedWeights:
    """The dense weights that blocks replace; made from the dense model.

    Args:
        model: The dense model.
        inputs: What goes into the MLPs by layer name, where `init` looks at it.
    """

    def __init__(
        self,
        model: nn.Module,
        resolved: ResolvedPlan,
        discovery: Discovery,
        inputs: Mapping[str, Calibration],
    ) -> None:
        self._sites: dict[str, Region] = {}
        self._groups: dict[str, Tensor | None] = {}
        self.weights: dict[str, nn.Parameter] = {}
        for layer in resolved:
            found = find_site(discovery, layer)
            if found is None:  # the layer of `expert: linear` stays in its block
                projection = layer.site.down
                names = [n for n in (projection.weight, projection.bias) if n is not None]
            else:
                self._sites[layer.name] = found.region
                self._groups[layer.name] = split_groups(model, layer, found, inputs.get(layer.name))
                names = list(parameter_names(found.region))
            weights = {name: model.get_parameter(name) for name in names}
            self.weights |= {n: p for n, p in weights.items() if p.is_floating_point()}

    def dense(self) -> list[Source]:
        """Return the weights themselves."""
        return [Source(p, partial(_itself, name)) for name, p in self.weights.items()]

    def converted(
        self,
        model: nn.Module,
        layers: Iterable[ConvertedLayer],
        ledger: Mapping[str, tuple[Fate, str]],
        layout: Layout | None,
    ) -> list[Source]:
        """Return what stands for them in the converted model; `layout` is that of its ranks."""
        sources = [
            Source(model.get_parameter(ledger[name][1]), partial(_itself, name))
            for name in self.weights
            if ledger[name][0] != "copied"
        ]
        for converted in layers:
            block, layer = model.get_submodule(converted.block), converted.layer
            experts = block.get_submodule("experts")
            if isinstance(experts, Experts):
                factor = 1.0 if layout is None else gradient_factor(layout, layer.experts, block)
                for name, parameter in experts.named_parameters(recurse=False):
                    into = partial(self._of_experts, layer, name, factor)
                    sources.append(Source(parameter, into))
            sources += _halved(block, layer)
        return sources

    def _of_experts(
        self, layer: LayerPlan, name: str, factor: float, grad: Tensor
    ) -> dict[str, Tensor]:
        """Return what the gradient of one tensor of all experts [E, ...] adds."""
        grad = (grad if grad.dtype == torch.float64 else grad.float()) * factor
        region = self._sites[layer.name]
        # The map is linear: the values do not matter, and have no memory.
        leaves = {
            n: grad.new_zeros(()).expand(self.weights[n].shape).requires_grad_()
            for n in parameter_names(region)
        }
        with torch.enable_grad():
            dense = mlp_weights(leaves.__getitem__, region)
            scale, groups = branch_scale(layer), self._groups[layer.name]
            start = experts_from(dense, layer, range(layer.experts), scale, groups).named()[name]
        if not start.requires_grad:  # a bias that only one half of the dense projection has
            return {}
        found = torch.autograd.grad(start, list(leaves.values()), grad, allow_unused=True)
        return {n: g for n, g in zip(leaves, found, strict=True) if g is not None}


def _itself(name: str, grad: Tensor) -> dict[str, Tensor]:
    return {name: grad}


def _halved(block: nn.Module, layer: LayerPlan) -> list[Source]:
    """Return the last projection of a dense branch that holds one half of the dense weights."""
    if layer.residual != "add":
        return []
    mlp = block.get_submodule("mlp")
    assert isinstance(mlp, DenseMLP)
    down, site = mlp.get_submodule(mlp.down_name), layer.site.down
    pairs = ((site.weight, down.weight), (site.bias, down.bias))
    return [
        Source(parameter, partial(_half, name))
        for name, parameter in pairs
        if name is not None and isinstance(parameter, nn.Parameter)
    ]


def _half(name: str, grad: Tensor) -> dict[str, Tensor]:
    return {name: grad * 0.5}
