"""Build modules with parameters on `meta`, and leave every random state unchanged."""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

_Replaced = dict[int, tuple[nn.Parameter, nn.Parameter]]


class _Active(threading.local):
    """The parameters that each `parameters_on_meta` of a thread has replaced, innermost last."""

    def __init__(self) -> None:
        self.stack: list[_Replaced] = []


_active = _Active()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Move every parameter that this thread registers to meta, where filling it costs nothing."""
    _watch()
    _active.stack.append({})
    try:
        yield
    finally:
        _active.stack.pop()


@functools.cache
def _watch() -> None:
    """Hook into the registration of parameters, for good.

    Taking the hook off would fail modules that other threads build: torch walks its table.
    """
    register_module_parameter_registration_hook(_on_meta)


def _on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
    if not _active.stack or parameter is None or parameter.is_meta:
        return parameter
    replaced = _active.stack[-1]  # keeps ids unique
    if id(parameter) not in replaced:
        empty = torch.empty_like(parameter, device="meta")
        on_meta = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        replaced[id(parameter)] = parameter, on_meta
    return replaced[id(parameter)][1]


@contextmanager
def default_device_cpu() -> Iterator[None]:
    """Make new tensors on the CPU, whatever `torch.set_default_device` chose."""
    if torch.get_default_device().type == "cpu":
        yield
    else:
        with torch.device("cpu"):
            yield


@contextmanager
def quiet_random_state() -> Iterator[None]:
    """Leave every random state as it was."""
    rng, python_rng = torch.get_rng_state(), random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_rng = numpy.random.get_state() if numpy is not None else None
    on_cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    cuda_rng = torch.cuda.get_rng_state_all() if on_cuda else None
    try:
        yield
    finally:
        torch.set_rng_state(rng)
        random.setstate(python_rng)
        if numpy is not None:
            numpy.random.set_state(numpy_rng)
        if cuda_rng is not None:
            torch.cuda.set_rng_state_all(cuda_rng)
