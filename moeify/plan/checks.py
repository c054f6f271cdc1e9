"""What must hold for the layers of a resolved plan; every failure names the field at fault."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from moeify.plan.strict_yaml import Where

if TYPE_CHECKING:
    from moeify.plan.layer_plan import LayerPlan
    from moeify.plan.plan import Plan

_Fault: TypeAlias = tuple[str, str]


def check_layer(plan: Plan, layer: LayerPlan, stated: Mapping[str, Where]) -> None:
    """Check one layer, of which `stated` has the place of each field that a rule states.

    Raises:
        PlanError: Something does not fit; the message names the first field at fault.
    """
    for dotted, message in _faults(plan, layer):
        where = stated.get(dotted)
        if where is None:
            # A default of the rule itself has no place of its own: point at the rule.
            parts = tuple(dotted.split("."))
            where = parts if len(parts) > 1 else ("layers", layer.rule)
        raise plan.fault(where, f"{layer.name}: {message}")


def _faults(plan: Plan, layer: LayerPlan) -> Iterator[_Fault]:
    yield from _routing(layer)
    yield from _granular(layer)
    yield from _split(layer)
    yield from _models(layer)
    yield from _layout(plan, layer)


def _routing(layer: LayerPlan) -> Iterator[_Fault]:
    experts, top_k, router = layer.experts, layer.top_k, layer.router
    if top_k > experts:
        yield "top_k", f"top_k {top_k} is more than its {experts} experts; use at most {experts}"
    if router.combine == "straight_through" and top_k > 1:
        yield (
            "router.combine",
            f"straight_through needs top_k 1, not {top_k}; use normalized or auto",
        )
    if router.combine == "sum" and layer.init.experts != "split":
        yield "router.combine", "sum is for slices: it needs `init: {experts: split}`; use auto"
    if router.noise == "rsample" and top_k != 1:
        yield "router.noise", f"rsample needs top_k 1, not {top_k}; use jitter or none"
    if router.noise == "gumbel" and top_k != 2:
        yield "router.noise", f"gumbel draws a second expert: top_k 2, not {top_k}"


def _granular(layer: LayerPlan) -> Iterator[_Fault]:
    slices, site = layer.init.granularity, layer.site
    if layer.init.experts != "granular":
        if slices > 1:
            yield "init.granularity", f"{slices} slices need `init: {{experts: granular}}`"
        return
    if layer.expert == "linear":
        yield "init.experts", "granular slices hidden neurons; a linear layer has none; use copy"
    if site.inner:
        yield "init.experts", f"granular cannot slice the inner norm {site.inner[0]}; use copy"
    if layer.experts % slices:
        yield "experts", f"{layer.experts} experts are not a multiple of granularity {slices}"
    if layer.top_k % slices:
        yield (
            "top_k",
            f"top_k {layer.top_k} is not a multiple of granularity {slices}; use top_k {slices}",
        )
    if site.d_ff % slices:
        yield "init.granularity", f"hidden width {site.d_ff} does not divide by {slices}"
    if layer.top_k < 2:
        yield "top_k", "granular needs top_k of at least 2; use copy for top_k 1"
    if layer.router.combine != "normalized":
        yield "router.combine", f"granular needs normalized, not {layer.router.combine}"


def _split(layer: LayerPlan) -> Iterator[_Fault]:
    site, experts, init = layer.site, layer.experts, layer.init
    if init.experts != "split":
        if init.clusters != "weights":
            yield "init.clusters", f"{init.clusters} needs `init: {{experts: split}}`"
        if init.router == "clusters":
            yield "init.router", "clusters needs `init: {experts: split}`; use normal or hidden"
        return
    if layer.expert == "linear":
        yield "init.experts", "split divides hidden neurons; a linear layer has none; use copy"
    if site.inner:
        yield "init.experts", f"split cannot cut the inner norm {site.inner[0]}; use copy"
    if site.d_ff % experts:
        near = nearest_divisors(site.d_ff, experts)
        yield (
            "experts",
            f"hidden width {site.d_ff} does not divide over {experts} experts; use {near}",
        )
    if layer.router.combine != "sum":
        yield "router.combine", f"split needs sum, not {layer.router.combine}; use auto"


def _models(layer: LayerPlan) -> Iterator[_Fault]:
    init, count = layer.init, len(layer.init.from_)
    if init.experts != "models":
        if count:
            yield "init.from", "checkpoints need `init: {experts: models}`"
        if init.rest != "average":
            yield "init.rest", f"{init.rest} needs `init: {{experts: models}}`"
        return
    if layer.expert == "linear":
        yield "init.experts", "models takes MLPs; a linear layer is not one; use copy"
    if not count:
        yield "init.from", "models needs the folders of the checkpoints"
    elif layer.experts % count:
        yield (
            "experts",
            f"{layer.experts} experts are not a multiple of the {count} checkpoints; use {count}",
        )


def check_layers(plan: Plan, layers: Sequence[LayerPlan]) -> None:
    """Refuse a linear layer inside another selected MLP, and layers made from other checkpoints."""
    _refuse_overlap(plan, layers)
    made = [layer for layer in layers if layer.init.experts == "models"]
    for layer in made[1:]:
        first = made[0]
        for key, one, other in (
            ("from", first.init.from_, layer.init.from_),
            ("rest", first.init.rest, layer.init.rest),
        ):
            if one != other:
                raise plan.fault(
                    ("layers", layer.rule),
                    f"{layer.name}: init.{key} differs from that of {first.name}; use one for all",
                )


def nearest_divisors(number: int, count: int) -> str:
    """Name the divisors of `number` on both sides of `count`."""
    below = next((n for n in range(min(count, number), 0, -1) if number % n == 0), 1)
    above = next((n for n in range(count, number + 1) if number % n == 0), None)
    return str(below) if above is None else f"{below} or {above}"


def _layout(plan: Plan, layer: LayerPlan) -> Iterator[_Fault]:
    experts, ranks = layer.experts, plan.parallel.expert
    if experts % ranks and ranks % experts:
        yield (
            "experts",
            f"{experts} experts do not divide over an expert axis of {ranks}; "
            f"use {_nearest_counts(experts, ranks)}",
        )
    tensor = plan.parallel.tensor
    if plan.parallel.experts_in_tp == "slice" and layer.expert == "mlp":
        width = layer.site.d_ff // layer.slices
        if width % tensor:
            yield (
                "parallel.tensor",
                f"hidden width {width} does not slice over a tensor axis of {tensor}; "
                "use experts_in_tp: replicate",
            )


def _nearest_counts(experts: int, ranks: int) -> str:
    """Name the counts next to `experts` that divide over the ranks, or into them."""
    # Below the number of ranks, the divisors of it work; from there on, its multiples.
    above = -(-experts // ranks) * ranks
    divisors = [count for count in range(1, min(experts, ranks)) if ranks % count == 0]
    below = experts // ranks * ranks if experts > ranks else max(divisors)
    if experts < ranks:
        above = next(count for count in range(experts, ranks + 1) if ranks % count == 0)
    return f"{below} or {above}"


def _refuse_overlap(plan: Plan, layers: Sequence[LayerPlan]) -> None:
    owner = {
        projection.weight: layer.name
        for layer in layers
        if layer.expert == "mlp"
        for projection in (*layer.site.up, layer.site.down)
    }
    for layer in layers:
        if layer.expert == "linear" and (name := owner.get(layer.site.down.weight)):
            raise plan.fault(
                ("layers", layer.rule, "select"),
                f"`{layer.name}` is part of `{name}`, which another rule selects; drop one of them",
            )
