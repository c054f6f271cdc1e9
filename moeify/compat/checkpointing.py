"""Which regions of activation checkpointing surround a call, and which of them are recomputed.

torch gives a region no name. Its objects are private: `_CheckpointFrame` without reentrant
autograd, and the context of an autograd function with it (torch's, and those of other libraries).
Both exist from the forward to the last recomputation, so what a forward has to repeat is kept in
them. They are found among the frames of the Python stack.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import FunctionCtx
from torch.utils import checkpoint as _checkpoint

from moeify.compat.autograd import graph_task

_KEPT = "_moeify_kept"


@dataclass(eq=False)
class Region:
    """One checkpointed region around a call."""

    kept: dict[Any, list[Any]]  # values in the order of the forward, by who kept them
    taken: dict[Any, int]  # how many of them a recomputation took
    recomputation: Hashable  # its number; None in the forward

    def keep(self, who: Hashable, value: Any) -> None:
        """Keep a value for recomputations of this region."""
        self.kept.setdefault(who, []).append(value)

    def take(self, who: Hashable) -> Any:
        """Return what the forward kept at this point, or None."""
        values, place = self.kept.get(who, []), (who, self.recomputation)
        at = self.taken.get(place, 0)
        self.taken[place] = at + 1
        return values[at] if at < len(values) else None


def checkpoint_regions() -> list[Region]:
    """Return the regions around the caller, the innermost one first."""
    found: list[Region] = []
    owners: list[Any] = []
    for owner, recomputation in _owners():
        if not any(owner is other for other in owners):
            owners.append(owner)
            kept, taken = owner.__dict__.setdefault(_KEPT, ({}, {}))
            found.append(Region(kept, taken, recomputation))
    return found


def _owners() -> Iterator[tuple[Any, Hashable]]:
    """Yield what stands for each region, and the number of its recomputation."""
    if (owner := _from_hooks()) is not None:
        yield owner, None
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename == _checkpoint.__file__:
            if code.co_name == "checkpoint":
                generator = frame.f_locals.get("gen")
                inner = getattr(generator, "gi_frame", None)
                if inner is not None and isinstance(
                    owner := inner.f_locals.get("new_frame"), _checkpoint._CheckpointFrame
                ):
                    yield owner, None
            elif code.co_name == "unpack_hook" and "gid" in code.co_varnames:
                variables = frame.f_locals
                if isinstance(variables.get("frame"), _checkpoint._CheckpointFrame):
                    yield variables["frame"], variables.get("gid")
        if code.co_name in ("forward", "backward") and "ctx" in code.co_varnames:
            context = frame.f_locals.get("ctx")
            if isinstance(context, FunctionCtx):
                yield context, graph_task() if code.co_name == "backward" else None
        frame = frame.f_back


def _from_hooks() -> Any:
    """Return the region whose hooks save tensors: one that began in a hook is on no stack."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    for cell in (hooks[0].__closure__ or ()) if hooks and hasattr(hooks[0], "__closure__") else ():
        if isinstance(cell.cell_contents, _checkpoint._CheckpointFrame):
            return cell.cell_contents
    return None
