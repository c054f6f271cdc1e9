"""Record what a model does while it runs.

The recorder is a `TorchFunctionMode`, so that it sees every torch call that Python makes. What runs
without Python (TorchScript, C++ extensions) reaches it through a dispatch mode, operator by
operator. An `autograd.Function` is one node, because its gradient is not that of its parts.
"""

from __future__ import annotations

import operator
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from moeify import compat
from moeify.capture.attribute_reads import AttributeRead
from moeify.capture.torch_calls import (
    METADATA,
    Args,
    FunctionCall,
    Kwargs,
    target_of,
    tensors_in,
    written_by,
)
from moeify.passes.infra.records import NodeRecord, ParamRef, record_of, set_record
from moeify.units import dtype_name

_LITERAL: Final = (
    bool, int, float, complex, str, type, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.SymInt, torch.SymFloat, torch.SymBool,
)  # fmt: skip
"""What has a literal form in generated code; everything else becomes an attribute of the graph."""


_ON_GRADIENTS: Final = frozenset(("register_hook", "retain_grad"))
"""Methods that change or read the gradient of a value: in training they are nodes."""


@dataclass(slots=True)
class ModuleCall:
    """One call of one module, without the user's own hooks on it.

    The nodes `Capture.nodes[start:end]` ran inside; `inputs` are its tensor arguments as
    (position or keyword, node).
    """

    path: str  # "" is the model
    index: int  # in `Capture.calls`
    parent: int  # index of the calling module's call, or -1
    start: int
    end: int = -1
    inputs: list[tuple[int | str, fx.Node]] = field(default_factory=list)
    others: int = 0  # number of further arguments, None included
    outputs: list[fx.Node] = field(default_factory=list)
    single: bool = False  # the call returned one bare tensor

    @property
    def plain(self) -> bool:
        """Whether the call took one tensor, nothing else, and returned one."""
        return len(self.inputs) == 1 and not self.others and self.single


class Recorder(TorchFunctionMode):
    """Write the graph while the model runs.

    `fakes` collects the fake tensors that it sees. With `grads` gradients are on, unless the model
    turns them off.
    """

    def __init__(
        self,
        model: nn.Module,
        names: dict[int, str],
        fakes: list[weakref.ref[Tensor]] | None = None,
        *,
        grads: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.names, self.fakes, self.grads = model, names, fakes, grads
        self.graph = fx.Graph()
        self.nodes: list[fx.Node] = []
        self.calls: list[ModuleCall] = []
        self.stack: list[ModuleCall] = []
        self.objects: dict[str, Any] = {}
        self.reads: list[AttributeRead] = []
        self._made: dict[int, fx.Node] = {}
        self._memory: dict[tuple[Any, ...], fx.Node] = {}
        self._kept: list[object] = []  # ids are only unique among the living
        self._head: fx.Node | None = None

    # -- tensors and nodes

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Return the node that made `tensor`; a new `get_attr` or placeholder if none did."""
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
        with self.graph.inserting_after(place) if place is not None else nullcontext():
            name = target.replace(".", "_")
            node = self.graph.create_node(op, target, (), {}, name=name)
        self._head = node
        set_record(node, _describe_node("", (), params, [tensor], -1, False))
        self._remember(tensor, node)
        return node

    def _remember(self, tensor: Tensor, node: fx.Node) -> None:
        self._made[id(tensor)] = node
        self._kept.append(tensor)
        if self.fakes is not None and compat.is_fake(tensor):
            self.fakes.append(weakref.ref(tensor))
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
            return slice(*map(self._as_argument, (value.start, value.stop, value.step)))
        if value is None or value is Ellipsis or isinstance(value, _LITERAL):
            return value
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            return value.item()
        return self._object(value)

    def _object(self, value: Any) -> fx.Node:
        name = next((n for n, known in self.objects.items() if known is value), None)
        if name is None:
            name = f"object_{len(self.objects)}"
            self.objects[name] = value
        node = self.graph.get_attr(name)
        set_record(node, NodeRecord(module_path=""))
        return node

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Args = (),
        kwargs: Kwargs | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        space, name = compat.base_name(func)
        if self.grads and (space, name) == ("aten", "detach"):
            # What runs without Python shows what autograd saves: the same value once more.
            result = func(*args, **kwargs)
            self._remember(result, self.node_of(args[0]))
            return result
        if name in METADATA:
            result = func(*args, **kwargs)
            if self.grads and name in _ON_GRADIENTS and isinstance(args[0], Tensor):
                self._emit("call_method", name, (self.node_of(args[0]),), {}, None, [], None)
            return result
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
        written = written_by(name, args, kwargs)
        if not outputs and not inputs:
            return result
        op, target = target_of(func, name, args)
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
        record = _describe_node(paths[-1] if paths else "", paths, refs, outputs, index, mutates)
        set_record(node, replace(record, grad=not self.grads or torch.is_grad_enabled()))

    # -- modules

    @contextmanager
    def hooked(self, args: Args, kwargs: Kwargs) -> Iterator[None]:
        """Watch every module call, and make placeholders for the tensors of the inputs.

        There are two hooks on each side of a module: the outer pair brackets the user's own hooks,
        so that what these do counts as part of the call but not of the module's body.
        """
        for name, tensor in _named_tensors(args, kwargs):
            if id(tensor) not in self._made and id(tensor) not in self.names:
                self._source("placeholder", name, tensor, ())
        handles = []
        try:
            for path, module in self.model.named_modules():
                if isinstance(module, torch.jit.ScriptModule):
                    continue  # it does not take hooks; its operators are seen one by one
                handles += [
                    module.register_forward_pre_hook(self._entering(path), prepend=True),
                    module.register_forward_pre_hook(self._starting, with_kwargs=True),
                    module.register_forward_hook(self._ending, prepend=True),
                    module.register_forward_hook(self._leaving, always_call=True),
                ]
            with compat.custom_functions(self._custom_function):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Args) -> None:
            parent = self.stack[-1].index if self.stack else -1
            call = ModuleCall(path, len(self.calls), parent, len(self.nodes))
            self.calls.append(call)
            self.stack.append(call)

        return enter

    def _starting(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        call = self.stack[-1]
        call.start = len(self.nodes)
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for place, value in given:
            if isinstance(value, Tensor):
                call.inputs.append((place, self.node_of(value)))
            else:
                call.others += 1

    def _ending(self, module: nn.Module, args: Args, output: object) -> None:
        call = self.stack[-1]
        call.end = len(self.nodes)
        call.single = isinstance(output, Tensor)
        call.outputs = [self.node_of(t) for t in tensors_in(output)]

    def _leaving(self, module: nn.Module, args: Args, output: object) -> None:
        call = self.stack.pop()
        if call.end < 0:  # it raised, and the model caught that
            call.end = len(self.nodes)

    # -- autograd functions

    def _custom_function(
        self, function: type, call: Callable[[], Any], args: Args, kwargs: Kwargs
    ) -> Any:
        """Record one use of an `autograd.Function` as one node, unless it runs modules."""
        made = self._as_argument(args), self._as_argument(kwargs)
        calls, start = len(self.calls), len(self.nodes)
        result = call()  # recorded at first: it may run modules
        if len(self.calls) > calls:
            return result
        inner = self.nodes[start:]
        del self.nodes[start:]
        self._emit(
            "call_function", FunctionCall(function), *made, result, list(tensors_in(result)), None
        )
        replaced, node = set(inner), self.nodes[start]
        tables: tuple[dict[Any, fx.Node], ...] = (self._made, self._memory)
        for table in tables:
            for key, known in table.items():
                if known in replaced:
                    table[key] = node
        for former in reversed(inner):
            self.graph.erase_node(former)
        return result

    def seal(self, outputs: Sequence[Tensor]) -> None:
        """Write the outputs of the run, and release its tensors."""
        self.graph.output(tuple(self.node_of(t) for t in outputs))
        for table in (self._made, self._memory, self._kept):
            table.clear()

    def finish(self) -> fx.GraphModule:
        """Return the graph with the model's own tensors as attributes."""
        own: dict[str, Any] = dict(self.model.named_parameters())
        own |= dict(self.model.named_buffers())
        own |= self.objects
        used = {str(node.target) for node in self.graph.nodes if node.op == "get_attr"}
        return fx.GraphModule({k: v for k, v in own.items() if k in used}, self.graph)


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
        dtypes=tuple(dtype_name(t.dtype) for t in outputs),
        call=call,
        mutates=mutates,
    )


def _named_tensors(args: Args, kwargs: Kwargs) -> Iterator[tuple[str, Tensor]]:
    for key, value in [*((f"arg_{i}", a) for i, a in enumerate(args)), *kwargs.items()]:
        found = list(tensors_in(value))
        for place, tensor in enumerate(found):
            yield (key if len(found) == 1 else f"{key}_{place}"), tensor
