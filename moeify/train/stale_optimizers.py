"""Tell when an optimizer steps that still holds parameters which a conversion has replaced.

Such an optimizer was made before `moeify()` (or `demoeify()`): it would update weights that no
model uses, and leave the new ones as they are.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

log = logging.getLogger("moeify")

_lock = threading.Lock()


class _Watch:
    """The replaced parameters, held weakly, and the optimizers that were looked at."""

    def __init__(self) -> None:
        self._names: dict[int, tuple[weakref.ref[Tensor], str, str]] = {}
        self._seen: weakref.WeakKeyDictionary[Optimizer, tuple[int, int]] = (
            weakref.WeakKeyDictionary()
        )
        self._replacements = 0
        self._hooked = False

    def add(self, replaced: Mapping[str, Tensor], call: str) -> None:
        with _lock:
            if not self._hooked:  # once for the process; nothing is hooked before a conversion
                register_optimizer_step_pre_hook(self)
                self._hooked = True
            self._names = {key: item for key, item in self._names.items() if item[0]() is not None}
            for name, parameter in replaced.items():
                self._names[id(parameter)] = (weakref.ref(parameter), name, call)
            self._replacements += 1

    def __call__(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Look at an optimizer once for every conversion and every change of its groups."""
        if torch.compiler.is_compiling():
            return
        state = (self._replacements, sum(len(g["params"]) for g in optimizer.param_groups))
        if self._seen.get(optimizer) == state:
            return
        self._seen[optimizer] = state
        found = [
            held
            for group in optimizer.param_groups
            for parameter in group["params"]
            if (held := self._names.get(id(parameter))) is not None and held[0]() is parameter
        ]
        if found:
            names = ", ".join(name for _, name, _ in found[:3])
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            call = found[-1][2]
            log.warning(
                "%s holds %s%s, which %s() replaced: it does not train what stands there now; "
                "make the optimizer after %s()",
                type(optimizer).__name__,
                names,
                more,
                call,
                call,
            )


_WATCH = _Watch()


def watch_optimizers(before: Mapping[str, nn.Parameter], model: nn.Module, call: str) -> None:
    """From now on, warn when an optimizer steps that holds what a model has no more.

    Args:
        before: The model's parameters before the call, by name.
        model: The model after it.
        call: "moeify" or "demoeify".
    """
    kept = {id(parameter) for parameter in model.parameters()}
    replaced = {n: p for n, p in before.items() if id(p) not in kept and not p.is_meta}
    if replaced:
        _WATCH.add(replaced, call)
