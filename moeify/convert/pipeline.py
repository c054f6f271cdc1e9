"""From a plan to finished blocks: find the sites, apply the plan, run the passes in their order."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from torch import fx, nn

from moeify.capture.capture import ExampleInputs
from moeify.distributed.dtensor import is_sharded
from moeify.distributed.mesh import World
from moeify.errors import PassError, UnsupportedModuleError
from moeify.hf.detect import example_inputs_for
from moeify.init.calibration import Calibration
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.find_mlps import FindMlps
from moeify.passes.gather_partitions import GatherPartitions
from moeify.passes.hierarchical_all_to_all import HierarchicalAllToAll
from moeify.passes.infra.base import Pass, PlanContext
from moeify.passes.infra.manager import PassManager
from moeify.passes.infra.observers import Observer, observers_from_env
from moeify.passes.infra.order import order_passes
from moeify.passes.infra.records import record_of
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.join_routers import JoinRouters
from moeify.passes.lower_kernels import LowerKernels
from moeify.passes.match.dataflow import weight_of
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.partition_zero import PartitionZero, zero_of
from moeify.passes.replace_mlps import ReplaceMlps
from moeify.passes.rewrite.blocks import MOE_ROLE
from moeify.passes.rewrite.facts import CHECKS
from moeify.passes.shard_experts import ShardExperts, share_of
from moeify.passes.slice_dense import SliceDense, slices_of
from moeify.passes.slice_experts import SliceExperts
from moeify.plan.layer_plan import LayerPlan, ResolvedPlan
from moeify.plan.plan import Plan
from moeify.plan.resolve import resolve_sites
from moeify.sites.discovery import Discovery, block_path, find_site
from moeify.sites.record import ATTRIBUTE
from moeify.sites.unsupported import discover_float, refuse_adapters, refuse_quantised
from moeify.tensor_parallel.apply import SlicePlan
from moeify.zero.plan import ZeroPlan

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class PassInputs:
    """What passes are made from."""

    discovery: Discovery
    world: World | None = None
    # the graph was recorded with these; made from the config if None
    example_inputs: ExampleInputs | None = None
    # experts of each layer that this rank keeps; all where missing
    shares: Mapping[str, range] = field(default_factory=dict)
    # inputs of the MLPs, by layer name, where `init` looks at them
    calibrated: Mapping[str, Calibration] = field(default_factory=dict)
    user_passes: Sequence[Pass] = ()


Needs = Literal["", "ranks", "tensor ranks"]
Make = Callable[[PassInputs], Sequence[Pass]]

PIPELINE: Final[Sequence[tuple[Needs, Make]]] = (
    # The dense graph: everything that reads it comes before the pass that replaces parts of it.
    ("", lambda it: [FindMlps(it.discovery.regions)]),
    ("tensor ranks", lambda it: [SliceDense(it.discovery, it.example_inputs)]),
    ("", lambda it: [ReplaceMlps(it.discovery, it.shares, it.calibrated)]),
    # Each rank keeps its experts, and tokens travel to them.
    ("ranks", lambda it: [ShardExperts()]),
    ("ranks", lambda it: [InsertAllToAll()]),
    # The exchange is refined; whole first, then in pieces, then each piece in two stages.
    ("ranks", lambda it: [CoordinateAllToAll()]),
    ("ranks", lambda it: [SliceExperts()]),
    ("ranks", lambda it: [OverlapChunks()]),
    ("ranks", lambda it: [HierarchicalAllToAll()]),
    # What is decided about modules, once it is known what this rank holds of them.
    ("ranks", lambda it: [JoinRouters()]),
    ("ranks", lambda it: [PartitionZero()]),
    # `passes=` of the user, unless their facts ask for another place.
    ("", lambda it: it.user_passes),
    # The device's kernels, where no pass has put anything between dispatch, experts and combine.
    ("", lambda it: [LowerKernels()]),
    # Last: it turns the calls of experts, which other passes look for, into functions.
    ("ranks", lambda it: [GatherPartitions()]),
)
"""The passes in the order in which they run, each with what it needs to run at all."""


def passes_for(inputs: PassInputs) -> list[Pass]:
    """Make the passes of one conversion, the user's own among them.

    A pass of the user comes after the last pass that provides what it requires and before the
    first one that requires what it provides; where that leaves a choice, right before
    `lower-kernels`. The order of `PIPELINE` stays as it is.
    """
    world = inputs.world
    tensor = world is not None and world.layout.tensor > 1
    available = {"": True, "ranks": world is not None, "tensor ranks": tensor}
    passes = [p for needs, make in PIPELINE if available[needs] for p in make(inputs)]
    users = {id(p) for p in inputs.user_passes}
    fixed = {p.name for p in passes if id(p) not in users}
    checked = frozenset(str(fact) for fact in CHECKS)
    return order_passes(passes, given=checked, fixed=fixed)


@dataclass(frozen=True, slots=True)
class Built:
    """What the passes made of a model."""

    blocks: dict[str, fx.GraphModule]  # by layer name
    slices: SlicePlan | None = None
    zero: ZeroPlan | None = None


def read_plan(model: nn.Module, plan: Plan | Mapping[str, Any] | str | os.PathLike[str]) -> Plan:
    """Read the plan, and refuse a model that no plan can convert."""
    refuse_wrapped(model)
    return Plan.of(plan)


def prepare(
    model: nn.Module, plan: Plan, example_inputs: ExampleInputs | None
) -> tuple[ExampleInputs, Discovery, ResolvedPlan]:
    """Find the model's sites and apply the plan to them; inputs are made up if there are none."""
    if example_inputs is None:
        example_inputs = example_inputs_for(model)
    discovery = discover_float(model, example_inputs)
    resolved = resolve_on(plan, discovery)
    for layer in resolved:
        refuse_quantised(model, [p.weight for p in (*layer.site.up, layer.site.down)])
    return example_inputs, discovery, resolved


def resolve_on(plan: Plan, found: Discovery) -> ResolvedPlan:
    """Apply a plan to what was found in a model."""
    return resolve_sites(
        plan,
        found.sites,
        parameters=found.parameters,
        parameter_bytes=found.parameter_bytes,
        linears=found.linears,
        near_misses=[str(miss) for miss in found.near_misses],
    )


def run_pipeline(
    model: nn.Module,
    plan: Plan,
    resolved: ResolvedPlan,
    discovery: Discovery,
    *,
    passes: Sequence[Pass] = (),
    world: World | None = None,
    example_inputs: ExampleInputs | None = None,
    calibrated: Mapping[str, Calibration] | None = None,
    observers: Sequence[Observer] = (),
) -> Built:
    """Run the passes of `PIPELINE` and the user's; the model is only read."""
    shares = {} if world is None else {la.name: share_of(world, la.experts) for la in resolved}
    inputs = PassInputs(discovery, world, example_inputs, shares, calibrated or {}, passes)
    observers = [*observers_from_env(), *observers]
    manager = PassManager(passes_for(inputs), observers=observers, checks=CHECKS)
    gm = discovery.capture.graph_module
    outside = _outside(gm, discovery, resolved)
    ctx = PlanContext(plan=plan, resolved=resolved, mesh=world, model=model)
    gm = manager.run(gm, ctx).graph_module
    for report in manager.reports:
        log.debug("%s", report)
    blocks = {layer.name: _block(gm, discovery, layer) for layer in resolved}
    _refuse_changes_outside(gm, outside)
    return Built(blocks, slices_of(gm), zero_of(gm))


def _block(gm: fx.GraphModule, discovery: Discovery, layer: LayerPlan) -> fx.GraphModule:
    path = block_path(find_site(discovery, layer), layer)
    block = gm.get_submodule(path)
    if not isinstance(block, fx.GraphModule):
        raise PassError(f"{path}: the pass that replaces MLPs was disabled or left no block")
    return block


def _refuse_changes_outside(gm: fx.GraphModule, outside: dict[str, tuple[str, str]]) -> None:
    """Compare the graph around the blocks with what it was: only blocks are installed."""
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


def _outside(
    gm: fx.GraphModule, discovery: Discovery, resolved: ResolvedPlan
) -> dict[str, tuple[str, str]]:
    """Return what must be left of the graph once the planned sites are replaced."""
    chosen = {layer.site.down.weight for layer in resolved if layer.expert == "mlp"}
    inside = {n for r in discovery.regions if r.down.weight.name in chosen for n in r.nodes}
    linear = {layer.site.down.weight for layer in resolved if layer.expert == "linear"}
    inside |= {n for lin in discovery.linear_nodes if lin.weight.name in linear for n in lin.nodes}
    return _signature(node for node in gm.graph.nodes if node not in inside)


def _signature(nodes: Iterable[fx.Node]) -> dict[str, tuple[str, str]]:
    """Return what the nodes do, weights and their views left out."""
    return {n.name: (n.op, str(n.target)) for n in nodes if weight_of(n) is None}


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse a model that is already converted, wrapped or sharded."""
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
        if is_sharded(parameter) or is_sharded(parameter.data):
            raise UnsupportedModuleError(name, "it is sharded already: convert first, then shard")
