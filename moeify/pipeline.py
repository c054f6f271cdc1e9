"""Find the sites of a model, apply a plan to them, and run the passes that build its blocks."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx, nn

from moeify.calibration import Calibration
from moeify.capture import ExampleInputs
from moeify.conversion import ATTRIBUTE
from moeify.discovery import Discovery
from moeify.errors import PassError, UnsupportedModuleError
from moeify.layer_plan import ResolvedPlan
from moeify.mesh import World
from moeify.passes.base import Fact, Pass, PlanContext
from moeify.passes.blocks import MOE_ROLE, SLICES, ZERO, block_path, find_site
from moeify.passes.dataflow import weight_of
from moeify.passes.find_mlps import FindMlps
from moeify.passes.gather_partitions import GatherPartitions
from moeify.passes.lower_kernels import LowerKernels
from moeify.passes.manager import PassManager
from moeify.passes.observers import Observer, observers_from_env
from moeify.passes.records import record_of
from moeify.passes.replace_mlps import ReplaceMlps
from moeify.plan import Plan
from moeify.refusing import discover_float, refuse_adapters, refuse_quantised
from moeify.resolve import resolve_sites

log = logging.getLogger("moeify")


def prepare(
    model: nn.Module, plan: Plan, example_inputs: ExampleInputs | None
) -> tuple[ExampleInputs, Discovery, ResolvedPlan]:
    """Find the model's sites and apply the plan to them; inputs are made up if there are none."""
    if example_inputs is None:
        from moeify.hf import example_inputs_for

        example_inputs = example_inputs_for(model)
    discovery = discover_float(model, example_inputs)
    resolved = resolve_sites(
        plan,
        discovery.sites,
        parameters=discovery.parameters,
        parameter_bytes=discovery.parameter_bytes,
        linears=discovery.linears,
        near_misses=[str(miss) for miss in discovery.near_misses],
    )
    for layer in resolved:
        refuse_quantised(model, [p.weight for p in (*layer.site.up, layer.site.down)])
    return example_inputs, discovery, resolved


def run_pipeline(
    model: nn.Module,
    plan: Plan,
    resolved: ResolvedPlan,
    discovery: Discovery,
    passes: Sequence[Pass] = (),
    world: World | None = None,
    before: Sequence[Pass] = (),
    inputs: Mapping[str, Calibration] | None = None,
    observers: Sequence[Observer] = (),
) -> Built:
    """Run the graph passes, some before the MLPs are replaced; the model is only read."""
    inputs = inputs or {}
    gm = discovery.capture.graph_module
    ctx = PlanContext(
        plan=plan,
        resolved=resolved,
        mesh=world,
        rank=0 if world is None else world.rank,
        world_size=1 if world is None else world.layout.world,
        facts=frozenset({Fact.CAPTURED, Fact.RESOLVED}),
        model=model,
    )
    outside = _outside(gm, discovery, resolved)
    replaced = ReplaceMlps(discovery, inputs=inputs)
    ours: list[Pass] = [FindMlps(discovery.regions), *before, replaced]
    if world is not None:
        from moeify.parallel_passes import parallel_passes, share_of

        shares = {layer.name: share_of(world, layer.experts) for layer in resolved}
        ours = [*ours[:-1], replace(replaced, shares=shares), *parallel_passes()]
    # Gathers hide calls of experts, which lower-kernels looks for.
    last: list[Pass] = [LowerKernels(), *([] if world is None else [GatherPartitions()])]
    manager = PassManager([*ours, *passes, *last], observers=[*observers_from_env(), *observers])
    gm = manager.run(gm, ctx).graph_module
    for report in manager.reports:
        log.debug("%s", report)
    blocks = {}
    for layer in resolved:
        path = block_path(find_site(discovery, layer), layer)
        block = gm.get_submodule(path)
        if not isinstance(block, fx.GraphModule):
            raise PassError(f"{path}: the pass that replaces MLPs was disabled or left no block")
        blocks[layer.name] = block
    left = _signature(
        node
        for node in gm.graph.nodes
        if (record := record_of(node)) is None or record.role != MOE_ROLE
    )
    foreign = sorted(set(left.items()) ^ set(outside.items()))
    if foreign:
        names = ", ".join(name for name, _ in foreign[:5])
        raise PassError(
            f"a pass changed the graph outside the MoE blocks ({names}): only blocks are installed "
            "in the model; run such a pass on moeify.export(model, example_inputs)"
        )
    return Built(blocks, gm.meta.get(SLICES), gm.meta.get(ZERO))


@dataclass(frozen=True, slots=True)
class Built:
    """What the passes made of a model.

    Attributes:
        blocks: The finished blocks by layer name.
        slices: How dense layers are sliced over the tensor ranks (a `SlicePlan`), or None.
        zero: What is partitioned (a `ZeroPlan`), or None.
    """

    blocks: dict[str, fx.GraphModule]
    slices: Any = None
    zero: Any = None


def _outside(
    gm: fx.GraphModule, discovery: Discovery, resolved: ResolvedPlan
) -> dict[str, tuple[str, str]]:
    """Return what must be left of the graph once the planned sites are gone."""
    chosen = {layer.site.down.weight for layer in resolved if layer.expert == "mlp"}
    inside = {n for r in discovery.regions if r.down.weight.name in chosen for n in r.nodes}
    linear = {layer.site.down.weight for layer in resolved if layer.expert == "linear"}
    inside |= {n for lin in discovery.linear_nodes if lin.weight.name in linear for n in lin.nodes}
    return _signature(node for node in gm.graph.nodes if node not in inside)


def _signature(nodes: Iterable[fx.Node]) -> dict[str, tuple[str, str]]:
    """Return what the nodes do, weights and their views left out."""
    return {n.name: (n.op, str(n.target)) for n in nodes if weight_of(n) is None}


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse what cannot be converted in place.

    Raises:
        UnsupportedModuleError: The model is already converted, wrapped or sharded.
        TypeError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if ATTRIBUTE in model.__dict__:
        raise UnsupportedModuleError(
            type(model).__name__, "it is converted already: call moeify.demoeify(model) first"
        )
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedModuleError(
            type(model).__name__, "convert the model inside first, then wrap it"
        )
    refuse_adapters(model)
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise UnsupportedModuleError(name, "it is sharded already: convert first, then shard")


__all__ = ["Built", "prepare", "refuse_wrapped", "run_pipeline"]
