"""Release the memory of a conversion that nothing uses any more, but nothing has freed either."""

from __future__ import annotations

import ctypes
import gc
import sys

from torch import nn

_WORTHWHILE = 1 << 26
"""Bytes of a model for which a pass over all objects of the process is worth its time."""


def release(model: nn.Module) -> None:
    """Free what graphs and their making have left behind, beside this model.

    A recorded graph is a cycle, and its module holds the dense parameters. `torch.fx.wrap`, which
    the code of blocks over several ranks calls, keeps its own frame in a cycle, and so the
    variables of all functions that led there; these frames are young. What is freed then goes back
    to the system.
    """
    size = sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta)
    if size < _WORTHWHILE:
        gc.collect(1)
        return
    gc.collect()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)
