"""Record one forward pass of any model as a `torch.fx.Graph`.

A `TorchFunctionMode` sees every torch call, module hooks say which module made it. The model is
run once, in evaluation mode and without gradients, on fake tensors where it can (no weight is
read, no memory is taken) and on the real ones otherwise. Afterwards the model is as before:
parameters, buffers, attributes, training flags, hooks and the random state.

The recorded graph is flat: calls of torch functions and methods, `get_attr` for parameters and
buffers, one placeholder per tensor of the inputs. Sizes that the model computed in Python are
constants in it. It serves discovery; `moeify.export` gives the graph that runs at other sizes.
"""

from __future__ import annotations

import operator
import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from moeify import compat
from moeify.errors import CaptureError
from moeify.passes.records import NodeRecord, ParamRef, record_of, set_record

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
ExampleInputs = Mapping[str, Any] | Sequence[Any] | Tensor

_METADATA = frozenset(
    "size dim ndimension numel nelement stride storage_offset element_size data_ptr get_device "
    "is_contiguous is_floating_point is_complex is_signed is_inference is_pinned is_shared "
    "is_sparse untyped_storage storage __len__ __hash__ __repr__ __format__ dim_order "
    "requires_grad_ retain_grad register_hook is_same_size is_conj is_neg result_type "
    "broadcast_shapes promote_types can_cast finfo iinfo __set__ __dir__ is_tensor is_storage "
    "_has_compatible_shallow_copy_type has_names".split()
)
"""Calls that read no values and return no tensors: they leave no node."""

_IN_PLACE = frozenset(
    "__setitem__ __iadd__ __isub__ __imul__ __itruediv__ __ifloordiv__ __ipow__ __iand__ __ior__ "
    "__ixor__ __ilshift__ __irshift__ __imod__".split()
)


@dataclass(slots=True)
class ModuleCall:
    """One call of one module.

    Attributes:
        path: The module's path; `""` is the model.
        index: Position in `Capture.calls`.
        parent: Index of the calling module's call, or -1.
        start, end: The nodes `Capture.nodes[start:end]` ran inside this call.
        inputs: The tensor arguments: (position or keyword, node).
        others: Number of further arguments that are neither tensors nor None.
        outputs: The nodes returned.
        single: True if the call returned one bare tensor.
    """

    path: str
    index: int
    parent: int
    start: int
    end: int = -1
    inputs: list[tuple[int | str, fx.Node]] = field(default_factory=list)
    others: int = 0
    outputs: list[fx.Node] = field(default_factory=list)
    single: bool = False


@dataclass(slots=True)
class Capture:
    """A recorded forward pass.

    Attributes:
        graph_module: The graph, with the model's own parameters behind its `get_attr` nodes.
        nodes: The nodes that ran, in order (placeholders and `get_attr` excluded).
        calls: Every module call, in order of entry.
        mode: Whether fake or real tensors were used.
        seconds: Time taken.
        fallback: Why fake tensors could not be used, or "".
    """

    graph_module: fx.GraphModule
    nodes: list[fx.Node]
    calls: list[ModuleCall]
    mode: Literal["fake", "real"]
    seconds: float
    fallback: str = ""

    def chain(self, node: fx.Node) -> list[ModuleCall]:
        """Return the module calls around `node`, innermost first."""
        record = record_of(node)
        found, index = [], -1 if record is None else record.call
        while index >= 0:
            found.append(self.calls[index])
            index = self.calls[index].parent
        return found


def capture(model: nn.Module, example_inputs: ExampleInputs) -> Capture:
    """Run `model` once and record what it does.

    Args:
        model: Any module. Nothing in it is changed; on `meta` it needs no memory.
        example_inputs: Keyword arguments (a mapping), positional ones (a sequence) or one tensor.

    Returns:
        The recorded graph with its module calls.

    Raises:
        CaptureError: The forward pass fails on these inputs, with fake and with real tensors.
    """
    started = time.perf_counter()
    args, kwargs = split_inputs(example_inputs)
    _refuse_unready(model)
    on_meta = any(t.device.type == "meta" for t in model.parameters())
    try:
        recorder = _record(model, args, kwargs, fake=True)
        return recorder.finish("fake", time.perf_counter() - started, "")
    except Exception as error:
        reason = f"{type(error).__name__}: {_first_line(error)}"
        if on_meta:
            raise CaptureError(
                f"the model is on meta and cannot run on fake tensors ({reason}); "
                "give other example_inputs, or load its weights first"
            ) from error
    try:
        recorder = _record(model, args, kwargs, fake=False)
    except Exception as error:
        raise CaptureError(
            f"the model does not run on the example inputs: {type(error).__name__}: "
            f"{_first_line(error)}; check example_inputs={_describe(example_inputs)}"
        ) from error
    return recorder.finish("real", time.perf_counter() - started, reason)


def split_inputs(example_inputs: ExampleInputs) -> tuple[Args, Kwargs]:
    """Turn example inputs into positional and keyword arguments.

    Raises:
        CaptureError: They are neither a mapping, a sequence nor a tensor.
    """
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), {str(key): value for key, value in example_inputs.items()}
    if isinstance(example_inputs, Sequence) and not isinstance(example_inputs, str):
        return tuple(example_inputs), {}
    raise CaptureError(
        "example_inputs must be a dict of keyword arguments, a tuple of positional ones or a "
        f"tensor, not {type(example_inputs).__name__}"
    )


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples, mappings and dataclass-like outputs."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif isinstance(value, list | tuple | set | frozenset):
        for part in value:
            yield from tensors_in(part)
    elif hasattr(value, "__dataclass_fields__"):
        for name in value.__dataclass_fields__:
            yield from tensors_in(getattr(value, name, None))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _describe(inputs: object) -> str:
    if isinstance(inputs, Tensor):
        return f"{tuple(inputs.shape)} {str(inputs.dtype).removeprefix('torch.')}"
    if isinstance(inputs, Mapping):
        return "{" + ", ".join(f"{k}: {_describe(v)}" for k, v in inputs.items()) + "}"
    if isinstance(inputs, list | tuple):
        return "(" + ", ".join(_describe(v) for v in inputs) + ")"
    return repr(inputs)[:60]


def _refuse_unready(model: nn.Module) -> None:
    for path, module in model.named_modules():
        if compat.is_compiled_module(module):
            raise CaptureError(f"{path or 'the model'} is compiled: convert first, compile after")
    for name, tensor in model.named_parameters():
        if isinstance(tensor, nn.parameter.UninitializedParameter):
            raise CaptureError(f"{name} is uninitialised: run the model once, then convert it")


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Put back every attribute, container and random state of the model afterwards."""
    saved = []
    for module in model.modules():
        state = dict(module.__dict__)
        parts = {
            key: type(value)(value) if type(value) in (dict, list, set) else value.copy()
            for key, value in state.items()
            if type(value) in (dict, list, set) or type(value).__name__ == "OrderedDict"
        }
        saved.append((module, state, parts))
    buffers = [(b, b.detach().clone(), b._version) for b in model.buffers() if not b.is_meta]
    rng, python_rng = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_rng = numpy.random.get_state() if numpy is not None else None
    cuda_rng = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        for module, state, parts in saved:
            module.__dict__.clear()
            module.__dict__.update(state)
            for key, part in parts.items():
                live = state[key]
                live.clear()
                live.extend(part) if isinstance(live, list) else live.update(part)
        with torch.no_grad():
            for buffer, copy, version in buffers:
                if buffer._version != version:
                    buffer.copy_(copy)
        torch.set_rng_state(rng)
        random.setstate(python_rng)
        if numpy is not None:
            numpy.random.set_state(numpy_rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state_all(cuda_rng)


def _record(model: nn.Module, args: Args, kwargs: Kwargs, *, fake: bool) -> _Recorder:
    with ExitStack() as stack:
        stack.enter_context(preserved(model))
        names = {id(t): n for n, t in model.named_parameters()}
        names |= {id(t): n for n, t in model.named_buffers() if id(t) not in names}
        mode: Any = None
        if fake:
            mode = compat.fake_mode()
            names, args, kwargs = _swap_in_fakes(model, names, args, kwargs, mode)
        for module in model.modules():
            module.__dict__["training"] = False
        recorder = _Recorder(model, names)
        stack.enter_context(recorder.hooked(args, kwargs))
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(mode)
        with recorder:
            outputs = model(*args, **kwargs)
        recorder.outputs = list(tensors_in(outputs))
        return recorder


def _swap_in_fakes(
    model: nn.Module, names: dict[int, str], args: Args, kwargs: Kwargs, mode: Any
) -> tuple[dict[int, str], Args, Kwargs]:
    """Replace parameters and buffers by fakes, in the modules' own tables (restored later)."""
    twins: dict[int, Tensor] = {}

    def twin(tensor: Tensor) -> Tensor:
        if id(tensor) not in twins:
            twins[id(tensor)] = compat.fake_like(mode, tensor)
        return twins[id(tensor)]

    def fake(value: Any) -> Any:
        if isinstance(value, Tensor):
            return twin(value)
        if type(value) in (list, tuple):
            return type(value)(fake(part) for part in value)
        if isinstance(value, dict):
            return {key: fake(part) for key, part in value.items()}
        return value

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    table[key] = twin(tensor)
    named = {id(twins[key]): name for key, name in names.items() if key in twins}
    return named, fake(args), fake(kwargs)


class _Recorder(TorchFunctionMode):
    """Writes the graph while the model runs."""

    def __init__(self, model: nn.Module, names: dict[int, str]) -> None:
        super().__init__()
        self.model, self.names = model, names
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.calls: list[ModuleCall] = []
        self.stack: list[ModuleCall] = []
        self.outputs: list[Tensor] = []
        self._made: dict[int, fx.Node] = {}
        self._memory: dict[tuple[Any, ...], fx.Node] = {}
        self._kept: list[object] = []  # ids are only unique among the living
        self._counts: dict[str, int] = {}
        self._head: fx.Node | None = None

    # -- tensors and nodes

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that made `tensor`; a new source node where nothing did."""
        found = self._made.get(id(tensor))
        if found is not None:
            return found
        name = self.names.get(id(tensor))
        if name is not None:
            node = self._source("get_attr", name, tensor, (ParamRef(name, tuple(tensor.shape)),))
        else:
            key = compat.storage_key(tensor)
            known = self._memory.get(key) if key is not None else None
            if known is not None:  # the same memory under a new Python object
                self._remember(tensor, known)
                return known
            node = self._source("placeholder", f"free_{len(self._made)}", tensor, ())
        return node

    def _source(
        self, op: str, target: str, tensor: Tensor, params: tuple[ParamRef, ...]
    ) -> fx.Node:
        place = self._head
        with self.graph.inserting_after(place) if place is not None else _nothing():
            name = target.replace(".", "_")
            node = self.graph.create_node(op, target, (), {}, name=name)
        self._head = node
        set_record(node, _describe_node("", (), params, [tensor], -1, False))
        self._remember(tensor, node)
        return node

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._made[id(tensor)] = node
        self._kept.append(tensor)
        key = compat.storage_key(tensor)
        if key is not None:
            self._memory[key] = node

    def _as_argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node_of(value)
        if isinstance(value, torch.Size):
            return tuple(value)
        if isinstance(value, tuple | list):
            made = [self._as_argument(part) for part in value]
            return made if isinstance(value, list) else tuple(made)
        if isinstance(value, dict):
            return {key: self._as_argument(part) for key, part in value.items()}
        if isinstance(value, slice):
            start, stop, step = (
                self._as_argument(p) for p in (value.start, value.stop, value.step)
            )
            return slice(start, stop, step)
        return value

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func))
        if name in _METADATA:
            return func(*args, **kwargs)
        made = None if name == "__get__" else (self._as_argument(args), self._as_argument(kwargs))
        result = func(*args, **kwargs)
        outputs = list(tensors_in(result))
        if name == "__get__":
            if outputs and isinstance(args[0], Tensor):
                attribute = getattr(getattr(func, "__self__", None), "__name__", "data")
                target = (self.node_of(args[0]), attribute)
                self._emit("call_function", getattr, target, {}, result, outputs, None)
            return result
        assert made is not None
        inputs = list(tensors_in((args, kwargs)))
        written = None
        if name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")):
            written = args[0]
        elif isinstance(kwargs.get("out"), Tensor):
            written = kwargs["out"]
        elif kwargs.get("inplace") is True:
            written = args[0]
        if not outputs and not inputs:
            return result
        op, target = _target(func, name, args)
        self._emit(op, target, made[0], made[1], result, outputs, written)
        return result

    def _emit(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        result: Any,
        outputs: list[Tensor],
        written: Tensor | None,
    ) -> None:
        node = self.graph.create_node(op, target, args, kwargs)
        self.nodes.append(node)
        self._mark(node, outputs, written is not None)
        if isinstance(result, Tensor):
            self._remember(result, node)
        elif isinstance(result, list | tuple):
            self._unpack(result, node)
        if written is not None:
            self._remember(written, node)

    def _unpack(self, result: Sequence[Any], node: fx.Node) -> None:
        for place, part in enumerate(result):
            if isinstance(part, Tensor) or (
                isinstance(part, list | tuple) and any(True for _ in tensors_in(part))
            ):
                item = self.graph.create_node("call_function", operator.getitem, (node, place))
                self.nodes.append(item)
                self._mark(item, list(tensors_in(part)), False)
                if isinstance(part, Tensor):
                    self._remember(part, item)
                else:
                    self._unpack(part, item)

    def _mark(self, node: fx.Node, outputs: list[Tensor], mutates: bool) -> None:
        paths = tuple(call.path for call in self.stack)
        refs = tuple(
            ref
            for source in node.all_input_nodes
            if source.op == "get_attr" and (record := record_of(source)) is not None
            for ref in record.params
        )
        index = self.stack[-1].index if self.stack else -1
        set_record(
            node, _describe_node(paths[-1] if paths else "", paths, refs, outputs, index, mutates)
        )

    # -- modules

    @contextmanager
    def hooked(self, args: Args, kwargs: Kwargs) -> Iterator[None]:
        """Watch every module call; name the tensors of the inputs."""
        handles = []
        for name, tensor in _named_tensors(args, kwargs):
            if id(tensor) not in self._made and id(tensor) not in self.names:
                self._source("placeholder", name, tensor, ())
        try:
            for path, module in self.model.named_modules():
                handles += [
                    module.register_forward_pre_hook(self._entering(path), with_kwargs=True),
                    module.register_forward_hook(self._leaving(), always_call=True),
                ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Args, kwargs: Kwargs) -> None:
            parent = self.stack[-1].index if self.stack else -1
            call = ModuleCall(path, len(self.calls), parent, len(self.nodes))
            for place, value in [*enumerate(args), *kwargs.items()]:
                if isinstance(value, Tensor):
                    call.inputs.append((place, self.node_of(value)))
                elif value is not None:
                    call.others += 1
            self.calls.append(call)
            self.stack.append(call)

        return enter

    def _leaving(self) -> Callable[..., None]:
        def leave(module: nn.Module, args: Args, output: object) -> None:
            call = self.stack.pop()
            call.end = len(self.nodes)
            call.single = isinstance(output, Tensor)
            call.outputs = [self.node_of(t) for t in tensors_in(output)]

        return leave

    def finish(self, mode: Literal["fake", "real"], seconds: float, fallback: str) -> Capture:
        """Close the graph and hang the model's own tensors under it."""
        self.graph.output(tuple(self.node_of(t) for t in self.outputs))
        own: dict[str, Any] = dict(self.model.named_parameters())
        own |= dict(self.model.named_buffers())
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        module = fx.GraphModule({k: v for k, v in own.items() if k in used}, self.graph)
        nodes, calls = self.nodes, self.calls
        self._made.clear(), self._memory.clear(), self._kept.clear()
        return Capture(module, nodes, calls, mode, seconds, fallback)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _target(func: Callable[..., Any], name: str, args: Args) -> tuple[str, Any]:
    kind = type(func).__name__
    if name == "__getitem__":
        return "call_function", operator.getitem
    if name == "__setitem__":
        return "call_function", operator.setitem
    if kind in ("method_descriptor", "wrapper_descriptor") and args and isinstance(args[0], Tensor):
        return "call_method", name
    if getattr(torch.Tensor, name, None) is func:
        return "call_method", name
    return "call_function", func


def _describe_node(
    path: str,
    paths: tuple[str, ...],
    params: tuple[ParamRef, ...],
    outputs: list[Tensor],
    call: int,
    mutates: bool,
) -> NodeRecord:
    return NodeRecord(
        module_path=path,
        modules=paths,
        params=params,
        shapes=tuple(tuple(int(n) for n in t.shape) for t in outputs),
        dtypes=tuple(str(t.dtype).removeprefix("torch.") for t in outputs),
        call=call,
        mutates=mutates,
    )


def _named_tensors(args: Args, kwargs: Kwargs) -> Iterator[tuple[str, Tensor]]:
    for key, value in [*((f"arg_{i}", a) for i, a in enumerate(args)), *kwargs.items()]:
        found = list(tensors_in(value))
        for place, tensor in enumerate(found):
            yield (key if len(found) == 1 else f"{key}_{place}"), tensor
