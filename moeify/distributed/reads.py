"""Let a module's parameters read as something computed from them, through properties of its class.

Unlike hooks this stays when torch moves, casts, swaps or replaces the parameters, and a compiler
sees it. The module's class becomes one of the same name; copies and pickles go by the original.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

__all__ = ["read_through"]

Reader = Callable[[nn.Module, str], Any]
"""Returns what a parameter of a module reads as, by its name there; a function of a module."""

Reads = tuple[tuple[tuple[str, ...], Reader], ...]

_classes: dict[tuple[type[nn.Module], Reads], type[nn.Module]] = {}


def read_through(
    module: nn.Module, leaves: tuple[str, ...], reader: Reader, undo: ExitStack
) -> None:
    """Let these of a module's own parameters read as the reader says; `undo` gets the way back.

    The last call for a parameter counts.
    """
    former = type(module)
    base, reads = getattr(former, "_moeify_reads", (former, ()))
    undo.callback(setattr, module, "__class__", former)
    module.__class__ = _reading(base, (*reads, (leaves, reader)))


def _reading(base: type[nn.Module], reads: Reads) -> type[nn.Module]:
    key = base, reads
    if key not in _classes:
        made: dict[str, Any] = {
            leaf: property(_getter(leaf, reader)) for leaves, reader in reads for leaf in leaves
        }
        made |= {"__module__": base.__module__, "__qualname__": base.__qualname__}
        made |= {"__doc__": base.__doc__, "__reduce_ex__": _reduce, "_moeify_reads": key}
        _classes[key] = type(base.__name__, (base,), made)
    return _classes[key]


def _getter(leaf: str, reader: Reader) -> Callable[[nn.Module], Any]:
    def get(self: nn.Module) -> Any:
        return reader(self, leaf)

    return get


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Copy and pickle through the base class, because the derived one cannot be imported."""
    found: Any = object.__reduce_ex__(self, 2)
    return _rebuilt, self._moeify_reads, *found[2:]


def _rebuilt(base: type[nn.Module], reads: Reads) -> nn.Module:
    made = _reading(base, reads)
    return made.__new__(made)
