"""Meet before a call that all ranks must make: a rank that came alone is told who is missing.

In a collective it would wait in silence for the timeout of the process group, half an hour by
default. Ranks meet in the key-value store of `torch.distributed` instead, in numbered slots; a
slot that a rank has given up is skipped by those who come later.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterator
from typing import Any, Final

import torch.distributed as dist

from moeify import compat
from moeify.distributed.agreement import can_talk, named, silence_error
from moeify.errors import DispatchError, MoeifyError

__all__ = ["LONG", "SHORT", "meet"]

log = logging.getLogger("moeify")

SHORT: Final = 120.0
"""Seconds that ranks wait for one another where they are in step, as in training."""

LONG: Final = 1200.0
"""The same where one may be far behind: it reads a model from another disk."""

_VARIABLE: Final = "MOEIFY_WAIT"
_WARN: Final = 10.0  # seconds until it is logged who is missing
_MET: Final = "met"
_GONE: Final = "gone: "
_slots: list[tuple[Any, Iterator[int]]] = []  # the world's group, and the numbers of its slots


def meet(what: str, patience: float, silence: type[MoeifyError] = DispatchError) -> None:
    """Wait until every rank of the world is here, to do the same.

    Args:
        what: Infinitive, for messages: "save the model".
        patience: Seconds to wait, `SHORT` or `LONG`. The environment variable MOEIFY_WAIT counts
            instead if it is set, and the timeout of the world if that is shorter.
        silence: What to raise.

    Raises:
        MoeifyError: A `silence`: ranks have not come, or came to do something else; names them.
    """
    if not can_talk():
        return
    patience = min(_patience(patience), compat.timeout_of_world())
    if not _slots or _slots[0][0] is not dist.group.WORLD:
        _slots[:] = [(dist.group.WORLD, itertools.count())]
    verdict = _GONE
    try:
        store = compat.store_of_world()
        while verdict == _GONE:
            verdict = _Slot(store, next(_slots[0][1])).wait(what, patience)
    except RuntimeError as error:  # the process that holds the store died
        raise silence_error(what, error, silence) from error
    if verdict != _MET:
        raise silence(verdict)


def _patience(usual: float) -> float:
    text = os.environ.get(_VARIABLE, "")
    try:
        return float(text) if text else usual
    except ValueError:
        raise MoeifyError(f"{_VARIABLE}: {text!r} is not a number of seconds") from None


class _Slot:
    """Where ranks meet once. The first verdict counts, for all."""

    def __init__(self, store: Any, number: int) -> None:
        self.store, self.prefix = store, f"moeify/meeting/{number}/"
        self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def wait(self, what: str, patience: float) -> str:
        """Return "met", or what went wrong; "gone: " alone if the others had given up before."""
        if self._known("verdict"):
            return _GONE
        self.store.set(self.prefix + str(self.rank), what)
        if self.store.add(self.prefix + "count", 1) == self.size:
            return self._judge(self._difference() or _MET)
        start, warned = time.monotonic(), False
        try:
            while not self._known("verdict"):
                waited = time.monotonic() - start
                if waited >= patience:
                    return self._judge(self._given_up(what, waited))
                if waited >= _WARN and not warned:
                    self._warn(what, patience)
                    warned = True
                time.sleep(min(0.5, 0.001 + waited / 20))
        except KeyboardInterrupt:
            self._judge(f"rank {self.rank} was interrupted while it waited to {what}")
            raise
        return self._judge("")

    def _known(self, key: str) -> bool:
        return bool(self.store.check([self.prefix + key]))

    def _judge(self, verdict: str) -> str:
        """Return the verdict of this slot, which is this one if there is none yet."""
        found: bytes = self.store.compare_set(self.prefix + "verdict", "", verdict)
        return found.decode()

    def _difference(self) -> str:
        """Return a sentence if the ranks, all of them here, came for different things."""
        came: dict[str, list[int]] = {}
        for rank in range(self.size):
            came.setdefault(self.store.get(self.prefix + str(rank)).decode(), []).append(rank)
        if len(came) == 1:
            return ""
        each = "; ".join(f"{named(ranks)} to {what}" for what, ranks in came.items())
        return f"ranks came to do different things ({each}): make the same calls on every rank"

    def _missing(self) -> list[int]:
        return [rank for rank in range(self.size) if not self._known(str(rank))]

    def _given_up(self, what: str, waited: float) -> str:
        return (
            f"rank {self.rank} could not {what} with the other ranks: {named(self._missing())} did "
            f"not come within {waited:.0f} s. Every rank must make this call; if one is only slow, "
            f"set {_VARIABLE} to more seconds"
        )

    def _warn(self, what: str, patience: float) -> None:
        """Log who is missing, on the first rank that wants to."""
        if self.store.add(self.prefix + "warnings", 1) == 1:
            log.warning(
                "rank %d waits to %s: %s did not come yet, and must make this call too (giving up "
                "after %.0f s; %s changes that)",
                *(self.rank, what, named(self._missing()), patience, _VARIABLE),
            )
