"""Which code runs an op on which device.

Every op has a reference in plain torch, the truth that the others are tested against. A faster
implementation is a function with the reference's arguments that returns `NotImplemented` for what
it does not serve (a dtype, a size, a machine without a compiler); the reference then runs.
Implementations are imported on first use, so that Triton is never loaded on a CPU.

Derivatives come from two places. An ordinary backward pass calls another op, as fast as the forward
one. All others (forward mode, the transforms of `torch.func`, a backward pass that is itself
differentiated) go through the op's *formula*: the same values by differentiable torch calls, which
autograd differentiates in any mode and as often as it is asked to.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch

from moeify import compat

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


def differentiable(
    name: str,
    formula: Function,
    *,
    backward: Function | None = None,
    setup_context: Function | None = None,
) -> None:
    """Register the derivatives of the op `moeify::name`.

    Args:
        name: Name of an op that `define` has registered.
        formula: Its arguments and results, in torch calls that autograd can differentiate: no
            `out=`, no changes in place of what it did not make, no values read on the host.
        backward: The ordinary backward pass, as in `torch.autograd.Function`; without one (an op
            that is itself part of a backward pass) that is the formula's, too.
        setup_context: What `backward` reads, as in `torch.library.register_autograd`.
    """
    op = getattr(torch.ops.moeify, name).default
    ordinary = None
    if backward is not None and setup_context is not None:
        ordinary = _function(name, op, backward, setup_context)

    def kernel(keys: Any, *args: Any) -> Any:
        if compat.differentiated_by_formula(args):
            return formula(*args)
        if not compat.any_requires_grad(args):
            return compat.below_autograd(op, keys, args)
        return formula(*args) if ordinary is None else ordinary(*args, keys)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _function(name: str, op: Any, backward: Function, setup_context: Function) -> Function:
    """Return the op as an `autograd.Function` whose name a profiler shows."""

    def forward(ctx: Any, *args: Any) -> Any:
        *given, keys = args
        result = compat.below_autograd(op, keys, given)
        setup_context(ctx, tuple(given), result)
        return result

    def run_backward(ctx: Any, *grads: Any) -> Any:
        return *backward(ctx, *grads), None

    title = "Moeify" + "".join(word.capitalize() for word in name.split("_"))
    methods = {"forward": staticmethod(forward), "backward": staticmethod(run_backward)}
    made: Any = type(title, (torch.autograd.Function,), methods)
    apply: Function = made.apply
    return apply


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
