"""A ZeRO decision carried out by torch's FSDP2: `fully_shard` on every unit, innermost first.

    stage 3: parameters are gathered for a unit's forward pass and again for its backward pass
    stage 2: gathered for the forward pass and kept until the unit's backward pass has run

In both, gradients are reduce-scattered as they come and `.grad` is this rank's piece, so that a
plain optimizer over `model.parameters()` keeps states of pieces only. Units of experts have their
own mesh: cut over "edp", beside the "ep" that they are sharded over.

Source:
    PyTorch FSDP2 (Zhao et al. 2023 for its principle); per-unit meshes: torchtitan.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from moeify import compat
from moeify.distributed.dtensor import is_sharded, local_of
from moeify.errors import PassError, UnsupportedModuleError
from moeify.zero.plan import Unit, ZeroPlan

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DTYPES", "cast", "settle", "shard"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def shard(
    model: nn.Module,
    zero: ZeroPlan,
    meshes: Mapping[str, DeviceMesh],
    divisors: Mapping[str, float],
    undo: ExitStack,
) -> None:
    """Partition a model's parameters in place; `undo` gets the callbacks that restore it.

    One-dimensional `meshes` and `divisors` (of the sum of gradients) are by name of the unit.
    """
    from torch.distributed.fsdp import fully_shard

    for module in model.modules():
        _remember(module, undo)
    if zero.precision != "model":
        held = torch.float32 if zero.master == "float32" else DTYPES[zero.precision]
        cast(model, held, undo)
    for unit in zero.units:
        _refuse_mixed(model, unit)
    units = sorted(zero.units, key=lambda unit: -_depth(unit.name))
    if not any(unit.name == "" for unit in units):
        units.append(Unit("", "dense", ()))  # the root runs the others' schedule
    for unit in units:
        module = model.get_submodule(unit.name)
        dims = {id(model.get_parameter(part.name)): part.dim or 0 for part in unit.parts}
        if isinstance(module, fx.GraphModule):
            module.register_forward_hook(_whole_output)
        mesh = meshes[unit.name] if unit.name in meshes else meshes[zero.units[0].name]
        fully_shard(
            module,
            mesh=mesh,
            # The root's backward pass begins as soon as its forward pass ends.
            reshard_after_forward=zero.stage == 3 and unit.name != "",
            shard_placement_fn=_placement(dims),
            mp_policy=_precision(zero, unit),
            offload_policy=_offload(zero, mesh),
        )
        _divide(module, mesh, divisors.get(unit.name, 1.0))
    for unit in units:
        sharded: Any = model.get_submodule(unit.name)
        if unit.around != unit.name:
            compat.span_fsdp(sharded, model.get_submodule(unit.around))
        if unit.after:
            sharded.set_modules_to_forward_prefetch([model.get_submodule(n) for n in unit.after])
        # Itself, which is gathered already: with an empty list FSDP2 would choose a unit.
        before = [model.get_submodule(n) for n in unit.before or (unit.name,)]
        sharded.set_modules_to_backward_prefetch(before)
    kept = [model.get_submodule(u.name) for u in units if zero.stage == 2 or u.around == ""]
    model.register_forward_pre_hook(partial(_reshard_stale, kept), prepend=True)
    model.register_forward_hook(partial(_reshard_unneeded, kept))


def settle(model: nn.Module) -> None:
    """Reshard the units that FSDP2 keeps whole for a backward pass.

    Between a forward pass with gradients and its backward pass `model.parameters()` are whole
    copies, which an optimizer or a checkpoint must not hold.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def check(model: nn.Module, zero: ZeroPlan) -> None:
    """Raise a PassError if the decision is about other parameters or shapes than the model's."""
    planned = zero.parts
    held = dict(model.named_parameters(remove_duplicate=False))
    seen: dict[int, str] = {}
    for name, part in planned.items():
        parameter = held.get(name)
        if parameter is None:
            raise PassError(f"partition-zero: {name} is not in the converted model")
        if (shape := tuple(local_of(parameter).shape)) != part.shape:
            raise PassError(f"partition-zero: {name} has shape {shape} here, not {part.shape}")
        seen[id(parameter)] = name
    for name, parameter in held.items():
        if id(parameter) not in seen:
            raise PassError(f"partition-zero: {name} is in no unit")


def cast(model: nn.Module, dtype: torch.dtype, undo: ExitStack) -> None:
    """Cast a model's floating-point parameters, not its buffers; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in list(module._parameters.items()):
            if parameter is None or not parameter.is_floating_point() or parameter.dtype == dtype:
                continue
            if not is_sharded(parameter):  # hooks stay
                undo.callback(setattr, parameter, "data", parameter.data)
                parameter.data = parameter.data.to(dtype)
                continue
            if id(parameter) not in made:  # the data of a DTensor cannot be set
                data = parameter.detach().to(dtype)
                made[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
            undo.callback(module._parameters.__setitem__, key, parameter)
            module._parameters[key] = made[id(parameter)]


def _divide(module: Any, mesh: DeviceMesh, divisor: float) -> None:
    """Let FSDP2 divide the sum of a unit's gradients."""
    if mesh.size() == 1:
        # FSDP2 would divide twice here: as it copies, and again after that.
        module.set_all_reduce_hook(partial(_divided, divisor))
        return
    module.set_gradient_divide_factor(divisor)
    if mesh.device_type == "cpu":
        module.set_force_sum_reduction_for_comms(True)  # gloo has no average


def _divided(divisor: float, gradients: Tensor) -> None:
    if divisor != 1:
        gradients.div_(divisor)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _whole_output(module: nn.Module, args: Any, output: Any) -> Any:
    """Copy an output that is a view: in-place changes would drop FSDP2's backward hook."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _reshard_stale(units: list[Any], module: nn.Module, args: Any) -> None:
    """Reshard units that no backward pass has released: the optimizer may have stepped since."""
    for unit in units:
        unit.reshard()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _reshard_unneeded(units: list[Any], module: nn.Module, args: Any, output: Any) -> None:
    """Reshard units that are kept for a backward pass if there will be none."""
    if not torch.is_grad_enabled():
        for unit in units:
            unit.reshard()


def _depth(path: str) -> int:
    return path.count(".") + 1 if path else 0


def _placement(dims: Mapping[int, int]) -> Callable[[nn.Parameter], Any]:
    from torch.distributed.tensor import Shard

    return lambda parameter: Shard(dims.get(id(parameter), 0))


def _precision(zero: ZeroPlan, unit: Unit) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if zero.precision == "model":
        return MixedPrecisionPolicy()
    computed = DTYPES[zero.precision]
    return MixedPrecisionPolicy(
        param_dtype=computed,
        reduce_dtype=torch.float32 if zero.reduce == "float32" else computed,
        # Experts get rows in the right dtype, and combine weights that stay in float32.
        cast_forward_inputs=unit.kind == "dense",
    )


def _offload(zero: ZeroPlan, mesh: DeviceMesh) -> Any:
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

    if zero.offload == "none":
        return OffloadPolicy()
    return CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")


def _refuse_mixed(model: nn.Module, unit: Unit) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for part in unit.parts:
        parameter = model.get_parameter(part.name)
        if parameter.requires_grad:
            dtypes.setdefault(parameter.dtype, part.name)
        if parameter.dim() == 0:
            raise UnsupportedModuleError(
                part.name,
                "FSDP2 does not take parameters without dimensions: make it a tensor of one "
                "element, or set zero.engine: graph",
            )
        if not local_of(parameter).is_contiguous():
            raise UnsupportedModuleError(part.name, "FSDP2 does not take non-contiguous parameters")
    if len(dtypes) > 1:
        each = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
        raise UnsupportedModuleError(
            unit.name or type(model).__name__,
            f"FSDP2 takes one dtype per unit, and {each}: convert the model to one dtype first, or "
            "set zero.precision",
        )


def _remember(module: nn.Module, undo: ExitStack) -> None:
    """Let `undo` restore everything that `fully_shard` changes in a module."""
    former, state = type(module), dict(module.__dict__)
    tables = [(value, value.copy()) for value in state.values() if isinstance(value, dict)]

    def restore() -> None:
        compat.forget_fsdp(module)
        module.__class__ = former
        module.__dict__.clear()
        module.__dict__.update(state)
        for table, content in tables:  # the same objects, which handles of hooks refer to
            table.clear()
            table.update(content)

    undo.callback(restore)
