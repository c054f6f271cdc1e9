"""Run a model so that afterwards it is what it was before.

Restored are the attributes and containers of every module, and of the plain objects and containers
they hold; values that were written in place (copied just before they are first written, so that
nothing is copied where nothing is written); and the random states.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moeify import compat
from moeify.capture.on_meta import quiet_random_state

_CONTAINERS = (dict, OrderedDict, list, set, deque)
_LIBRARIES = ("torch", "builtins", "numpy", "functools", "logging", "threading")
_DEPTH = 6


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Restore every attribute, container and tensor of the model, and random states, afterwards."""
    state = _State(model)
    with quiet_random_state():
        try:
            with compat.exposed_operators(before_write=state.before_write):
                yield
        finally:
            state.restore()


class _State:
    """The state of a model and of the objects it holds."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: set[int] = set()
        self._kept: list[object] = []  # ids are only unique among the living
        self._attributes: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, Tensor, Tensor | None, bool]] = []
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        for module in model.modules():
            self._object(module, 0)

    def _object(self, value: object, depth: int) -> None:
        if id(value) in self._seen or depth > _DEPTH:
            return
        if isinstance(value, Tensor):
            self._seen.add(id(value))
            self._tensor(value)
            return
        is_module = isinstance(value, nn.Module)
        if type(value) in _CONTAINERS:
            self._seen.add(id(value))
            self._container(value, depth)
        elif isinstance(value, tuple):
            for part in value:
                self._object(part, depth + 1)
        elif is_module or _is_plain_object(value):
            self._seen.add(id(value))
            self._kept.append(value)
            attributes = value.__dict__
            self._attributes.append((attributes, dict(attributes)))
            for part in attributes.values():
                self._object(part, 0 if is_module else depth + 1)

    def _container(self, value: Any, depth: int) -> None:
        self._kept.append(value)
        self._containers.append((value, value.copy()))
        parts = value.values() if isinstance(value, dict) else value
        for part in parts:
            self._object(part, depth + 1)

    def _tensor(self, tensor: Tensor) -> None:
        self._kept.append(tensor)
        if nn.parameter.is_lazy(tensor):
            return
        grad = tensor.grad if tensor.is_leaf else None
        self._tensors.append((tensor, tensor.detach(), grad, tensor.requires_grad))
        storage = compat.storage_of(tensor)
        if storage is not None and not tensor.is_meta:
            self._storages[compat.storage_id(storage)] = storage
        if grad is not None:
            self._object(grad, 0)

    def before_write(self, written: Tensor) -> None:
        """Copy the memory of a tensor that is about to be written, if it is the model's."""
        storage = compat.storage_of(written)
        if storage is None or compat.storage_id(storage) in self._copies:
            return
        own = self._storages.get(compat.storage_id(storage))
        if own is not None:
            self._copies[compat.storage_id(storage)] = (own, compat.copy_of(own))

    def restore(self) -> None:
        for attributes, former in self._attributes:
            attributes.clear()
            attributes.update(former)
        for container, former in self._containers:
            container.clear()
            if isinstance(container, list | deque):
                container.extend(former)
            else:
                container.update(former)
        for storage, copy in self._copies.values():
            storage.copy_(copy)
        for tensor, data, grad, requires_grad in self._tensors:
            if compat.storage_key(tensor) != compat.storage_key(data):
                tensor.data = data
            if tensor.is_leaf:
                if tensor.grad is not grad:
                    tensor.grad = grad
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)


def _is_plain_object(value: object) -> bool:
    """Tell whether a value is an object of a user's class, whose attributes are state."""
    if isinstance(value, type | ModuleType | FunctionType | MethodType):
        return False
    package = type(value).__module__.partition(".")[0]
    return isinstance(getattr(value, "__dict__", None), dict) and package not in _LIBRARIES
