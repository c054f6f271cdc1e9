"""Which attributes of its modules a model reads while it runs.

A number that a forward reads from `self` is a constant of the recorded graph. To know where it came
from, each module gets a subclass of its own class for the length of one run, which notes the reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

PLAIN: Final = (bool, int, float, complex, str, type(None), torch.dtype)
"""Values that are compared as such; functions and modules are compared by identity."""

_OF_EVERY_MODULE: Final = frozenset(dir(nn.Module())) | {"T_destination", "dump_patches"}


@dataclass(frozen=True, slots=True, eq=False)
class AttributeRead:
    """One read of an attribute."""

    at: int  # how many nodes the graph had then
    path: str  # of the module
    name: str
    value: Any  # plain, a function or a module


@contextmanager
def attribute_reads(
    model: nn.Module, count: Callable[[], int], reads: list[AttributeRead]
) -> Iterator[None]:
    """Append the reads of attributes of the model's modules; `count` returns the number of nodes.

    Noted are plain values, functions and modules that the module itself or its class holds. Modules
    whose class cannot be subclassed are left alone.
    """
    changed: list[tuple[nn.Module, type]] = []
    try:
        for path, module in model.named_modules():
            kind = type(module)
            if isinstance(module, torch.jit.ScriptModule):
                continue
            try:
                module.__class__ = _noting(kind, path, count, reads)
            except TypeError:  # its memory has another layout
                continue
            changed.append((module, kind))
        yield
    finally:
        for module, kind in changed:
            module.__class__ = kind


def _noting(
    kind: type, path: str, count: Callable[[], int], reads: list[AttributeRead]
) -> type[nn.Module]:
    """Return a subclass of `kind` that notes what is read from its one instance."""

    class Noting(nn.Module):  # of the same memory layout as any module
        __slots__ = ()

        def __init_subclass__(cls, **options: Any) -> None:
            """Keep the class hooks of `kind` from running."""

        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            if name not in _OF_EVERY_MODULE and _is_held(self, kind, name):
                note(name, value)
            return value

        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            note(name, value)
            return value

    def note(name: str, value: Any) -> None:
        if isinstance(value, (*PLAIN, nn.Module)) or callable(value):
            reads.append(AttributeRead(count(), path, name, value))

    own = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    made: type[nn.Module] = type(kind)(kind.__name__, (Noting, kind), own)
    return made


def _is_held(module: object, kind: type, name: str) -> bool:
    """Tell whether an attribute is a value that is held, not a method or a property."""
    if name in object.__getattribute__(module, "__dict__"):
        return True
    return not hasattr(inspect.getattr_static(kind, name, None), "__get__")
