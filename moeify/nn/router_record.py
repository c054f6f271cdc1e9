"""What a router keeps of a forward of its model: losses, statistics, logits.

A record belongs to one thread, so forwards in several threads do not mix. While a forward of the
model runs, every call of the router adds to its record; any other call replaces it.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

READ_IN_A_GRAPH = -1
"""In `ForwardRecord.read`: read by compiled code, which must not depend on numbers of forwards."""


class RouterStats(TypedDict):
    """Statistics of one forward, without gradient."""

    counts: Tensor  # [E] int32, routes per expert before dropping
    dropped: Tensor  # [] float, fraction of the routes that were dropped
    entropy: Tensor  # [] float, mean entropy of the scores, in nats
    tokens: int | Tensor  # a tensor if they were counted over ranks


@dataclass(eq=False)
class ForwardRecord:
    """The record of the last forward in one thread.

    Attributes:
        loss: Weighted sum of the losses, with its graph; None before a call.
        stats: `RouterStats`; None before a call.
        logits: [T, E] of each call, with their graph, if `keep_logits`.
        keep_logits: Whether to keep them.
        adds: Whether a forward of the model is running, to whose record the next call adds.
        forward: Number of that forward; numbers grow.
        read: Number of the newest forward when `moeify.aux_loss` read the loss; 0 if it did not.
    """

    loss: Tensor | None = None
    stats: RouterStats | None = None
    logits: tuple[Tensor, ...] = ()
    keep_logits: bool = False
    adds: bool = False
    forward: int = 0
    read: int = 0

    def begin(self, number: int) -> None:
        """Drop what the last forward left, and let the calls that follow add up."""
        self.loss, self.stats, self.logits = None, None, ()
        self.adds, self.forward, self.read = True, number, 0

    def add(self, loss: Tensor, stats: RouterStats, logits: Tensor) -> None:
        """Record one call."""
        if self.keep_logits:
            self.logits = (*self.logits, logits)
        if self.adds and self.loss is not None and self.stats is not None:
            loss, stats = self.loss + loss, merged(self.stats, stats)
        self.loss, self.stats = loss, stats

    def snapshot(self) -> Mapping[str, Any]:
        """Return a copy, for `restore`."""
        return dict(self.__dict__)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `snapshot` returned."""
        self.__dict__.update(state)


class Records(threading.local):
    """The `ForwardRecord` of each thread, in `own`.

    Compilers lose what is written to a `threading.local` itself, and guard on its dictionary, which
    must therefore be filled from the start.
    """

    def __init__(self) -> None:
        self.own = ForwardRecord()


def read_losses(records: Sequence[ForwardRecord]) -> list[Tensor]:
    """Return the losses of the last forward, and those of earlier ones that were never read.

    They differ if parts of a model are called one after the other: each part begins a forward.
    """
    if torch.compiler.is_compiling():  # numbers would be guarded on
        for record in records:
            record.read = READ_IN_A_GRAPH
        return [record.loss for record in records if record.loss is not None]
    newest = max((record.forward for record in records), default=0)
    found: list[Tensor] = []
    for record in records:
        again = record.forward if record.read == READ_IN_A_GRAPH else record.read
        if record.loss is not None and again in (0, newest):
            found.append(record.loss)
            record.read = newest
    return found


def at_least_one(tokens: int | Tensor) -> int | Tensor:
    """Return a number of tokens to divide by."""
    return tokens.clamp_min(1) if isinstance(tokens, Tensor) else max(tokens, 1)


def merged(first: RouterStats, second: RouterStats) -> RouterStats:
    """Return the statistics of both: sums of counts and tokens, means weighted by tokens."""
    tokens = first["tokens"] + second["tokens"]
    share = first["tokens"] / at_least_one(tokens)
    return {
        "counts": first["counts"] + second["counts"],
        "dropped": share * first["dropped"] + (1 - share) * second["dropped"],
        "entropy": share * first["entropy"] + (1 - share) * second["entropy"],
        "tokens": tokens,
    }
