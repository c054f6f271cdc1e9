"""ZeRO inside the graph: a parameter is this rank's piece, and whatever reads it gathers it first.

In MoE blocks `passes/gather_partitions.py` makes each gather a node. Outside of blocks a property
of the parameter's name gathers at every read. Neither is a hook, so that a compiler sees all of a
step in one graph.

As with FSDP, every rank must read the same parameters: a read that depends on the data hangs.

Source:
    ZeRO: Rajbhandari et al. 2020, section 5. Gathers traced with the model: SimpleFSDP (Zhang et
    al. 2024, arXiv 2411.00284).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from moeify.distributed.dtensor import from_local, is_sharded, local_of
from moeify.distributed.reads import read_through
from moeify.errors import PassError, UnsupportedModuleError
from moeify.zero.fsdp2 import DTYPES
from moeify.zero.gather import Gathering, gathered, regathering
from moeify.zero.plan import Part, Unit, ZeroPlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moeify.distributed.mesh import World

__all__ = ["gather", "partition", "run"]

_TABLE = "_moeify_gathers"  # attribute of a module: how its own parameters are gathered, by name
_RUNNING = "_moeify_regathering"  # attribute of a model: the contexts of running forward passes


def gather(module: nn.Module, name: str) -> Tensor:
    """Return a parameter whole: gathered if it has been partitioned, else as it is."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    parameter: Any = owner._parameters[leaf]
    table = getattr(owner, _TABLE, None)
    if table is None or leaf not in table:
        return parameter  # type: ignore[no-any-return]
    return gathered(parameter, table[leaf])  # type: ignore[no-any-return]


def run(
    module: nn.Module, names: Sequence[str], values: Sequence[Tensor], *args: Any, **kwargs: Any
) -> Any:
    """Call a module with values that `gather` returned in place of its parameters."""
    given = dict(zip(names, values, strict=True))
    return torch.func.functional_call(module, given, args, kwargs)


def partition(
    model: nn.Module,
    zero: ZeroPlan,
    world: World,
    counts: Mapping[str, int],
    divisors: Mapping[str, float],
    summed: Collection[str],
    undo: ExitStack,
) -> None:
    """Replace every parameter by this rank's piece, under the same name; nothing is sent.

    Pieces are DTensors over "dp" or "edp" and the parameter's former mesh. Gradients are reduced by
    the gathers: nothing else may reduce them or sum those of `summed`.

    `counts` (of experts) and `divisors` (of the sum of gradients) are by name of the unit; of the
    parameters in `summed`, a tensor rank has the gradient of its own slice only. `undo` gets the
    callbacks that restore the model; until it is closed, whole parameters stay in memory.
    """
    places = _places(model)
    _check(model)
    nodes = _gathered_by_nodes(model)
    classes: dict[int, tuple[nn.Module, list[str]]] = {}
    for unit in zero.units:
        for part in unit.parts:
            mesh = _mesh(part, unit, world, counts)
            parameter: Any = model.get_parameter(part.name)
            how = _gathering(parameter, part, mesh, world, zero, 1 / divisors[unit.name])
            if part.name in summed and world.layout.tensor > 1:
                how = replace(how, summed=world.dense["tp"].get_group().group_name)
            piece = _piece(parameter, part, mesh, _optimizer_dtype(parameter, zero))
            for owner, leaf in places[id(parameter)]:
                _replace(owner, leaf, piece, how, undo)
                if (id(owner), leaf) not in nodes:
                    classes.setdefault(id(owner), (owner, []))[1].append(leaf)
    for owner, leaves in classes.values():
        read_through(owner, tuple(sorted(leaves)), _read, undo)
    if zero.precision != "model":
        _cast_inputs(model, zero, undo)
    if zero.stage == 3:
        # Hooks of the whole model, not of each module: checkpointing within it takes precedence.
        undo.callback(model.register_forward_pre_hook(_enter).remove)
        undo.callback(model.register_forward_hook(_leave, always_call=True).remove)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return the owners and names of each parameter by id; tied ones have several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    return places


def _check(model: nn.Module) -> None:
    """Refuse modules that would read a parameter without gathering it."""
    every = {id(p) for p in model.parameters()}
    for path, module in model.named_modules():
        own = any(p is not None for p in module._parameters.values())
        reason = ""
        if own and isinstance(module, torch.jit.ScriptModule):
            reason = "a scripted module reads its parameters outside of Python"
        elif own and isinstance(module, fx.GraphModule):
            reason = "a graph module with parameters of its own rebuilds its class"
        elif every & set(_tensor_attributes(module)):
            reason = "it keeps parameters in other attributes as well, as recurrent layers do"
        if reason:
            raise UnsupportedModuleError(
                path, f"{reason}, so no gather can be put before it; use `zero: {{engine: fsdp2}}`"
            )


def _tensor_attributes(module: nn.Module) -> list[int]:
    """Return the ids of the tensors in a module's plain attributes and in lists there."""
    found = []
    for value in module.__dict__.values():
        listed = value if isinstance(value, list | tuple) else (value,)
        found += [id(item) for item in listed if isinstance(item, Tensor)]
    return found


def _gathered_by_nodes(model: nn.Module) -> set[tuple[int, str]]:
    """Return the parameters that a node gathers, as (id of their module, name)."""
    found = set()
    for block in model.modules():
        if not isinstance(block, fx.GraphModule):
            continue
        for node in block.graph.find_nodes(op="call_function", target=gather):
            holder, name = node.args
            assert isinstance(holder, fx.Node)
            path, _, leaf = f"{holder.target}.{name}".rpartition(".")
            found.add((id(block.get_submodule(path)), leaf))
    return found


def _mesh(part: Part, unit: Unit, world: World, counts: Mapping[str, int]) -> DeviceMesh:
    """Return the mesh of all dimensions, of which a piece uses some."""
    return world.sparse(counts[unit.name]) if part.over == "edp" else world.dense


def _gathering(
    parameter: Any, part: Part, mesh: DeviceMesh, world: World, zero: ZeroPlan, factor: float
) -> Gathering:
    rest = None
    if is_sharded(parameter) and part.kind == "dense":
        rest = parameter.device_mesh, tuple(parameter.placements), parameter.shape
    floating = parameter.is_floating_point()
    dtype = DTYPES.get(zero.precision) if floating else None
    return Gathering(
        part.name,
        part.ranks,
        part.dim,
        0 if part.dim is None else part.shape[part.dim],
        mesh[part.over].get_group().group_name,
        world.reducing(mesh, part.over) if part.ranks > 1 else "",
        factor,
        dtype=dtype,
        reduce=torch.float32 if dtype is not None and zero.reduce == "float32" else None,
        again=zero.stage == 3,
        rest=rest,
    )


def _optimizer_dtype(parameter: Tensor, zero: ZeroPlan) -> torch.dtype:
    if zero.precision == "model" or not parameter.is_floating_point():
        return parameter.dtype
    return torch.float32 if zero.has_masters else DTYPES[zero.precision]


def _piece(parameter: Any, part: Part, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Parameter:
    """Return a copy of this rank's piece of a parameter."""
    from torch.distributed.tensor import Replicate, Shard

    sharded = is_sharded(parameter)
    local = local_of(parameter).detach()
    if tuple(local.shape) != part.shape:
        raise PassError(
            f"{part.name} is {tuple(local.shape)} on this rank, partition-zero decided about "
            f"{part.shape}: a later pass has changed it"
        )
    own: Any = Replicate()
    if part.dim is not None:
        size, rank = local.shape[part.dim], mesh[part.over].get_local_rank()
        each = -(-size // part.ranks)
        start = min(rank * each, size)
        local = local.narrow(part.dim, start, min(each, size - start))
        own = Shard(part.dim)
    local = local.to(dtype, copy=True, memory_format=torch.contiguous_format)
    names = (part.over, *(parameter.device_mesh.mesh_dim_names if sharded else ()))
    placements = [own, *(parameter.placements if sharded else ())]
    made = from_local(local, mesh[names], placements, parameter.shape)
    return nn.Parameter(made, requires_grad=parameter.requires_grad)


def _replace(
    owner: nn.Module, leaf: str, piece: nn.Parameter, how: Gathering, undo: ExitStack
) -> None:
    undo.callback(owner._parameters.__setitem__, leaf, owner._parameters[leaf])
    owner._parameters[leaf] = piece
    if _TABLE not in owner.__dict__:
        undo.callback(owner.__dict__.pop, _TABLE, None)
        owner.__dict__[_TABLE] = {}
    owner.__dict__[_TABLE][leaf] = how
    if owner.__dict__.get("sharded") and how.rest is None:  # gathered, it is a plain tensor
        undo.callback(setattr, owner, "sharded", True)
        owner.sharded = False  # type: ignore[assignment]


def _read(module: nn.Module, leaf: str) -> Any:
    parameter: Any = module._parameters[leaf]
    table = module.__dict__.get(_TABLE)
    return parameter if table is None else gathered(parameter, table[leaf])


def _cast_inputs(model: nn.Module, zero: ZeroPlan, undo: ExitStack) -> None:
    """Cast floating-point inputs of layers as FSDP2 does; a layer casts what its blocks read."""
    cast = partial(_cast, DTYPES[zero.precision])
    for name in dict.fromkeys(("", *(u.name for u in zero.units if u.kind == "dense"))):
        handle = model.get_submodule(name).register_forward_pre_hook(cast, with_kwargs=True)
        undo.callback(handle.remove)


def _cast(dtype: torch.dtype, module: nn.Module, args: Any, kwargs: Any) -> Any:
    return _as(dtype, args), _as(dtype, kwargs)


def _as(dtype: torch.dtype, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if type(value) in (tuple, list):
        return type(value)(_as(dtype, item) for item in value)
    if type(value) is dict:
        return {key: _as(dtype, item) for key, item in value.items()}
    return value


def _enter(model: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        return
    context = regathering()
    context.__enter__()
    model.__dict__.setdefault(_RUNNING, []).append(context)


def _leave(model: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        return
    if model.__dict__.get(_RUNNING):
        model.__dict__[_RUNNING].pop().__exit__(None, None, None)
