"""Which code runs an op on which device.

Every op has a reference in plain torch, the truth that the others are tested against. A faster
implementation is a function with the reference's arguments that returns `NotImplemented` for what
it does not serve (a dtype, a size, a machine without a compiler); the reference then runs.
Implementations are imported on first use, so that Triton is never loaded on a CPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

Function = Callable[..., Any]
F = TypeVar("F", bound=Callable[..., Any])

_LIBRARY: Any = torch.library.Library("moeify", "DEF")  # type: ignore[no-untyped-call]
_forced_reference = False


def define(name: str, schema: str, reference: Function, **functions: str) -> Any:
    """Register the op `moeify::name` with its reference and its faster implementations.

    `torch.library.custom_op` does the same with checks on every call that take longer than one
    token's routing; what they check, aliasing and schema, `opcheck` checks in the tests.

    Args:
        name: Name of the op.
        schema: Its arguments and results, in torch's schema language.
        reference: Its plain-torch function.
        functions: Device type to `"module:function"`, such as
            `cuda="moeify.kernels.triton.gate:gate"`.

    Returns:
        The op, to be called.

    Dynamo traces the op, never what runs it: an op that is called while a frame runs that Dynamo
    gave up on would be compiled otherwise, and addresses outlive tensors there.
    """
    _LIBRARY.define(name + schema, tags=[torch.Tag.pt2_compliant_tag])
    _LIBRARY.impl(name, never_traced(reference), "CompositeExplicitAutograd")
    for device_type, place in functions.items():
        run = _first_that_serves(reference, place)
        run = _on_its_gpu(run) if device_type == "cuda" else run
        _LIBRARY.impl(name, never_traced(run), device_type.upper())
    return getattr(torch.ops.moeify, name).default


def never_traced(function: F) -> F:
    """Return a function that Dynamo runs as it is where compiled code calls it."""
    disabled: Any = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return cast(F, disabled)


def fake(name: str) -> Callable[[Function], Function]:
    """Return a decorator for the function that computes shapes and dtypes of an op's results."""
    decorator: Callable[[Function], Function] = torch.library.register_fake(f"moeify::{name}")
    return decorator


@contextmanager
def reference_only() -> Iterator[None]:
    """Run every op by its reference inside, on every device. Not for compiled code."""
    global _forced_reference
    former, _forced_reference = _forced_reference, True
    try:
        yield
    finally:
        _forced_reference = former


def _first_that_serves(reference: Function, place: str) -> Function:
    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        if _forced_reference:
            return reference(*args)
        result = _load(place)(*args)
        return reference(*args) if result is NotImplemented else result

    return run


def _on_its_gpu(run: Function) -> Function:
    """Make the GPU of the first argument current: Triton launches on the current one."""

    @functools.wraps(run)
    def guarded(*args: Any) -> Any:
        first = next(arg for arg in args if isinstance(arg, torch.Tensor))
        with torch.cuda.device(first.device):
            return run(*args)

    return guarded


@functools.cache
def _load(place: str) -> Function:
    """Import `module:function`; without Triton return a function that serves nothing."""
    module, _, name = place.partition(":")
    try:
        found: Function = getattr(importlib.import_module(module), name)
        found = getattr(found, "__wrapped__", found)  # `run` is disabled for Dynamo already
    except ImportError as error:
        if not (error.name or "").startswith("triton"):
            raise
        return _serves_nothing
    return found


def _serves_nothing(*_: Any) -> Any:
    return NotImplemented
