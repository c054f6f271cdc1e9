"""Tensor parallelism of dense layers: what is sliced, and slicing it.

A column-wise projection keeps one block of its outputs on each rank, the row-wise one after it
the matching block of its inputs; what the ranks compute there is summed by an all-reduce. Outside
such a pair every value is whole and the same on all tensor ranks, so nothing else has to know.
`moeify.tensor_parallel.derive` decides which pairs there are.

Source:
    Megatron-LM (Shoeybi et al. 2019), section 3; DTensor's `parallelize_module`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from moeify.distributed.collectives import copy_to_slices
from moeify.distributed.reads import read_through
from moeify.errors import PlanError
from moeify.nn.block import DenseMLP, StoredLinear
from moeify.sites.install import HOOK_TABLES

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Way = Literal["colwise", "rowwise"]


@dataclass(frozen=True, slots=True)
class SlicedPair:
    """Projections that are sliced together."""

    name: str  # path of the module that runs it
    kind: str  # "attention" or "mlp"
    colwise: tuple[str, ...]  # the projections whose outputs are sliced
    rowwise: str  # the projection that sums the slices up
    # Whole parameters used between them, such as a norm over each head: every rank has the gradient
    # of its own slice only, and `apply` sums them over the tensor ranks.
    partial: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, Way]:
        """Return how each of its modules is sliced, by path."""
        return {**dict.fromkeys(self.colwise, "colwise"), self.rowwise: "rowwise"}


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """What is sliced over the tensor ranks, and what is not."""

    tensor: int
    pairs: tuple[SlicedPair, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()  # (name, reason) of what stays whole on every rank
    # Sliced dense branches of Residual-MoE blocks, which exist once the blocks are in the model.
    branches: tuple[str, ...] = ()

    @property
    def modules(self) -> dict[str, Way]:
        """Return how each module of the dense model is sliced, by path."""
        return {path: way for pair in self.pairs for path, way in pair.modules.items()}

    def lines(self) -> Iterator[str]:
        """Yield one sentence for each layer, for logs and tables."""
        for pair in self.pairs:
            ups = ", ".join(path.removeprefix(f"{pair.name}.") for path in pair.colwise)
            down = pair.rowwise.removeprefix(f"{pair.name}.")
            yield f"{pair.name}: sliced over {self.tensor} ranks: {ups} by column, {down} by row"
        for path in self.branches:
            yield f"{path}: sliced over {self.tensor} ranks"
        for name, reason in self.refused:
            yield f"{name}: whole on every tensor rank: {reason}"


@dataclass(slots=True)
class AppliedSlices:
    """What has been sliced, and how to undo it."""

    _steps: list[Callable[[], None]] = field(default_factory=list)

    def undo(self) -> None:
        """Put the original parameter objects back, with their former values, and remove our hooks.

        What was trained since stays in the slices. This object keeps the whole weights in memory.
        """
        while self._steps:
            self._steps.pop()()


def apply(model: nn.Module, plan: SlicePlan, tp_mesh: DeviceMesh) -> AppliedSlices:
    """Slice a model in place. Every rank holds the same weights before; nothing is sent.

    With dropout between sliced projections each rank drops units of its own slice: in training the
    numbers are then not those of one process, as with any tensor parallelism. The gradients of
    `SlicedPair.partial` are summed where their modules read these parameters: whatever reads them
    otherwise has to sum them itself.
    """
    if tp_mesh.ndim != 1 or tp_mesh.size() != plan.tensor:
        raise PlanError(
            f"the slices are for {plan.tensor} tensor ranks, the mesh has {tuple(tp_mesh.shape)}: "
            'give `mesh["tp"]` of the mesh that the plan was resolved for',
            path="parallel.tensor",
        )
    applied = AppliedSlices()
    if plan.tensor == 1:
        return applied
    steps = applied._steps
    try:
        for path, way in plan.modules.items():
            _slice(model.get_submodule(path), way, tp_mesh, steps)
        for path in plan.branches:
            branch = model.get_submodule(path)
            assert isinstance(branch, DenseMLP)
            for name in branch.up_names:
                _slice(branch.get_submodule(name), "colwise", tp_mesh, steps)
            _slice(branch.get_submodule(branch.down_name), "rowwise", tp_mesh, steps)
        for path, leaves in _by_module(plan).items():
            _sum_reads(model.get_submodule(path), path, leaves, tp_mesh, steps)
    except BaseException:
        applied.undo()
        raise
    return applied


def _by_module(plan: SlicePlan) -> dict[str, tuple[str, ...]]:
    """Return the names of `SlicedPair.partial` by the path of their module."""
    found: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(name for pair in plan.pairs for name in pair.partial):
        path, _, leaf = name.rpartition(".")
        found[path] = (*found.get(path, ()), leaf)
    return found


_SUMS = "_moeify_sums"  # attribute of a module: tensor group, and path for messages


def _sum_reads(
    module: nn.Module,
    path: str,
    leaves: tuple[str, ...],
    mesh: DeviceMesh,
    undo_steps: list[Callable[[], None]],
) -> None:
    """Let reads of whole parameters that slices use sum their gradients over the tensor ranks."""
    undo = ExitStack()
    undo_steps.append(undo.close)
    module.__dict__[_SUMS] = mesh.get_group().group_name, path
    undo.callback(module.__dict__.pop, _SUMS)
    read_through(module, leaves, _read_summed, undo)


def _read_summed(module: nn.Module, leaf: str) -> Any:
    parameter: Any = module._parameters[leaf]
    if parameter is None or not torch.is_grad_enabled():
        return parameter
    group, path = module.__dict__[_SUMS]
    return copy_to_slices(parameter, group, f"{path}.{leaf}")


def _slice(
    module: nn.Module, way: Way, mesh: DeviceMesh, undo_steps: list[Callable[[], None]]
) -> None:
    """Slice one projection; add to `undo_steps` what undoes it."""
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    parameters = dict(module._parameters)
    tables: list[dict[Any, Any]] = [
        table for name in HOOK_TABLES if isinstance(table := getattr(module, name), dict)
    ]
    hooks, attributes = [set(table) for table in tables], set(module.__dict__)
    ours: list[set[Any]] = []
    added: set[str] = set()

    def undo() -> None:
        module._parameters.update(parameters)
        for table, keys in zip(tables, ours, strict=False):
            for key in keys:
                table.pop(key, None)
        for name in added:
            module.__dict__.pop(name, None)

    undo_steps.append(undo)
    if isinstance(module, StoredLinear):
        _slice_stored(module, way, mesh)
    else:
        style = ColwiseParallel() if way == "colwise" else RowwiseParallel()
        parallelize_module(module, mesh, style, src_data_rank=None)
    ours += [set(table) - before for table, before in zip(tables, hooks, strict=True)]
    added |= set(module.__dict__) - attributes
    for key, parameter in parameters.items():
        if parameter is not None:
            _own_memory(module, key, parameter)


def _slice_stored(module: StoredLinear, way: Way, mesh: DeviceMesh) -> None:
    """Do to a `StoredLinear` what the parallel styles do to `nn.Linear`."""
    from torch.distributed.tensor import (
        DTensor,
        Placement,
        Replicate,
        Shard,
        distribute_module,
        distribute_tensor,
    )

    by_column = way == "colwise"
    places: dict[str, Placement] = {
        "weight": Shard(0 if by_column != module.transposed else 1),
        "bias": Shard(0) if by_column else Replicate(),
    }
    given: Placement = Replicate() if by_column else Shard(-1)

    def cut(name: str, owner: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in list(owner.named_parameters(recurse=False)):
            made = distribute_tensor(parameter, mesh, [places[key]], src_data_rank=None)
            sliced = nn.Parameter(made, requires_grad=parameter.requires_grad)
            owner.register_parameter(key, sliced)

    def enter(owner: nn.Module, inputs: Any, mesh: DeviceMesh) -> Any:
        return DTensor.from_local(inputs[0], mesh, [given], run_check=False)

    def leave(owner: nn.Module, output: Any, mesh: DeviceMesh) -> Any:
        whole = output if by_column else output.redistribute(placements=[Replicate()])
        return whole.to_local()

    distribute_module(module, mesh, cut, enter, leave)


def _own_memory(module: nn.Module, key: str, whole: nn.Parameter) -> None:
    """Copy a slice that is a view of the whole weight, which it would keep in memory."""
    from torch.distributed.tensor import DTensor

    sliced = module._parameters[key]
    assert isinstance(sliced, DTensor)
    local = sliced.to_local()
    if whole.is_meta or local.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
        return
    made = DTensor.from_local(
        local.detach().clone(),
        sliced.device_mesh,
        sliced.placements,
        run_check=False,
        shape=sliced.shape,
        stride=sliced.stride(),
    )
    module._parameters[key] = nn.Parameter(made, requires_grad=whole.requires_grad)
