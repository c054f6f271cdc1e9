"""Attributes of the dense model whose values are constants of a block: a change is an error.

What the dense MLP read from `self` between its projections (a scale, a flag, its activation) was
recorded when it was converted, and the block computes with that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx, nn

from moeify.errors import UnsupportedModuleError

_CURE: Final = "call moeify.demoeify(model), change it, and convert again"
_FIXED: Final = "moeify_fixed"
_GONE: Final = object()


@dataclass(frozen=True, slots=True, eq=False)
class Watched:
    """An attribute of a module that is still in the model, with the value that was recorded."""

    path: str
    module: nn.Module
    name: str
    value: Any
    plain: bool  # compared by value; else it is a function or a module, compared by identity


def assert_unchanged(watched: Sequence[Watched]) -> None:
    """Assert that attributes are what they were.

    Raises:
        UnsupportedModuleError: One has changed.
    """
    for item in watched:
        now = getattr(item.module, item.name, _GONE)
        if item.plain:
            same = now == item.value
        else:  # Dynamo cannot compare all kinds of functions
            same = torch.compiler.is_compiling() or now is item.value
        if not same:
            reason = (
                f"`{item.name}` was changed, but the MoE block after it has its former value as a "
                f"constant: {_CURE}"
            )
            if torch.compiler.is_compiling():  # Dynamo shows the text of a builtin error only
                raise RuntimeError(f"{item.path}: {reason}")
            raise UnsupportedModuleError(item.path, reason)


class MoEBlock(fx.GraphModule):
    """The graph of a block; it refuses attributes that the MLP it replaced read."""

    def fix(self, path: str, names: Iterable[str]) -> None:
        """Refuse to set `names` from now on, as far as the block has no such attribute itself."""
        fixed = frozenset(name for name in names if not hasattr(self, name))
        if fixed:
            self.meta[_FIXED] = path, fixed  # the one place that survives a copy

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            UnsupportedModuleError: The dense MLP read it, so that its value is in the block.
        """
        path, fixed = self.__dict__.get("meta", {}).get(_FIXED, ("", ()))
        if name in fixed:
            raise UnsupportedModuleError(
                path,
                f"`{name}` was read by the dense MLP and is a constant of the MoE block: {_CURE}",
            )
        super().__setattr__(name, value)
