"""Revert a conversion: back to the dense model, exactly where nothing has trained.

What the experts and the dense branch hold is merged into one MLP, written in the layout in which
the dense model stored it, and put into the skeletons that the conversion kept. Everything is
computed before anything is changed.

Shapes: D model width, F hidden width, E experts, G slices per copy; `wide` is F, or 2F if gated.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify import compat
from moeify.distributed.dtensor import is_sharded
from moeify.errors import UnsupportedModuleError
from moeify.hf.dense_class import become_dense
from moeify.init.merge import joined_columns, joined_rows, merged, same_bits, widened
from moeify.init.strategies import MlpWeights
from moeify.nn.block import DenseMLP, LinearExperts, ResidualMix, StoredLinear
from moeify.nn.experts import Experts
from moeify.nn.tap import TapScope
from moeify.plan.site import Projection
from moeify.sites.install import HOOK_TABLES
from moeify.sites.record import (
    ATTRIBUTE,
    Conversion,
    ConvertedLayer,
    Swap,
    require_conversion,
    require_one_process,
)
from moeify.train import losses

log = logging.getLogger("moeify")


def revert(model: nn.Module) -> None:
    """Turn a converted model back into the dense one, in place; see `moeify.demoeify`."""
    conversion = require_conversion(model)
    require_one_process(model, "demoeify")
    with torch.no_grad():
        layers = [RevertedLayer(model, converted) for converted in conversion.layers]
    _warn_of_averages([layer.name for layer in layers if not layer.exact])
    for layer in layers:
        layer.install()
    _forget(model, conversion)


def _warn_of_averages(names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        log.warning(
            "demoeify: the experts of %s%s are not copies of one another: they were averaged, and "
            "the dense model does not compute what the MoE model did",
            ", ".join(names[:3]),
            more,
        )


def _forget(model: nn.Module, conversion: Conversion) -> None:
    """Remove what the conversion left on the model besides its blocks."""
    for module in model.modules():
        TapScope.detach(module)
    for path, value in conversion.fused.items():
        compat.restore_fused_encoder(model.get_submodule(path), value)
    parallel = conversion.parallel
    if parallel is not None:
        for hooks in (parallel.reducer, parallel.guard):
            if hooks is not None:
                hooks.remove()
    del model.__dict__[ATTRIBUTE]
    losses.detach(model)
    become_dense(model)


class RevertedLayer:
    """The dense parts of one layer, ready to be put in place.

    The model is only read until `install`; what is not in this layer's block may be on meta.
    """

    def __init__(self, model: nn.Module, converted: ConvertedLayer) -> None:
        self.model, self.converted = model, converted
        self.name = converted.layer.name
        self.block = _block_of(model, converted)
        self.device = next(self.block.parameters()).device
        self.exact = True  # whether the parts compute what the block does before any training
        self.parameters: dict[str, nn.Parameter] = {}  # those of the block, by dense names
        self._tables: dict[str, dict[str, Any]] = {}
        self.modules: list[tuple[Swap, nn.Module]] = []
        experts = self.block.get_submodule("experts")
        if isinstance(experts, LinearExperts):
            self._fold(experts)
        elif isinstance(experts, Experts):
            self._merge(experts)
        else:
            kind = type(experts).__name__
            raise UnsupportedModuleError(self.name, f"its experts are {kind}, not what was put in")

    def install(self) -> None:
        """Fill the dense modules and put them where the block and its taps stand."""
        for name, parameter in self.parameters.items():
            self._tables[name][name.rpartition(".")[2]] = parameter
        for swap, module in reversed(self.modules):  # the block first: it holds the tap too
            for name in HOOK_TABLES:
                module.__dict__[name] = swap.replacement.__dict__[name]
            for buffer in module.buffers():
                buffer.data = buffer.data.to(self.device)
            if module.training != swap.replacement.training:
                module.train(swap.replacement.training)
            for parent in list(self.model.modules()):
                for key, child in parent._modules.items():
                    if child is swap.replacement:
                        parent._modules[key] = module

    # -- MLPs

    def _merge(self, experts: Experts) -> None:
        site = self.converted.layer.site
        dense = self._experts_as_one(experts)
        branch = self._branch()
        values: dict[str, tuple[Tensor, bool]] = {}
        for projection, (weight, bias) in zip(site.up, self._split(dense), strict=True):
            values |= self._place(projection, weight, bias, experts, "up")
        values |= self._place(site.down, dense.down, dense.down_bias, experts, "down")
        for i, (name, value) in enumerate(zip(site.inner, dense.inner, strict=True)):
            values[name] = (value, getattr(experts, f"inner_{i}").requires_grad)
        last = {site.down.weight, site.down.bias}
        for name, (value, trains) in values.items():
            table, held = self._table_of(name)
            value = self._stored(name, value, table[name.rpartition(".")[2]])
            if name in branch:
                held = branch[name]
                value = self._mixed(value, held, last=name in last)
            self._keep(name, table, value, trains, held)
        self.modules = [(swap, swap.original) for swap in self.converted.swaps]

    def _experts_as_one(self, experts: Experts) -> MlpWeights:
        """Return the one MLP that the experts make up: slices joined, copies merged."""
        layer, gated = self.converted.layer, experts.gated
        slices, split = layer.slices, layer.init.experts == "split"
        _refuse_sharded(self.name, experts.parameters())
        up = experts.gate_up_proj if gated else experts.up_proj
        up_bias = experts.gate_up_bias if gated else experts.up_bias
        down, down_bias = experts.down_proj, experts.down_bias
        if slices > 1:
            up = joined_rows(up, slices, gated=gated)
            up_bias = None if up_bias is None else joined_rows(up_bias, slices, gated=gated)
            down = joined_columns(down, slices, scaled=not split)
        one_bias = None if down_bias is None else self._one(down_bias)
        if split and one_bias is not None:  # each of the top-k has its part of it
            one_bias = one_bias * layer.top_k
        return MlpWeights(
            self._one(up),
            None if up_bias is None else self._one(up_bias),
            self._one(down),
            one_bias,
            tuple(self._one(getattr(experts, f"inner_{i}")) for i in range(experts.inner_params)),
            gated,
        )

    def _one(self, stacked: Tensor) -> Tensor:
        value, alike = merged(stacked)
        self.exact &= alike
        return value

    def _split(self, dense: MlpWeights) -> list[tuple[Tensor, Tensor | None]]:
        """Return (weight [out, in], bias) of each first projection, in the order of the site."""
        ups = self.converted.layer.site.up
        if self.converted.swap_halves and len(ups) == 1:
            halves = dense.up.chunk(2)[::-1]
            bias = None if dense.up_bias is None else torch.cat(dense.up_bias.chunk(2)[::-1])
            return [(torch.cat(halves), bias)]
        order = list(range(len(ups)))
        if self.converted.swap_halves:
            order.reverse()
        sizes = [ups[i].out_features for i in order]
        weights = torch.split(dense.up, sizes)
        biases: Sequence[Tensor | None] = [None] * len(ups)
        if dense.up_bias is not None:
            biases = torch.split(dense.up_bias, sizes)
        found = dict(zip(order, zip(weights, biases, strict=True), strict=True))
        return [found[i] for i in range(len(ups))]

    def _place(
        self,
        projection: Projection,
        weight: Tensor,
        bias: Tensor | None,
        experts: Experts,
        which: str,
    ) -> dict[str, tuple[Tensor, bool]]:
        """Return (value, requires_grad) by the names of the dense parameters."""
        first = "gate_up" if experts.gated and which == "up" else which
        trains = getattr(experts, f"{first}_proj").requires_grad
        placed = {projection.weight: (weight.t() if projection.transposed else weight, trains)}
        if projection.bias is not None and bias is not None:
            placed[projection.bias] = (bias, getattr(experts, f"{first}_bias").requires_grad)
        elif bias is not None and not bias.is_meta and bool(bias.any()):
            reason = "its experts have learned a bias, and the dense projection has none to hold it"
            raise UnsupportedModuleError(projection.module or projection.weight, reason)
        return placed

    def _stored(self, name: str, value: Tensor, like: Tensor) -> Tensor:
        """Return `value` in the shape in which the dense model stores it."""
        if value.numel() == like.numel():
            return value.reshape(like.shape)
        if like.numel() == 1:  # one number that was spread over the width
            return self._one(value.flatten()).reshape(like.shape)
        what = f"{tuple(value.shape)} does not fit the dense {tuple(like.shape)}"
        raise UnsupportedModuleError(self.name, f"{name}: {what}")

    # -- the dense branch of a residual block

    def _branch(self) -> dict[str, nn.Parameter]:
        """Return the parameters of the dense branch by their names in the dense model."""
        if self.converted.layer.residual == "none":
            return {}
        mlp, mix = self.block.get_submodule("mlp"), self.block.get_submodule("residual_mix")
        if not isinstance(mlp, DenseMLP) or not isinstance(mix, ResidualMix):
            raise UnsupportedModuleError(self.name, "its dense branch is not what was put in")
        coefficients = mix.parameters() if mix.coefficient is not None else ()
        if any(not p.is_meta and bool(p.any()) for p in coefficients):
            self.exact = False
        site = self.converted.layer.site
        found: dict[str, nn.Parameter] = {}
        for projection, name in zip(
            (*site.up, site.down), (*mlp.up_names, mlp.down_name), strict=True
        ):
            linear = mlp.get_submodule(name)
            assert isinstance(linear, StoredLinear)
            found[projection.weight] = linear.weight
            if projection.bias is not None and linear.bias is not None:
                found[projection.bias] = linear.bias
        found |= {n: mlp.get_parameter(p) for n, p in zip(site.inner, mlp.param_names, strict=True)}
        _refuse_sharded(self.name, found.values())
        return found

    def _mixed(self, moe: Tensor, mlp: Tensor, *, last: bool) -> Tensor:
        """Return one tensor for both branches: the first projections' mean, the last's sum."""
        if not last:
            return self._one(torch.stack([moe, mlp]))
        kind = self.converted.layer.residual
        if kind == "add":  # each branch holds one half
            self.exact &= same_bits(moe, mlp)
            return (widened(moe) + widened(mlp)).to(moe.dtype)
        if same_bits(moe if kind == "coefficient" else 2 * moe, mlp):
            return mlp
        self.exact = False
        share = 0.5 if kind == "coefficient" else 1.0  # a sigmoid's experts hold one half
        return (share * widened(moe) + 0.5 * widened(mlp)).to(moe.dtype)

    # -- `expert: linear`

    def _fold(self, experts: LinearExperts) -> None:
        """Multiply the experts into the layer after them."""
        projection = self.block.get_submodule("projection")
        if not isinstance(projection, nn.Linear):
            reason = (
                f"the layer after its experts is a {type(projection).__name__}, not an nn.Linear"
            )
            raise UnsupportedModuleError(self.name, reason)
        _refuse_sharded(self.name, [*experts.parameters(), *projection.parameters()])
        weight, bias = self._one(experts.weight), self._one(experts.bias)
        self.modules = [(swap, projection) for swap in self.converted.swaps]
        table, path = projection._parameters, self.converted.block
        old = projection.weight
        own, folded = widened(old.detach()), old.detach()
        if not weight.is_meta and not torch.equal(weight, torch.eye(len(weight)).to(weight)):
            folded = (own @ widened(weight)).to(old.dtype)
        self._keep(f"{path}.weight", table, folded, old.requires_grad, old)
        learned = not bias.is_meta and bool(bias.any())
        old_bias = projection.bias
        if old_bias is None:
            if learned:
                reason = "its experts have learned a bias, and the dense layer has none to hold it"
                raise UnsupportedModuleError(self.name, reason)
            return
        folded = old_bias.detach()
        if learned:
            folded = (own @ widened(bias) + widened(folded)).to(old_bias.dtype)
        self._keep(f"{path}.bias", table, folded, old_bias.requires_grad, old_bias)

    # -- both

    def _table_of(self, name: str) -> tuple[dict[str, Any], nn.Parameter | None]:
        """Return the table of a dense parameter, and the parameter if it is in the model."""
        path, _, leaf = name.rpartition(".")
        inside: nn.Module | None = None
        for swap in self.converted.swaps:
            if path == swap.path or path.startswith(swap.path + "."):
                inside = swap.original.get_submodule(path[len(swap.path) + 1 :])
        # A norm between tapped projections stayed where it was.
        table = (inside or self.model.get_submodule(path))._parameters
        if table.get(leaf) is None:
            raise UnsupportedModuleError(self.name, f"{name} is gone from the dense module")
        return table, table[leaf] if inside is None else None

    def _keep(
        self, name: str, table: dict[str, Any], value: Tensor, trains: bool, held: Tensor | None
    ) -> None:
        """Note a parameter to put in place: the one that is held, if it has this value."""
        self._tables[name] = table
        if (
            isinstance(held, nn.Parameter)
            and held.device == value.device
            and same_bits(held, value)
        ):
            self.parameters[name] = held
            return
        like = table[name.rpartition(".")[2]]
        fresh = torch.empty_like(like, dtype=value.dtype, device=value.device).copy_(value)
        self.parameters[name] = nn.Parameter(fresh, requires_grad=trains)


def _block_of(model: nn.Module, converted: ConvertedLayer) -> fx.GraphModule:
    block: nn.Module | None = None
    for swap in converted.swaps:
        try:
            current = model.get_submodule(swap.path)
        except AttributeError:
            current = None
        if current is not swap.replacement:
            found = "nothing" if current is None else f"a {type(current).__name__}"
            reason = f"{found} stands there instead of what moeify put in: put that back first"
            raise UnsupportedModuleError(swap.path, reason)
        if swap.path == converted.block:
            block = swap.replacement
    if not isinstance(block, fx.GraphModule):
        raise UnsupportedModuleError(converted.block, "it is not a MoE block")
    return block


def _refuse_sharded(name: str, parameters: Iterable[Tensor]) -> None:
    if any(is_sharded(p) or is_sharded(p.data) for p in parameters):
        raise UnsupportedModuleError(name, "its parameters are sharded: gather them first")
