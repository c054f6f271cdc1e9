"""Find the MLPs of a model: capture, find the regions, decide how each is installed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moeify.capture.attribute_reads import AttributeRead
from moeify.capture.capture import Capture, ExampleInputs
from moeify.hf.detect import example_inputs_for
from moeify.passes.match.dataflow import Linear, linears_of
from moeify.passes.match.meaning import difference
from moeify.passes.match.mlp_regions import NearMiss, Region, find_regions
from moeify.passes.match.placement import Placement, Placer, parameter_names
from moeify.plan.layer_plan import LayerPlan
from moeify.plan.site import Projection, Site
from moeify.sites.other_runs import checks_for, evaluation_runs
from moeify.sites.run_check import RunCheck
from moeify.units import dtype_name


@dataclass(frozen=True, slots=True, eq=False)
class FoundSite:
    """A site with what is needed to replace it."""

    site: Site
    region: Region  # its first run in the graph
    placement: Placement
    watched: tuple[AttributeRead, ...] = ()  # attributes whose values are in the block


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """What was found in one model."""

    capture: Capture
    found: tuple[FoundSite, ...]  # in execution order, refused ones included
    regions: tuple[Region, ...]  # every run of every site
    linear_nodes: tuple[Linear, ...]  # every projection in the graph
    near_misses: tuple[NearMiss, ...]
    linears: tuple[Projection, ...]  # every `nn.Linear` that ran, once
    parameters: int  # elements, shared ones counted once
    parameter_bytes: int

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites, in execution order."""
        return tuple(found.site for found in self.found)


def discover(model: nn.Module, example_inputs: ExampleInputs | None = None) -> Discovery:
    """Run `model` a few times (on fake tensors where it can) and find its MLPs.

    They are those of the first run, on the inputs as they are, if other runs do not contradict: at
    other sizes, and in training mode.

    Raises:
        CaptureError: It does not run on these inputs, or they are None and cannot be made.
    """
    if example_inputs is None:
        example_inputs = example_inputs_for(model)
    recorded, later = evaluation_runs(model, example_inputs)
    regions, near = find_regions(recorded.graph_module.graph)
    placer = Placer(model, recorded)
    groups: dict[tuple[str, ...], list[Region]] = {}
    for region in regions:
        groups.setdefault(region.key, []).append(region)
    checks = checks_for(model, example_inputs, later) if groups else []
    placed = [(runs, _placement(placer, checks, runs)) for runs in groups.values()]
    names = _unique_names([(runs[0], placement) for runs, placement in placed])
    found, index = [], 0
    for (runs, placement), name in zip(placed, names, strict=True):
        refused = placement.install == "refused" and not placement.blocked
        site = _site(model, runs, placement, name, -1 if refused else index)
        index += not refused
        watched = checks[0].watched(runs[0].key, placement) if later and not refused else ()
        found.append(FoundSite(site, runs[0], placement, watched))
    parameters = list(model.parameters())
    linears = tuple(linears_of(recorded.graph_module.graph))
    return Discovery(
        recorded,
        tuple(found),
        tuple(regions),
        linears,
        tuple(near),
        _own_linears(model, linears),
        sum(p.numel() for p in parameters),
        sum(p.numel() * p.element_size() for p in parameters),
    )


def _placement(placer: Placer, checks: Sequence[RunCheck], runs: list[Region]) -> Placement:
    """Place one MLP as it runs in evaluation; refuse it if another run contradicts that."""
    place = placer.placement(runs)
    for run in runs[1:]:
        how = difference(runs[0].program, run.program)
        if how:
            reason = f"between its projections it does something else when it runs again: {how}"
            place = Placement("refused", reason, module=place.module)
    for check in checks:
        if place.install == "refused":
            break
        place = check.check(runs, place, placer)
    return place


def find_mlps(model: nn.Module, example_inputs: ExampleInputs | None = None) -> list[Site]:
    """List the MLPs of a model: where, how wide, and how each would be replaced.

    Args:
        model: Any module; it is not changed.
        example_inputs: A dict of keyword arguments, a tuple, or a tensor; made from the config of a
            Hugging Face model if None.

    Returns:
        The sites in execution order. One that cannot be replaced has `install == "refused"` and
        says why in `reason`.

    Raises:
        CaptureError: The model does not run on these inputs.

    Example:
        >>> import torch
        >>> nn = torch.nn
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> print(find_mlps(torch.nn.Sequential(mlp), torch.randn(2, 8))[0])
        0: 8 -> 32 -> 8, gelu, module swapped
    """
    return list(discover(model, example_inputs).sites)


def _unique_names(placed: list[tuple[Region, Placement]]) -> list[str]:
    names = []
    for region, placement in placed:
        names.append(placement.module or region.down.weight.name.rpartition(".")[0])
    counts = Counter(names)
    return [
        name if name and counts[name] == 1 else region.down.weight.name.rpartition(".")[0] or name
        for name, (region, _) in zip(names, placed, strict=True)
    ]


def _site(
    model: nn.Module, runs: list[Region], placement: Placement, name: str, index: int
) -> Site:
    region = runs[0]
    tensors = [model.get_parameter(n) for n in parameter_names(region)]
    weight = tensors[0]
    return Site(
        name=name,
        index=index,
        install=placement.install,
        reason=placement.reason,
        d_in=region.ups[0].in_features,
        d_ff=region.down.in_features,
        d_out=region.down.out_features,
        activation=region.program.activation,
        gated=region.program.gated,
        up=tuple(map(_projection, region.ups)),
        down=_projection(region.down),
        inner=region.program.params,
        calls=len(runs),
        dtype=dtype_name(weight.dtype),
        itemsize=weight.element_size(),
        parameters=sum(t.numel() for t in tensors),
        blocked=placement.blocked,
    )


def _projection(linear: Linear) -> Projection:
    path = linear.weight.name.rpartition(".")[0]
    return Projection(
        weight=linear.weight.name,
        bias=linear.bias.name if linear.bias else None,
        module=path or None,
        transposed=linear.transposed,
        in_features=linear.in_features,
        out_features=linear.out_features,
    )


def _own_linears(model: nn.Module, linears: tuple[Linear, ...]) -> tuple[Projection, ...]:
    """Return the `nn.Linear` layers that ran, each once, in execution order."""
    modules = dict(model.named_modules())
    seen: dict[str, Projection] = {}
    for linear in linears:
        path = linear.weight.name.rpartition(".")[0]
        if not linear.problem and isinstance(modules.get(path), nn.Linear):
            seen.setdefault(path, _projection(linear))
    return tuple(seen.values())


def find_site(discovery: Discovery, layer: LayerPlan) -> FoundSite | None:
    """Return the site that a layer plan is for, or None for `expert: linear`."""
    if layer.expert == "linear":
        return None
    return next(found for found in discovery.found if found.site.name == layer.site.name)


def block_path(site: FoundSite | None, layer: LayerPlan) -> str:
    """Return where the block goes in the model."""
    if site is None:
        return layer.site.name
    placement = site.placement
    return placement.module if placement.install == "module" else placement.block
