"""Private torch APIs about operators: their names, and modes that see each one that runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moeify.compat.tensors import is_fake


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


def named_arguments(func: Any, args: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an operator's arguments by the names in its schema (a private attribute)."""
    names = [argument.name for argument in func._schema.arguments]
    return dict(zip(names, args, strict=False)) | kwargs


def exposed_operators(*, before_write: Callable[[Tensor], None] | None = None) -> Any:
    """Return a mode in which a `TorchFunctionMode` sees operators that run without Python, too.

    `before_write` is called with each tensor that an operator is about to write to. Private because
    torch documents dispatch modes but exports them from a private module.
    """
    return _ExposedOperators(before_write)


class _ExposedOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
    # The schemas of these norms do not say that they write their running statistics.
    any_input = "batch_norm" in schema.name or "instance_norm" in schema.name
    if not (schema.is_mutable or any_input):
        return
    for place, argument in enumerate(schema.arguments):
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        writes = argument.alias_info is not None and argument.alias_info.is_write
        if writes or any_input:
            parts = value if isinstance(value, list | tuple) else (value,)
            yield from (part for part in parts if isinstance(part, Tensor))


def _grouped_mm(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a grouped matmul; its shape function accepts bfloat16 only."""
    first = args[0]
    if first.dtype == torch.bfloat16 or not is_fake(first):
        return func(*args, **kwargs)

    def cast(value: Any) -> Any:
        floats = isinstance(value, Tensor) and value.is_floating_point()
        return value.bfloat16() if floats else value

    named = {key: cast(value) for key, value in kwargs.items() if key != "out_dtype"}
    return func(*map(cast, args), **named).to(first.dtype)


def before_each_operator(callback: Callable[[Any, Any, Any], None]) -> Any:
    """Return a mode that calls `callback(operator, args, kwargs)` before each operator.

    It sees those of the backward pass, and the ones on plain tensors inside a DTensor's. Private
    because torch documents dispatch modes but exports them from a private module.
    """
    return _BeforeEachOperator(callback)


class _BeforeEachOperator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, callback: Callable[[Any, Any, Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.callback = callback

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(kind.__name__ == "DTensor" for kind in types):
            return NotImplemented  # it turns into operators on its local tensors first
        self.callback(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))
