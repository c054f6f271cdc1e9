"""What hangs on the parameters of an MLP: hooks on their gradients, attributes of the user's own.

A hook is a function of one parameter's gradient, and the experts' gradients are others, so it
would be lost. An attribute such as `no_weight_decay = True` means the same on the experts, unless
it speaks of the parameter's shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from torch import Tensor

from moeify import compat

_OF_LIBRARIES: Final = frozenset({"_is_hf_initialized"})  # says that a value was loaded
_OF_SHAPE: Final = ("dim", "axis", "shape", "stride", "size", "numel")
_ABSENT: Final = object()


def attributes_of(parameter: Tensor) -> dict[str, Any]:
    """Return the Python attributes that a user has set on a parameter."""
    return {k: v for k, v in parameter.__dict__.items() if k not in _OF_LIBRARIES}


def users_hooks(hooks: list[Callable[..., Any]]) -> list[Callable[..., Any]]:
    """Leave out moeify's own hooks."""
    return [hook for hook in hooks if not _module_of(hook).startswith("moeify.")]


def _module_of(hook: Any) -> str:
    while hasattr(hook, "func"):  # functools.partial
        hook = hook.func
    return str(getattr(hook, "__module__", None) or type(hook).__module__)


def hook_that_would_be_lost(parameters: Mapping[str, Tensor]) -> str:
    """Return which parameter has a hook on its gradient, as a reason to refuse, or ""."""
    for name, parameter in parameters.items():
        if users_hooks(compat.gradient_hooks(parameter)):
            return (
                f"{name} has a hook on its gradient, which would be lost: remove it first, and "
                "register one on the new parameters afterwards"
            )
    return ""


def attribute_that_would_be_lost(parameters: Mapping[str, Tensor]) -> str:
    """Return which attribute cannot be kept where these become one parameter, or ""."""
    found = {name: attributes_of(parameter) for name, parameter in parameters.items()}
    first = next(iter(found), "")
    for name, attributes in found.items():
        for key, value in attributes.items():
            where = f"the attribute {key!r} of {name}"
            after = "remove it first, and set it on the new parameters afterwards"
            if isinstance(value, Tensor) or callable(value) or any(p in key for p in _OF_SHAPE):
                return f"{where} speaks of the parameter as it is now: {after}"
        for key in dict.fromkeys((*found[first], *attributes)):
            if not _same(attributes.get(key, _ABSENT), found[first].get(key, _ABSENT)):
                return (
                    f"the attribute {key!r} differs between {first} and {name}, which become one "
                    "parameter: set it alike on both first"
                )
    return ""


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    try:
        return bool(one == other)
    except (RuntimeError, TypeError, ValueError):
        return False
