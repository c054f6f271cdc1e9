"""Fake tensors that a model put away outside itself: in a global cache, an `lru_cache`, a closure.

Left there, they would poison its next real run. The cache entries that hold them are removed, so
that they are computed anew.
"""

from __future__ import annotations

import functools
import gc
import logging
import weakref
from collections.abc import Sequence
from types import CellType
from typing import Any

from torch import Tensor

log = logging.getLogger("moeify")
_LEVELS = 4


def forget(references: Sequence[weakref.ref[Tensor]]) -> int:
    """Remove from caches what is still alive of `references`.

    Args:
        references: Tensors that nobody should hold any more.

    Returns:
        How many cache entries were removed.
    """
    if not any(ref() is not None for ref in references):
        return 0
    gc.collect()
    alive: list[Any] = [value for ref in references if (value := ref()) is not None]
    removed, seen = 0, {id(alive)}
    for _ in range(_LEVELS):
        if not alive:
            break
        wanted = {id(value) for value in alive}
        above: list[Any] = []
        for holder in gc.get_referrers(*alive):
            if id(holder) in seen:
                continue
            seen.add(id(holder))
            if isinstance(holder, functools._lru_cache_wrapper):
                holder.cache_clear()
                removed += 1
            elif isinstance(holder, dict):
                removed += _drop(holder, wanted)
            elif isinstance(holder, CellType):
                holder.cell_contents = None
                removed += 1
            elif isinstance(holder, list):
                kept = [value for value in holder if id(value) not in wanted]
                removed += len(holder) - len(kept)
                holder[:] = kept
            elif type(holder) is tuple:
                above.append(holder)
        seen.add(id(above))
        alive = above
    if removed:
        log.debug("%d global cache entries held fake tensors and were removed", removed)
    return removed


def _drop(holder: dict[Any, Any], wanted: set[int]) -> int:
    keys = [key for key, value in holder.items() if id(value) in wanted]
    for key in keys:
        if "__name__" in holder or "__module__" in holder:
            holder[key] = None  # a global variable or a class attribute that serves as a cache
        else:
            del holder[key]
    return len(keys)
