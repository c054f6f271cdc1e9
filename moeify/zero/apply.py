"""Carry out on a converted model what `partition-zero` decided.

At stages 0 and 1 parameters and gradients stay whole and `mf.optimizer` keeps this rank's states.
At stages 2 and 3 parameters become pieces, by FSDP2 or by gathers in the graph (`engine: graph`).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeify.distributed.dtensor import is_sharded, local_of
from moeify.distributed.exchange import is_coordinated
from moeify.zero import fsdp2, graph_engine
from moeify.zero.plan import Part, Unit, ZeroPlan
from moeify.zero.stage1 import Cut, Guard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moeify.distributed.mesh import World
    from moeify.plan.layer_plan import ResolvedPlan
    from moeify.tensor_parallel.apply import SlicePlan


__all__ = ["Partitioned", "partition"]


@dataclass(slots=True)
class Partitioned:
    """What the optimizer and checkpoints have to know; empty where parameters are pieces."""

    cuts: dict[str, Cut] = field(default_factory=dict)  # of optimizer states, by parameter name
    # This rank's pieces of the float32 weights, if the model holds less; the optimizer takes them.
    masters: dict[str, Tensor] = field(default_factory=dict)
    guard: Guard | None = None  # makes optimizers other than `mf.optimizer`'s refuse the parameters


@torch.no_grad()  # parameters of slices then read as themselves (`moeify.distributed.reads`)
def partition(
    model: nn.Module,
    zero: ZeroPlan,
    world: World,
    resolved: ResolvedPlan,
    blocks: dict[str, str],
    slices: SlicePlan | None,
    undo: ExitStack,
) -> Partitioned:
    """Partition a converted model's state in place; `undo` gets the callbacks that restore it.

    `blocks` are the paths of the blocks by layer name.
    """
    fsdp2.check(model, zero)
    counts = {f"{blocks[layer.name]}.experts": layer.experts for layer in resolved}
    if zero.stage >= 2:
        meshes = {unit.name: _mesh(unit, world, counts)[0] for unit in zero.units}
        divisors = {unit.name: _divisor(model, unit, world) for unit in zero.units}
        if zero.engine == "graph":
            partial = _partial(slices)
            graph_engine.partition(model, zero, world, counts, divisors, partial, undo)
        else:
            fsdp2.shard(model, zero, meshes, divisors, undo)
        return Partitioned()
    made = Partitioned()
    for unit in zero.units:
        mesh, joint = _mesh(unit, world, counts)
        for part in unit.parts:
            made.cuts[part.name] = _cut(model, part, mesh, joint, zero)
    if zero.precision != "model":
        dtype = fsdp2.DTYPES[zero.precision]
        if zero.has_masters:
            made.masters = _masters(model, zero, made.cuts, dtype)
        fsdp2.cast(model, dtype, undo)
    if zero.stage or zero.offload != "none" or zero.has_masters:
        made.guard = Guard.of(model)
        undo.callback(made.guard.remove)
    return made


def _mesh(unit: Unit, world: World, counts: dict[str, int]) -> tuple[DeviceMesh, DeviceMesh]:
    """Return the mesh that a unit is partitioned over, and the whole mesh that holds it."""
    if unit.parts and unit.parts[0].over == "edp":
        sparse = world.sparse(counts[unit.name])
        return sparse["edp"], sparse
    return world.dense["dp"], world.dense


def _divisor(model: nn.Module, unit: Unit, world: World) -> float:
    """Return what the sum of a unit's gradients is divided by, as without ZeRO."""
    dp = world.layout.dp
    if not unit.parts or unit.parts[0].over == "dp":
        return float(dp)
    block = model.get_submodule(unit.name.removesuffix(".experts"))
    return float(dp * world.layout.copies(coordinated=is_coordinated(block)))


def _partial(slices: SlicePlan | None) -> tuple[str, ...]:
    if slices is None:
        return ()
    return tuple(dict.fromkeys(name for pair in slices.pairs for name in pair.partial))


def _cut(model: nn.Module, part: Part, mesh: DeviceMesh, joint: DeviceMesh, zero: ZeroPlan) -> Cut:
    parameter: Any = model.get_parameter(part.name)
    dim = part.dim if zero.stage == 1 else None
    if not is_sharded(parameter):
        return Cut(mesh, mesh, dim)
    own = parameter.device_mesh.mesh_dim_names
    names = (*(mesh.mesh_dim_names or ()), *own)
    return Cut(mesh, joint[names], dim)


def _masters(
    model: nn.Module, zero: ZeroPlan, cuts: dict[str, Cut], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return this rank's float32 pieces of the weights that would lose bits in `dtype`."""
    masters = {}
    for name, part in zero.parts.items():
        parameter: Any = model.get_parameter(name)
        if not part.trains or parameter.dtype == dtype or not parameter.is_floating_point():
            continue
        cut = cuts[name]
        piece = local_of(parameter).detach()
        if cut.dim is not None:
            chunks = piece.chunk(cut.mesh.size(), cut.dim)
            rank = cut.mesh.get_local_rank()
            piece = chunks[rank] if rank < len(chunks) else piece.narrow(cut.dim, 0, 0)
        masters[name] = piece.to(torch.float32, copy=True)
    return masters
