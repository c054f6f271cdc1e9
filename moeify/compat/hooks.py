"""Hooks that torch can register but has no public way to list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

_OF_GRADIENT = ("_backward_hooks", "_post_accumulate_grad_hooks")
_OF_STATE = (
    "_state_dict_pre_hooks",
    "_state_dict_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def gradient_hooks(tensor: Tensor) -> list[Callable[..., Any]]:
    """Return the hooks of `register_hook` and `register_post_accumulate_grad_hook`.

    There are public functions to add and remove them, none to find them.
    """
    tables = [getattr(tensor, name, None) or {} for name in _OF_GRADIENT]
    return [hook for table in tables for hook in table.values()]


def state_dict_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the hooks on a module's `state_dict` and `load_state_dict`.

    As above: they can be registered, not listed. torch wraps those that get the module.
    """
    tables = [getattr(module, name, None) or {} for name in _OF_STATE]
    return [getattr(hook, "hook", hook) for table in tables for hook in table.values()]
