"""Every private torch API that moeify touches, in one place, each with the reason.

Tested on torch 2.11 and 2.13.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointFunction


def in_backward() -> bool:
    """Tell whether the autograd engine is running, that is, an activation is being recomputed.

    Private because torch offers no public way to know that a checkpointed forward runs again.
    Under a compiler the answer is a constant: recomputation is then a matter of the graph.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def is_exporting() -> bool:
    """Tell whether `torch.export` is tracing; torch 2.11 says so in every compilation."""
    return torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()


def fake_mode() -> Any:
    """Return a fresh `FakeTensorMode` that accepts real constants.

    Private because torch has no public name for running a model without its memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(mode: Any, tensor: Tensor) -> Tensor:
    """Return a fake twin of `tensor`: same shape, strides, dtype, class; meta becomes CPU.

    Masks and caches read values, which plain `meta` tensors refuse; fakes on a real device do not.
    """
    if tensor.device.type != "meta":
        return cast(Tensor, mode.from_tensor(tensor))
    with mode:
        twin = torch.empty_strided(
            tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device="cpu"
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(twin, requires_grad=tensor.requires_grad)
        return twin


def storage_key(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return what identifies the memory behind `tensor`, fake or real; None where it has none.

    Private because fake tensors have no data pointer; the storage's handle exists for both.
    """
    try:
        handle = tensor.untyped_storage()._cdata
        return handle, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
    except (NotImplementedError, RuntimeError):
        return None


def is_compiled_module(module: nn.Module) -> bool:
    """Tell whether `module` is the wrapper that `torch.compile` returns (a private class)."""
    from torch._dynamo.eval_frame import OptimizedModule

    return isinstance(module, OptimizedModule)


def disable_fused_encoder(module: nn.Module) -> tuple[str, Any] | None:
    """Turn off the fused evaluation kernel of torch's own encoder and its layers.

    That kernel reads `linear1.weight` and bypasses a replaced `linear1`. A layer asks
    `activation_relu_or_gelu` first, where 0 means "not fusable"; the encoder around asks
    `use_nested_tensor`.

    Returns:
        The attribute that was changed and its former value, or None for any other module.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        name, off = "activation_relu_or_gelu", 0
    elif isinstance(module, nn.TransformerEncoder) and hasattr(module, "use_nested_tensor"):
        name, off = "use_nested_tensor", False
    else:
        return None
    former = getattr(module, name)
    setattr(module, name, off)
    return name, former


def restore_fused_encoder(module: nn.Module, former: tuple[str, Any]) -> None:
    """Undo `disable_fused_encoder`."""
    setattr(module, *former)


def record_under_compiled_checkpointing() -> None:
    """Let the router keep its losses and counts inside a checkpointed region that is compiled.

    Without this switch dynamo refuses any attribute write there. It says what we want: the write
    happens in the forward and is not replayed by the recomputation in the backward. A private
    config, because torch has no public name for it.
    """
    from torch._dynamo import config

    if hasattr(config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
        config.skip_fwd_side_effects_in_bwd_under_checkpoint = True


def program_module(program: torch.export.ExportedProgram) -> fx.GraphModule:
    """Return an exported program as a module, without guards on its shapes.

    `check_guards` is named only where it exists. Private because the graph remembers the tracer
    that made it, which pickling would try to make again without its arguments.
    """
    known = inspect.signature(program.module).parameters
    options: dict[str, Any] = {"check_guards": False} if "check_guards" in known else {}
    made = program.module(**options)
    made.graph._tracer_cls = None
    return made


def call_structure(graph: fx.Graph) -> Any:
    """Return how an exported graph nests its arguments and results; None if it does not.

    Private because this lives in the graph's code generator, which pickling a graph leaves out.
    """
    from torch.fx.graph import _PyTreeCodeGen

    codegen = graph._codegen
    return codegen.pytree_info if isinstance(codegen, _PyTreeCodeGen) else None


def set_call_structure(graph: fx.Graph, structure: Any) -> None:
    """Give a graph the structure that `call_structure` returned; None makes it flat."""
    from torch.fx.graph import CodeGen, _PyTreeCodeGen

    graph.set_codegen(CodeGen() if structure is None else _PyTreeCodeGen(structure))


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator, also those that Python did not call, and what each is about to write.

    Private because torch documents dispatch modes but exports them from a private module.
    """

    supports_higher_order_operators = True

    def __init__(self, before_write: Callable[[Tensor], None] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before_write = before_write

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if self.before_write is not None:
            for tensor in _written(func, args, kwargs):
                self.before_write(tensor)
        if func is torch.ops.aten._grouped_mm.default:
            return _grouped_mm(func, args, kwargs)
        return func(*args, **kwargs)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Yield the tensors that an operator writes to."""
    schema = getattr(func, "_schema", None)
    if schema is None:
        return
    all_of_them = "batch_norm" in schema.name or "instance_norm" in schema.name  # not in the schema
    if not (schema.is_mutable or all_of_them):
        return
    for place, argument in enumerate(schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes or all_of_them:
            parts = value if isinstance(value, list | tuple) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor))


def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a grouped matmul; its shape function knows bfloat16 only."""
    first = args[0]
    if first.dtype == torch.bfloat16 or not is_fake(first):
        return func(*args, **kwargs)
    cast = [a.bfloat16() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]
    named = {
        k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in kwargs.items()
        if k != "out_dtype"
    }
    return func(*cast, **named).to(first.dtype)


def watching(*, before_write: Callable[[Tensor], None] | None = None) -> Any:
    """Return a mode in which every operator shows itself to Python.

    A `TorchFunctionMode` that is active then sees the operators that ran without Python, too.

    Args:
        before_write: Called with each tensor that an operator is about to write to.
    """
    return _Watch(before_write)


_around: list[Callable[..., Any]] = []


@contextmanager
def custom_functions(around: Callable[..., Any]) -> Iterator[None]:
    """Call `around(function, call, args, kwargs)` for each use of an `autograd.Function`.

    Torch has no hook for it, and `act = MyFunction.apply` is usually bound long before, so that
    replacing the method is not enough: what all these bound methods share is its code, which is
    exchanged for the duration. Calls by other threads pass through.

    Args:
        around: Must return `call()`.
    """
    method: Any = torch.autograd.Function.__dict__["apply"].__func__
    former = method.__code__
    original = FunctionType(
        former, method.__globals__, "apply", method.__defaults__, method.__closure__
    )
    if _around or len(former.co_freevars) != 1:  # in use by another thread, or another torch
        yield
        return
    thread = threading.get_ident()

    def handle(cls: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def call() -> Any:
            return original(cls, *args, **kwargs)

        if threading.get_ident() != thread or cls is CheckpointFunction:
            return call()
        return around(cls, call, args, kwargs)

    _around.append(handle)
    method.__code__ = _apply_code()
    try:
        yield
    finally:
        method.__code__ = former
        _around.clear()


def _apply_code() -> Any:
    cell = None

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        from moeify import compat  # runs with the globals of torch.autograd.function

        return cell and compat._around[-1](cls, args, kwargs)

    return apply.__code__


def is_fake(tensor: Tensor) -> bool:
    """Tell whether a tensor is a fake one."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the memory behind `tensor`, or None where it has none of its own."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return what identifies a storage, also that of a fake tensor, which has no data pointer."""
    key: int = storage._cdata
    return key


def copy_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a copy of a storage, out of sight of every active mode."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        copy: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call]
        return copy


def base_name(func: Any) -> tuple[str, str]:
    """Return (namespace, name) of an operator such as `aten::mul.Tensor`, else ("", its name).

    Private because operators show their schema only through a private attribute.
    """
    packet = getattr(func, "overloadpacket", func)
    if isinstance(packet, torch._ops.OpOverloadPacket):
        namespace, _, name = packet._qualified_op_name.partition("::")
        return namespace, name
    return "", str(getattr(func, "__name__", func))


def operator_name(target: object) -> tuple[str, str, str] | None:
    """Return (namespace, name, overload) of an operator of `torch.ops`, or None for anything else.

    Private because the classes of operators have no public names, and operators do not pickle.
    """
    if isinstance(target, torch._ops.OpOverload):
        namespace, _, name = target._schema.name.partition("::")
        return namespace, name, target._overloadname
    if isinstance(target, torch._ops.HigherOrderOperator):
        return "higher_order", str(target.name()), ""  # type: ignore[no-untyped-call]
    return None


def compile_cpp(source: str) -> Any:
    """Compile C++ for this processor with the compiler that Inductor uses, and load it.

    The library is kept in Inductor's cache, keyed by source and flags, behind a file lock; OpenMP
    is torch's own, so `torch.set_num_threads` holds. Private because torch's public way,
    `cpp_extension.load_inline`, needs ninja and takes a minute over torch's headers.

    Returns:
        A `ctypes.CDLL`.

    Raises:
        Exception: Whatever Inductor raises where there is no compiler or it fails.
    """
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(source, device_type="cpu", extra_flags=("-ffp-contract=fast",))


def fake_store() -> Any:
    """Return a store for the process group "fake", in which collectives do nothing.

    Private because torch keeps this backend, which the import registers, among its test helpers.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


def group_ranks(handle: Any) -> tuple[int, ...]:
    """Return the ranks of the group that a collective operator was given, by name or as an object.

    Private because an operator sees its group as a script object, which dispatch does not unbox.
    """
    import torch.distributed as dist

    if isinstance(handle, torch.ScriptObject):
        handle = dist.ProcessGroup.unbox(handle)
    group = process_group(handle) if isinstance(handle, str) else handle
    return tuple(dist.get_process_group_ranks(group))


class _Telling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells of every operator that runs on plain tensors, those inside a DTensor's included."""

    def __init__(self, tell: Callable[[Any, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tell = tell

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it turns into operators on its local tensors first
        self.tell(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def telling(tell: Callable[[Any, Any, Any], None]) -> Any:
    """Return a mode that calls `tell(operator, args, kwargs)` before each one, backward included.

    Private because torch documents dispatch modes but exports them from a private module.
    """
    return _Telling(tell)


def dtensor_like(local: Tensor, like: Any) -> Tensor:
    """Return a DTensor laid out as another one, with another local tensor.

    Private because the public constructor takes no layout but works out one of its own.
    """
    make: Any = type(like)
    found: Tensor = make(local, like._spec, requires_grad=False)
    return found


def named_arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments by the names in its schema (a private attribute)."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def node_number() -> int | None:
    """Return the number of the autograd node that is running, or None outside of a backward pass.

    Nodes are numbered in the order of the forward pass; those that accumulate gradients share a
    huge number. Private because torch shows it to its own tracers only.
    """
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def next_node_number() -> int:
    """Return the number that the next autograd node of this thread will have."""
    return int(torch._C._autograd._get_sequence_nr())


def sharded_halves(local: Tensor, mesh: Any, placements: Any, shape: torch.Size, dim: int) -> Any:
    """Return a DTensor whose dimension `dim` is two halves, each sliced over the last mesh axis.

    A rank's slice of a fused gate and up projection is a piece of each half. Private because torch
    has that placement (`_StridedShard`) for its own FSDP over tensor parallelism only. Like FSDP2's
    it calls itself an order of shards, which `full_tensor` sets right: torch plans an operation
    over three mesh axes for minutes otherwise, and a compiler forgets that it says otherwise.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
    from torch.distributed.tensor.placement_types import _StridedShard

    stride = torch.empty(shape, device="meta").stride()
    placements = (*placements[:-1], _StridedShard(dim, split_factor=2))
    spec = DTensorSpec(mesh, placements, tensor_meta=TensorMeta(shape, stride, local.dtype))
    make: Any = DTensor  # its constructor is untyped
    return make(local, spec, requires_grad=False)


def graph_task() -> int:
    """Return the number of the backward pass that runs here, -1 outside of one.

    A backward pass inside another has a number of its own. Private like `in_backward`.
    """
    return int(torch._C._current_graph_task_id())


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Let the autograd engine call `callback` once when the current backward pass ends.

    The engine owns it, and drops it uncalled when that pass raises. Private because torch has no
    public end of a backward pass; its own DDP and FSDP use this.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def process_group(name: str) -> Any:
    """Return the process group of a name, the inverse of `ProcessGroup.group_name`.

    Private because torch takes names in its functional collectives only.

    Raises:
        LookupError: There is none.
    """
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d.__dict__["_resolve_process_group"]
    try:
        return resolve(name)
    except (LookupError, RuntimeError, ValueError) as error:
        raise LookupError(name) from error


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Keep fake tensors from logging a traceback where an operator refuses their shapes.

    For runs that may fail. Private because the logger has the name of a private module.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    former = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = former


def restore_hooks(parameter: nn.Parameter) -> None:
    """Make a parameter's hooks work again after `torch.utils.swap_tensors`.

    `model.to()` uses it for a DTensor: the engine then no longer knows the hooks, which Python
    still lists. Private because the lists are; assigning one tells the engine.
    """
    parameter._backward_hooks = parameter._backward_hooks
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks


def take_timeout_of_world(groups: Iterable[Any]) -> None:
    """Give process groups the timeout that the user gave to the whole world.

    Groups made later, also those of device meshes, wait for the default of half an hour. Private
    because torch has no public way to read a group's timeout, nor to set it.
    """
    from torch.distributed import distributed_c10d

    world: Any = distributed_c10d.__dict__["_get_default_group"]()
    set_timeout: Any = distributed_c10d.__dict__["_set_pg_timeout"]
    timeouts = []
    for device in world._device_types:
        try:
            timeouts.append(world._get_backend(device).options._timeout)
        except (AttributeError, RuntimeError):  # a simulated one has none
            continue
    for group in groups if timeouts else ():
        if group is not world:
            set_timeout(min(timeouts), group)


def leave_out_of_ddp(model: nn.Module, names: list[str]) -> None:
    """Tell DistributedDataParallel, if it comes, which parameters differ from rank to rank.

    Private because torch has no public name for it; DDP would overwrite them with those of rank 0.
    """
    from torch.nn.parallel import DistributedDataParallel

    if names:
        ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
        ignore(model, names)


def full_tensor(tensor: Any) -> Tensor:
    """Return all of a DTensor, sliced halves included (`sharded_halves`).

    Private because torch 2.11 forgets for a gradient what the parameter's spec said of its halves.
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


def foreach_norm(tensors: list[Tensor], order: float, dtype: torch.dtype) -> list[Tensor]:
    """Return the norm of each tensor (of one device and dtype), with few kernels.

    Private by its name only; torch's own `clip_grad_norm_` uses it and always sums in the dtype
    of the gradients.
    """
    return list(torch._foreach_norm(tensors, order, dtype=dtype))


def foreach_mul_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors (of one device and dtype) in place by a 0-dim tensor; see `foreach_norm`."""
    torch._foreach_mul_(tensors, factor)


def version(tensor: Tensor) -> int:
    """Return how often the memory behind a tensor was written to in place, `.data` apart.

    Private because torch keeps the counter for its checks of saved tensors.
    """
    return int(tensor._version)


def is_halves(placement: Any) -> bool:
    """Tell whether a placement is that of `sharded_halves`, a private class."""
    from torch.distributed.tensor.placement_types import _StridedShard

    return isinstance(placement, _StridedShard)


def span_fsdp(inner: Any, around: Any) -> None:
    """Let the parameters of an FSDP2 module be gathered for the whole run of a module around it.

    Private because FSDP2 ties a group to the module it was made for. The hooks of a module inside
    another break the graph of the outer one; on the outer one itself they run before its graph.
    """
    state = inner._get_fsdp_state()
    state._pre_forward_hook_handle.remove()
    state._post_forward_hook_handle.remove()
    state._pre_forward_hook_handle = around.register_forward_pre_hook(
        state._pre_forward, prepend=True, with_kwargs=True
    )
    state._post_forward_hook_handle = around.register_forward_hook(state._post_forward)


def forget_fsdp(module: nn.Module) -> None:
    """Let FSDP2 take a module anew whose attributes are those of before.

    Private because torch keeps a table of all modules that it has ever taken, and no way out.
    """
    from torch.distributed import _composable_state

    _composable_state._module_state_mapping.pop(module, None)
