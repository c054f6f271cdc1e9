"""ZeRO inside the graph: a parameter is this rank's piece, and whatever reads it gathers it first.

In MoE blocks `passes/gather_partitions.py` makes each gather a node. Modules outside of blocks are
no graphs: there a property of the parameter's name gathers, so that every read does. Neither is a
hook, so that a compiler sees all of a step in one graph.

Like FSDP, every rank must read what the others read: a read that depends on the data hangs.

Source:
    ZeRO: Rajbhandari et al. 2020, section 5. Gathers traced with the model: SimpleFSDP (Zhang et
    al. 2024, arXiv 2411.00284).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from moeify.errors import PassError, UnsupportedModuleError
from moeify.zero.fsdp2 import DTYPES
from moeify.zero.gather import Gathering, gathered, regathering
from moeify.zero.plan import Part, Unit, ZeroPlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from moeify.distributed.mesh import World

__all__ = ["gather", "partition", "run"]

_TABLE = "_moeify_gathers"
"""Where a module keeps how its own parameters are gathered, by name."""
_RUNNING = "_moeify_regathering"
"""Where a model keeps the contexts of the forward passes that run."""


def gather(module: nn.Module, name: str) -> Tensor:
    """Return a parameter whole: gathered if it has been partitioned, else as it is.

    Args:
        module: A module.
        name: The parameter's name in it.

    Raises:
        DispatchError: A peer died or went another way.
    """
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
    """Call a module with these values in the place of its parameters.

    Args:
        module: A module.
        names: Names of its parameters.
        values: What `gather` returned for each.
        args: Its arguments.
        kwargs: Its arguments by name.
    """
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
    """Leave each rank its piece of every parameter, under its name; nothing is sent.

    Pieces are DTensors over "dp" or "edp" and what the parameter lay on before. Gradients are
    reduced by the gathers: nothing else may reduce them or sum those of `summed`.

    Args:
        model: With its blocks installed and its dense layers sliced; real or on `meta`.
        zero: Of stage 2 or 3.
        world: Its meshes; every rank calls this, in the same order.
        counts: Number of experts by the name of their unit.
        divisors: What the sum of a unit's gradients over its ranks is divided by, by its name.
        summed: Whole parameters of which a tensor rank has the gradient of its own slice only.
        undo: Gets what brings the former parameters and classes back. While it can, the whole
            parameters stay in memory.

    Raises:
        UnsupportedModuleError: A module reads its parameters past their names.
        PassError: The decision is about a parameter of another shape.
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
                how = _summed(how, world.dense["tp"])
            piece = _piece(parameter, part, mesh, _kept(parameter, zero))
            for owner, leaf in places[id(parameter)]:
                _replace(owner, leaf, piece, how, undo)
                if (id(owner), leaf) not in nodes:
                    classes.setdefault(id(owner), (owner, []))[1].append(leaf)
    for owner, leaves in classes.values():
        undo.callback(setattr, owner, "__class__", type(owner))
        owner.__class__ = _reading(type(owner), tuple(sorted(leaves)))
    if zero.precision != "model":
        _cast_inputs(model, zero, undo)
    if zero.stage == 3:
        # Of the whole model, not of each module: checkpointing within it must have the last word.
        undo.callback(model.register_forward_pre_hook(_enter).remove)
        undo.callback(model.register_forward_hook(_leave, always_call=True).remove)


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Return where each parameter is, tied ones in several places."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, leaf))
    return places


def _check(model: nn.Module) -> None:
    """Refuse what would read a parameter without its being gathered.

    Raises:
        UnsupportedModuleError: There is such a module.
    """
    every = {id(p) for p in model.parameters()}
    for path, module in model.named_modules():
        own = any(p is not None for p in module._parameters.values())
        reason = ""
        if own and isinstance(module, torch.jit.ScriptModule):
            reason = "a scripted module reads its parameters past Python"
        elif own and isinstance(module, fx.GraphModule):
            reason = "a graph module with parameters of its own makes its class anew"
        elif every & set(_aside(module)):
            reason = "it keeps parameters in other attributes as well, as recurrent layers do"
        if reason:
            raise UnsupportedModuleError(
                path, f"{reason}, so no gather can be put before it; use `zero: {{engine: fsdp2}}`"
            )


def _aside(module: nn.Module) -> list[int]:
    """Return the identities of the tensors among a module's plain attributes, lists of them too."""
    found = []
    for value in module.__dict__.values():
        listed = value if isinstance(value, list | tuple) else (value,)
        found += [id(item) for item in listed if isinstance(item, Tensor)]
    return found


def _gathered_by_nodes(model: nn.Module) -> set[tuple[int, str]]:
    """Return the parameters, as (identity of their module, name), that a node gathers."""
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
    """Return the mesh of all dimensions, of which a piece uses those it lies on."""
    return world.sparse(counts[unit.name]) if part.over == "edp" else world.dense


def _gathering(
    parameter: Any, part: Part, mesh: DeviceMesh, world: World, zero: ZeroPlan, factor: float
) -> Gathering:
    rest = None
    if hasattr(parameter, "to_local") and part.kind == "dense":
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


def _summed(how: Gathering, mesh: DeviceMesh) -> Gathering:
    return replace(how, summed=mesh.get_group().group_name)


def _kept(parameter: Tensor, zero: ZeroPlan) -> torch.dtype:
    """Return the dtype that the optimizer updates."""
    if zero.precision == "model" or not parameter.is_floating_point():
        return parameter.dtype
    return torch.float32 if zero.has_masters else DTYPES[zero.precision]


def _piece(parameter: Any, part: Part, mesh: DeviceMesh, dtype: torch.dtype) -> nn.Parameter:
    """Return this rank's piece of a parameter, in memory of its own."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    sharded = hasattr(parameter, "to_local")
    local: Tensor = (parameter.to_local() if sharded else parameter).detach()
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
    over = mesh[names]
    placements = [own, *(parameter.placements if sharded else ())]
    made = DTensor.from_local(
        local,
        over,
        placements,
        run_check=False,
        shape=parameter.shape,
        stride=torch.empty(parameter.shape, device="meta").stride(),
    )
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
    if owner.__dict__.get("sharded") and how.rest is None:  # gathered, it is no DTensor
        undo.callback(setattr, owner, "sharded", True)
        owner.sharded = False  # type: ignore[assignment]


_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _reading(base: type[nn.Module], leaves: tuple[str, ...]) -> type[nn.Module]:
    """Return a class like `base`, of the same name, in which these parameters read as whole."""
    if (base, leaves) not in _CLASSES:
        made: dict[str, Any] = {leaf: property(_reader(leaf)) for leaf in leaves}
        made |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
        made |= {"__doc__": base.__doc__, "__reduce_ex__": _reduce, "_moeify_base": (base, leaves)}
        _CLASSES[base, leaves] = type(base.__name__, (base,), made)
    return _CLASSES[base, leaves]


def _reader(leaf: str) -> Callable[[nn.Module], Any]:
    def read(self: nn.Module) -> Any:
        parameter: Any = self._parameters[leaf]
        table = self.__dict__.get(_TABLE)
        return parameter if table is None else gathered(parameter, table[leaf])

    return read


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copy and pickle by the class that this one was made from: it has no name to be found by."""
    found: Any = object.__reduce_ex__(self, 2)
    return _rebuilt, self._moeify_base, *found[2:]


def _rebuilt(base: type[nn.Module], leaves: tuple[str, ...]) -> nn.Module:
    made = _reading(base, leaves)
    return made.__new__(made)


def _cast_inputs(model: nn.Module, zero: ZeroPlan, undo: ExitStack) -> None:
    """Cast floating inputs of layers as FSDP2 does; what a block reads its layer has cast."""
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
