"""Leaked fake tensors: those that a model stored in a global cache, an `lru_cache` or a variable.

Left there, they would break its next real run. Entries of caches are removed, so that they are
computed again, and variables are set back to what they held before the run. What any other place
held is not known, so the model is refused with an error that names the place.
"""

from __future__ import annotations

import functools
import gc
import logging
import sys
import threading
import weakref
from collections.abc import Iterator, Sequence
from types import CellType, FunctionType, ModuleType
from typing import Any, Final

from torch import Tensor, nn

from moeify.errors import CaptureError

log = logging.getLogger("moeify")
_LEVELS = 4  # tuples inside tuples that are searched
_NOT_SEARCHED = frozenset(("builtins", "torch"))

ONE_AT_A_TIME: Final = threading.RLock()
"""Held by a thread that runs a model on fake tensors, or converts one in one process: until they
are removed, another model of the same classes would find its fakes in the caches that both share.
"""


class Variables:
    """The present values of a model's global variables and class attributes.

    Those of its classes, and of all modules in the packages that these classes come from.
    """

    def __init__(self, model: nn.Module) -> None:
        classes = {base for module in model.modules() for base in type(module).__mro__}
        packages = {_package(base.__module__) for base in classes} - _NOT_SEARCHED
        owners: list[type | ModuleType] = [c for c in classes if _package(c.__module__) in packages]
        owners += [
            module
            for name, module in list(sys.modules.items())
            if _package(name) in packages and isinstance(module, ModuleType)
        ]
        self._former = [(owner, dict(vars(owner))) for owner in owners]

    def restore(self, leaked: set[int]) -> int:
        """Set back the variables that hold objects of these ids; return how many."""
        restored = 0
        for owner, former in self._former:
            for name in [name for name, now in vars(owner).items() if id(now) in leaked]:
                if name in former:
                    setattr(owner, name, former[name])
                else:
                    delattr(owner, name)
                restored += 1
        return restored


def _package(module: str) -> str:
    return module.partition(".")[0]


def remove_leaked(references: Sequence[weakref.ref[Tensor]], variables: Variables) -> None:
    """Remove the tensors that are still alive from caches, and from `variables` of before the run.

    Raises:
        CaptureError: Another place holds one, and what it held before is not known.
    """
    if not _alive(references):
        return
    gc.collect()
    alive = _alive(references)
    removed, seen = 0, {id(alive)}
    for _ in range(_LEVELS):
        if not alive:
            break
        leaked = {id(value) for value in alive}
        removed += variables.restore(leaked)
        above: list[Any] = []
        for holder in gc.get_referrers(*alive):
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            if type(holder) is tuple:
                above.append(holder)
            else:
                removed += _remove(holder, leaked)
        seen.add(id(above))
        alive = above
    if removed:
        log.debug("%d caches and variables held fake tensors and were reset", removed)


def _alive(references: Sequence[weakref.ref[Tensor]]) -> list[Any]:
    found = [ref() for ref in references]
    return [tensor for tensor in found if tensor is not None]


def _remove(holder: Any, leaked: set[int]) -> int:
    """Remove objects from a cache; return the number of entries removed."""
    if isinstance(holder, functools._lru_cache_wrapper):
        holder.cache_clear()
        return 1
    if isinstance(holder, list):
        kept = [value for value in holder if id(value) not in leaked]
        removed = len(holder) - len(kept)
        holder[:] = kept
        return removed
    if isinstance(holder, CellType):
        name = next(_names_of(holder), None)
        if name is not None:
            raise _refusal(name)
    if not isinstance(holder, dict):
        return 0
    keys = [key for key, value in holder.items() if id(value) in leaked]
    if keys and ("__name__" in holder or "__module__" in holder):  # a module's or a class's own
        raise _refusal(f"`{keys[0]}` of {holder.get('__name__', holder.get('__module__'))}")
    for key in keys:
        del holder[key]
    return len(keys)


def _names_of(cell: CellType) -> Iterator[str]:
    """Name the closure variables that use a cell; none if it belonged to a call that ended."""
    for closure in gc.get_referrers(cell):
        if type(closure) is not tuple:
            continue
        for function in gc.get_referrers(closure):
            if isinstance(function, FunctionType) and function.__closure__ is closure:
                name = function.__code__.co_freevars[closure.index(cell)]
                yield f"`{name}` of {function.__module__}.{function.__qualname__}"


def _refusal(place: str) -> CaptureError:
    return CaptureError(
        f"the model keeps a tensor of its forward pass in {place}, which now holds a fake one "
        "without values from a trial run: reset it, and run the model once before you convert it, "
        "so that it is already filled"
    )
