"""What hangs on a block when it is turned back: hooks, modes, attributes of its parameters."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeify import compat
from moeify.errors import UnsupportedModuleError
from moeify.nn.block import DenseMLP
from moeify.nn.experts import Experts
from moeify.passes.match.attached import (
    attribute_that_would_be_lost,
    attributes_of,
    hook_that_would_be_lost,
    users_hooks,
)
from moeify.sites.descent import descendants
from moeify.sites.install import HOOK_TABLES
from moeify.sites.record import ConvertedLayer


def refuse_attached(model: nn.Module, converted: ConvertedLayer) -> None:
    """Refuse what a dense module has no place for; hooks on the block itself go with it.

    Raises:
        UnsupportedModuleError: A module inside the block has hooks or another mode, or a parameter
            has hooks or an attribute that cannot be kept; names it.
    """
    path = converted.block
    block = model.get_submodule(path)
    for name, module in block.named_modules():
        if name.split(".")[0] == "projection":  # it goes back as it is
            continue
        where = ".".join(filter(None, (path, name)))
        tables = [getattr(module, table) for table in HOOK_TABLES] if name else []
        hooks = [
            hook for t in tables if isinstance(t, dict) for hook in t.values() if callable(hook)
        ]
        if users_hooks([*hooks, *compat.state_dict_hooks(module)]):
            raise UnsupportedModuleError(where, "its hooks would be lost: remove them first")
        drops = isinstance(module, nn.Dropout) or (
            isinstance(module, Experts | DenseMLP) and module.dropout > 0
        )
        if drops and module.training != block.training:
            modes = [("evaluation", "training")[m.training] for m in (module, block)]
            reason = (
                f"it is in {modes[0]} mode and its block in {modes[1]} mode: give both the same"
            )
            raise UnsupportedModuleError(where, reason)
    names = {".".join(filter(None, (path, name))): p for name, p in block.named_parameters()}
    reason = hook_that_would_be_lost(names)
    for made in descendants(model, converted).values():
        reason = reason or attribute_that_would_be_lost(
            {name: names[name] for name in made if name in names}
        )
    if reason:
        raise UnsupportedModuleError(path, reason)


def dense_attributes(model: nn.Module, converted: ConvertedLayer) -> dict[str, dict[str, Any]]:
    """Return the Python attributes of each dense parameter: those of what came from it."""
    return {
        dense: attributes_of(model.get_parameter(made[0]))
        for dense, made in descendants(model, converted).items()
    }
