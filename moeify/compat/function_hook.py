"""The one place where moeify changes torch: `autograd.Function.apply`, while a model is recorded.

A custom function must become one node of the graph, because its gradient is not that of its parts,
and torch has no hook for it. Replacing the method does not help: `act = MyFunction.apply` is often
bound long before. What all these bound methods share is the code of `Function.apply`, so the code
is replaced, in the whole process: from when the first thread asks until the last one is done.

Written for torch 2.11 to 2.13, whose `apply` is a Python function of `cls`, `*args` and `**kwargs`
with the one free variable `__class__`. Any other is left alone, with a warning about what follows.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import Parameter
from types import CodeType, FunctionType
from typing import Any, Final, TypeAlias

import torch
from torch.utils.checkpoint import CheckpointFunction

log = logging.getLogger("moeify")

Around: TypeAlias = Callable[[type, Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]

_APPLY: Final[Any] = torch.autograd.Function.__dict__["apply"].__func__
_WRITTEN_FOR: Final = (
    ("__class__",),
    (Parameter.POSITIONAL_OR_KEYWORD, Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD),
)

_lock = threading.Lock()
_handlers: dict[int, Around] = {}  # by thread
_original: Any = None  # a function with torch's code, once that was replaced


@contextmanager
def custom_functions(around: Around) -> Iterator[None]:
    """Call `around(function, call, args, kwargs)` for each custom function that this thread uses.

    `around` must return `call()`. Inside another such context of the same thread, the outer one
    keeps being called. Two that torch makes itself are left alone: activation checkpointing, and
    the one in which a custom operator gets its gradient.
    """
    thread = threading.get_ident()
    if thread in _handlers or not _is_known(_APPLY):
        yield
        return
    with _lock:
        if not _handlers:
            _install()
        _handlers[thread] = around
    try:
        yield
    finally:
        with _lock:
            del _handlers[thread]
            if not _handlers:
                _APPLY.__code__ = _original.__code__


def _is_known(apply: Any) -> bool:
    """Tell whether `Function.apply` is the one that this file was written for."""
    code = getattr(apply, "__code__", None)
    if isinstance(code, CodeType):
        kinds = tuple(p.kind for p in inspect.signature(apply).parameters.values())
        if code is _REPLACEMENT or (code.co_freevars, kinds) == _WRITTEN_FOR:
            return True
    log.warning(
        "torch %s has another autograd.Function.apply than moeify supports: custom autograd "
        "functions are recorded as the operators inside them, and layers inside may be converted",
        torch.__version__,
    )
    return False


def _install() -> None:
    global _original
    _original = FunctionType(
        _APPLY.__code__, _APPLY.__globals__, "apply", _APPLY.__defaults__, _APPLY.__closure__
    )
    _APPLY.__code__ = _REPLACEMENT


def dispatch(cls: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Do what `Function.apply` does, through this thread's handler if it has one."""

    def call() -> Any:
        return _original(cls, *args, **kwargs)

    around = _handlers.get(threading.get_ident())
    # Private: what torch wraps an operator with a Python gradient in is known by this module alone.
    generated = cls.__module__ == "torch._library.autograd"
    if around is None or generated or cls is CheckpointFunction:
        return call()
    return around(cls, call, args, kwargs)


def _make_replacement() -> CodeType:
    cell = None  # like `__class__`: code can only be replaced by code with as many free variables

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        # Runs with the globals of torch.autograd.function, so it imports what it calls.
        from moeify.compat.function_hook import dispatch

        return cell and dispatch(cls, args, kwargs)

    return apply.__code__


_REPLACEMENT: Final = _make_replacement()
