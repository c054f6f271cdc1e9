"""Which parameters of a block were made from which of the dense model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from moeify.hf.name_rules import fits, float32_patterns
from moeify.nn.block import DenseMLP
from moeify.nn.experts import Experts
from moeify.passes.match.attached import attributes_of
from moeify.sites.record import Conversion, ConvertedLayer


def descendants(model: nn.Module, converted: ConvertedLayer) -> dict[str, list[str]]:
    """Return the names of the block's parameters by the dense parameter that each comes from.

    A parameter of the experts may come from several: the first projections are joined. A router, a
    coefficient and the square maps of `expert: linear` come from none.
    """
    block, site = converted.block, converted.layer.site
    parts = model.get_submodule(block)
    found: dict[str, list[str]] = {}

    def note(dense: str | None, name: str) -> None:
        if dense is not None:
            found.setdefault(dense, []).append(f"{block}.{name}" if block else name)

    experts = getattr(parts, "experts", None)
    if not isinstance(experts, Experts):
        return {}
    first = "gate_up" if experts.gated else "up"
    for up in site.up:
        note(up.weight, f"experts.{first}_proj")
        note(up.bias, f"experts.{first}_bias")
    note(site.down.weight, "experts.down_proj")
    note(site.down.bias, "experts.down_bias")
    for inner, name in zip(site.inner, experts.inner_params, strict=True):
        note(inner, f"experts.{name}")
    mlp = getattr(parts, "mlp", None)
    if isinstance(mlp, DenseMLP):
        names = (*mlp.up_names, mlp.down_name)
        for projection, name in zip((*site.up, site.down), names, strict=True):
            note(projection.weight, f"mlp.{name}.weight")
            note(projection.bias, f"mlp.{name}.bias")
        for inner, name in zip(site.inner, mlp.param_names, strict=True):
            note(inner, f"mlp.{name}")
    return found


def all_descendants(model: nn.Module, record: Conversion) -> dict[str, list[str]]:
    """Return the `descendants` of all layers."""
    found: dict[str, list[str]] = {}
    for converted in record.layers:
        for name, made in descendants(model, converted).items():
            found.setdefault(name, []).extend(made)
    return found


def stays_float32(
    model: nn.Module, record: Conversion, dtype: torch.dtype
) -> Callable[[str], bool]:
    """Return a test for the tensors that stay in float32 when a model is cast while it is loaded.

    They are those that its class keeps, and what came from them.
    """
    patterns = float32_patterns(model, dtype)
    made = all_descendants(model, record).items() if patterns else ()
    names = {name for dense, each in made if fits(patterns, dense) for name in each}
    return lambda name: name in names or fits(patterns, name)


def carry_attributes(
    model: nn.Module, before: Mapping[str, nn.Parameter], layers: Iterable[ConvertedLayer]
) -> None:
    """Give the blocks' parameters the Python attributes of the dense ones that they come from.

    `before` has the dense model's parameters by name. That those which become one parameter agree
    was checked when the MLP was found.
    """
    now = dict(model.named_parameters(remove_duplicate=False))
    for converted in layers:
        for dense, made in descendants(model, converted).items():
            for name in made:
                if name in now and now[name] is not before[dense]:
                    now[name].__dict__.update(attributes_of(before[dense]))
