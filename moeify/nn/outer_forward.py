"""Which forward of the model is running: the losses of its routers belong to it.

The outermost module of a converted model that is called begins a forward: the routers below it drop
what an earlier forward left and then add up what their calls give, however many they are, until it
returns or raises. That module is the model, or a part of it that is called on its own. What
activation checkpointing recomputes does not count.
"""

from __future__ import annotations

import functools
import itertools
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moeify import compat
from moeify.nn.recomputed_noise import repeated_draws
from moeify.nn.router import Router
from moeify.nn.router_bias import note_forward

log = logging.getLogger("moeify")

_numbers = itertools.count(1)
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(eq=False)
class _Running:
    """The forward that runs in one thread."""

    active: bool = False
    module: nn.Module | None = None  # its outermost module
    traced: nn.Module | None = None  # that module, if a compiled function began the forward
    depth: int = 0  # of a module that calls itself
    frame: int = 0  # identity of the stack frame that runs its hooks; 0: it ends for certain
    code: types.CodeType | None = None  # what that frame runs
    routers: list[Router] = field(default_factory=list)
    before: list[tuple[Router, Mapping[str, Any], Tensor | None]] | None = None
    draws: list[tuple[nn.Module, Any]] = field(default_factory=list)  # contexts of compiled code


class _Threads(threading.local):
    def __init__(self) -> None:
        self.own = _Running()


_threads = _Threads()


def attach(model: nn.Module) -> None:
    """Let the model, and each part of it that contains routers, begin a forward when called."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Router):
            parts = path.split(".")[:-1]
            for depth in range(len(parts) + 1):
                around = model.get_submodule(".".join(parts[:depth]))
                if _before not in around._forward_pre_hooks.values():
                    around.register_forward_pre_hook(_before)
                    around.register_forward_hook(_after, always_call=True)


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [key for key, hook in hooks.items() if hook in (_before, _after)]:
                hooks.pop(key)
                module._forward_hooks_always_called.pop(key, None)


@functools.cache
@compat.never_compiled_alone
def _never_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that dynamo leaves alone; torch's wrapper costs too much everywhere."""
    made: Callable[..., Any] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return made


def begin_forward(module: nn.Module) -> bool:
    """Begin a forward unless one runs; return whether `end_forward` must follow, come what may."""
    if torch.compiler.is_compiling():
        return _begin_in_a_graph(module)
    return _begin(module, None)


def end_forward(module: nn.Module) -> None:
    """End the forward that this module began."""
    if torch.compiler.is_compiling():
        _end_in_a_graph(module)
    else:
        _end(module)


# `torch.compile` runs the hooks of the module that it compiles as code of their own, and must not
# compile them; those of modules inside are part of the graph.
@compat.never_compiled_alone
def _before(module: nn.Module, args: Any) -> None:
    if torch.compiler.is_compiling():
        _begin_in_a_graph(module)
    elif compat.runs_compiled_code():
        _never_compiled(_begin)(module, sys._getframe(1))
        if module.training:
            _never_compiled(_repeat_draws)(module)
    else:
        _begin(module, sys._getframe(1))


@compat.never_compiled_alone
def _after(module: nn.Module, args: Any, output: Any) -> None:
    if torch.compiler.is_compiling():
        _end_in_a_graph(module)
    elif compat.runs_compiled_code():
        _never_compiled(_stop_repeating)(module)
        _never_compiled(_end)(module)
    else:
        _end(module)


def _begin_in_a_graph(module: nn.Module) -> bool:
    """Begin a forward where a function that calls the model is compiled."""
    state = _threads.own
    if state.active:  # compilers would guard on the class of `module`
        return False
    for part in module.modules():
        if isinstance(part, Router):
            part.record.begin(0)
    state.active, state.module, state.traced, state.frame = True, module, module, 0
    return True


def _end_in_a_graph(module: nn.Module) -> None:
    state = _threads.own
    if state.traced is module:
        state.active, state.module, state.traced = False, None, None
        for part in module.modules():
            if isinstance(part, Router):
                part.record.adds = False


def _begin(module: nn.Module, frame: types.FrameType | None) -> bool:
    state = _threads.own
    if state.active:
        if not state.frame or _is_inside(frame or sys._getframe(1), state):
            state.depth += state.module is module
            return False
        _close(state)  # an interrupt such as Ctrl-C skips hooks
    if compat.is_exporting():
        return False
    routers = list(_routers_below(module))
    number = 0
    if compat.in_backward():
        # Compiled code cannot tell a recomputation: it records, which is undone at the end.
        state.before = [(r, r.record.snapshot(), _copy(r.pending_counts)) for r in routers]
    else:
        number = next(_numbers)
        if module.training:
            _watch(module, routers)
            for router in routers:
                note_forward(router, module)
    for router in routers:
        router.record.begin(number)
    state.active, state.module, state.routers, state.depth = True, module, routers, 0
    state.frame, state.code = (0, None) if frame is None else (id(frame), frame.f_code)
    return True


def _end(module: nn.Module) -> None:
    state = _threads.own
    if state.module is not module:
        return
    if state.depth:
        state.depth -= 1
    else:
        _close(state)


def _repeat_draws(module: nn.Module) -> None:
    """Repeat the draws of compiled code as a whole if it is recomputed; routers cannot do it."""
    for router in _routers_below(module):
        if router.draws:
            draws = repeated_draws(module, router.weight.device)
            draws.__enter__()
            _threads.own.draws.append((module, draws))
            return


def _stop_repeating(module: nn.Module) -> None:
    entered = _threads.own.draws
    if entered and entered[-1][0] is module:
        entered.pop()[1].__exit__(None, None, None)


def _close(state: _Running) -> None:
    if state.module is None:
        return
    for router in state.routers or _routers_below(state.module):
        router.record.adds = False
    for router, record, counts in state.before or ():
        router.record.restore(record)
        if counts is not None and router.pending_counts is not None:
            router.pending_counts.copy_(counts)
    state.active, state.module, state.traced = False, None, None
    state.routers, state.before, state.draws = [], None, []
    state.frame, state.code = 0, None


def _is_inside(caller: types.FrameType, state: _Running) -> bool:
    """Tell whether the call that began the forward is still running around a caller."""
    frame = caller.f_back
    while frame is not None:
        # The address of a frame may be used again: compare what it runs, and for whom.
        if id(frame) == state.frame and frame.f_code is state.code:
            return frame.f_locals.get("self", state.module) is state.module
        frame = frame.f_back
    return False


def _routers_below(module: nn.Module) -> Iterator[Router]:
    """Yield each router in a module once; several times as fast as `modules()`."""
    seen: set[nn.Module] = set()
    waiting: list[nn.Module | None] = [module]
    while waiting:
        part = waiting.pop()
        if part is None or part in seen:
            continue
        seen.add(part)
        if isinstance(part, Router):
            yield part
        waiting.extend(part._modules.values())


def _copy(counts: Tensor | None) -> Tensor | None:
    return None if counts is None else counts.clone()


def _watch(module: nn.Module, routers: list[Router]) -> None:
    """Warn once if nobody read the trainable losses of the last training forward."""
    if module in _warned or not torch.is_grad_enabled():
        return
    if any(
        (router.aux_loss or router.z_loss)
        and router.record.forward
        and not router.record.read
        and router.record.loss is not None
        and router.record.loss.requires_grad
        for router in routers
    ):
        _warned.add(module)
        log.warning(
            "the router losses of the last training forward are not in any loss, so nothing "
            "balances the experts: add moeify.aux_loss(model) to the loss after each forward. (A "
            "Hugging Face model does it itself if it is given labels, which Trainer removes for "
            "label smoothing and for compute_loss_func)"
        )
