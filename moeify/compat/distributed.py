"""Private torch APIs about process groups, DTensor, DDP and FSDP2."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, nn


def process_group(name: str) -> Any:
    """Return the process group of a name, the inverse of `ProcessGroup.group_name`.

    Private because torch takes names in its functional collectives only.

    Raises:
        LookupError: No group has that name.
    """
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d.__dict__["_resolve_process_group"]
    try:
        return resolve(name)
    except (LookupError, RuntimeError, ValueError) as error:
        raise LookupError(name) from error


def group_ranks(handle: Any) -> tuple[int, ...]:
    """Return the ranks of the group that a collective operator was given, by name or as an object.

    Private because an operator sees its group as a script object, which dispatch does not unbox.
    """
    import torch.distributed as dist

    if isinstance(handle, torch.ScriptObject):
        handle = dist.ProcessGroup.unbox(handle)
    group = process_group(handle) if isinstance(handle, str) else handle
    return tuple(dist.get_process_group_ranks(group))


def fake_store() -> Any:
    """Return a store for the process group "fake", in which collectives do nothing.

    Private because torch keeps this backend, which the import registers, among its test helpers.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def store_of_world() -> Any:
    """Return the key-value store through which the ranks found one another.

    Private because torch shows it to those who made it themselves only.
    """
    from torch.distributed import distributed_c10d

    get: Any = distributed_c10d.__dict__["_get_default_store"]
    return get()


def timeout_of_world() -> float:
    """Return the seconds after which a collective of the default group fails.

    Private because torch has no public way to read a group's timeout.
    """
    return min(_timeouts(), default=timedelta(minutes=30)).total_seconds()


def _timeouts() -> list[timedelta]:
    from torch.distributed import distributed_c10d

    world: Any = distributed_c10d.__dict__["_get_default_group"]()
    found = []
    for device in world._device_types:
        try:
            found.append(world._get_backend(device).options._timeout)
        except (AttributeError, RuntimeError):  # a fake group has none
            continue
    return found


def take_timeout_of_world(groups: Iterable[Any]) -> None:
    """Set the timeout of process groups to that of the default group.

    Groups made later, also those of device meshes, have the default of half an hour. Private
    because torch has no public way to read or set a group's timeout.
    """
    from torch.distributed import distributed_c10d

    world: Any = distributed_c10d.__dict__["_get_default_group"]()
    set_timeout: Any = distributed_c10d.__dict__["_set_pg_timeout"]
    timeouts = _timeouts()
    for group in groups if timeouts else ():
        if group is not world:
            set_timeout(min(timeouts), group)


def dtensor_like(local: Tensor, like: Any) -> Tensor:
    """Return a DTensor of a local tensor with the layout of another DTensor.

    Private because the public constructor does not take a layout but derives one.
    """
    make: Any = type(like)
    found: Tensor = make(local, like._spec, requires_grad=False)
    return found


def sharded_halves(local: Tensor, mesh: Any, placements: Any, shape: torch.Size, dim: int) -> Any:
    """Return a DTensor whose dimension `dim` is two halves, each sliced over the last mesh axis.

    A rank's slice of a fused gate and up projection is a piece of each half. Private because torch
    has that placement (`_StridedShard`) for its own FSDP over tensor parallelism only. As in FSDP2
    its spec claims to be an order of shards, which `full_tensor` corrects: otherwise torch plans an
    operation over three mesh axes for minutes, and a compiler drops the opposite claim.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor.placement_types import _StridedShard

    stride = torch.empty(shape, device="meta").stride()
    placements = (*placements[:-1], _StridedShard(dim, split_factor=2))
    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(shape, stride, local.dtype))
    make: Any = DTensor  # its constructor is untyped
    return make(local, spec, requires_grad=False)


def is_halves(placement: Any) -> bool:
    """Tell whether a placement is that of `sharded_halves`, a private class."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def full_tensor(tensor: Any) -> Tensor:
    """Return all of a DTensor, sliced halves included (`sharded_halves`).

    Private because torch 2.11 does not pass on to a gradient the flag in the parameter's spec.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.placement_types import _StridedShard

    spec = tensor._spec
    name = "use_strided_shard_as_shard_order"
    if getattr(spec, name, False) and any(isinstance(p, _StridedShard) for p in spec.placements):
        right = dataclasses.replace(spec, **{name: False})
        make: Any = DTensor
        tensor = make(tensor.to_local().detach(), right, requires_grad=False)
    gathered: Tensor = tensor.full_tensor()
    return gathered


def leave_out_of_ddp(model: nn.Module, names: list[str]) -> None:
    """Let a later DistributedDataParallel ignore the parameters that differ from rank to rank.

    Private because torch has no public name for it; DDP would overwrite them with those of rank 0.
    """
    from torch.nn.parallel import DistributedDataParallel

    if names:
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, names)


def inside_ddp() -> bool:
    """Tell whether the forward pass of a DistributedDataParallel is running.

    Private because torch keeps that for its compiler.
    """
    from torch.nn.parallel import DistributedDataParallel

    return getattr(DistributedDataParallel, "_active_ddp_module", None) is not None


def span_fsdp(inner: Any, around: Any) -> None:
    """Gather the parameters of an FSDP2 module for the whole forward of a module around it.

    Private because FSDP2 ties a group to the module it was made for. Hooks of the inner module
    break the graph of the outer one; on the outer one itself they run before its graph.
    """
    state = inner._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    state._pre_forward_hook_handle = around.register_forward_pre_hook(
        state._pre_forward, prepend=True, with_kwargs=True
    )
    state._post_forward_hook_handle = around.register_forward_hook(state._post_forward)


def forget_fsdp(module: nn.Module) -> None:
    """Let FSDP2 wrap a module again whose attributes were restored.

    Private because torch keeps a table of all modules that it has ever wrapped.
    """
    from torch.distributed import _composable_state

    _composable_state._module_state_mapping.pop(module, None)
