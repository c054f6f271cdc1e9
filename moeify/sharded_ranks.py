"""The ranks that save or load together: a group of their own, and errors that reach them all."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moeify import compat
from moeify.errors import CheckpointError, MoeifyError
from moeify.mesh import world_size

__all__ = ["Ranks"]

T = TypeVar("T")
log = logging.getLogger("moeify")
_made: list[tuple[Any, Any]] = []
"""The world's group, and the one made for it."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks, or this process alone.

    Attributes:
        group: A gloo group, apart from training's, so that a save may run next to it; None alone.
        rank: This process.
        size: How many there are.
    """

    group: Any
    rank: int
    size: int

    @classmethod
    def here(cls) -> Ranks:
        """Return the running world; the first call on it makes the group, on all ranks.

        Raises:
            CheckpointError: The world is simulated.
        """
        size = world_size()
        if size == 1:
            return cls(None, 0, 1)
        if dist.get_backend() == "fake":
            raise CheckpointError("a simulated world has one rank only: nothing can be saved")
        world = dist.group.WORLD
        if not _made or _made[0][0] is not world:
            try:
                group = dist.new_group(backend="gloo")
            except (RuntimeError, ValueError) as error:
                raise died("make a group", error) from error
            compat.take_timeout_of_world([group])
            _made[:] = [(world, group)]
        return cls(_made[0][1], dist.get_rank(), size)

    def together(self, what: str, action: Callable[[], T]) -> list[T]:
        """Do something on all ranks and tell what came out; if it fails on one, raise on each.

        Args:
            what: Infinitive, for messages: "read the checkpoint".
            action: Runs no collectives. Its result can be pickled.

        Returns:
            What it returned, by rank.

        Raises:
            CheckpointError: It failed somewhere, or a rank died.
        """
        error: BaseException | None = None
        said: tuple[bool, Any]
        try:
            said = True, action()
        except Exception as failure:
            error = failure
            said = False, _text(failure)
        if self.group is None:
            if error is None:
                alone: Any = said[1]
                return [alone]
            raise _typed(error, what) from error
        heard: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(heard, said, group=self.group)
        except (RuntimeError, ValueError) as silence:
            if error is not None:
                raise _typed(error, what) from error
            raise died(what, silence) from silence
        if error is not None:
            raise _typed(error, what) from error
        for rank, (fine, value) in enumerate(heard):
            if not fine:
                raise CheckpointError(f"rank {rank} could not {what}: {value}")
        return [value for _, value in heard]

    def from_first(self, what: str, action: Callable[[], T]) -> T:
        """Do something on rank 0 and return the result on all ranks; an error is raised on all."""
        first: Any = self.together(what, lambda: action() if self.rank == 0 else None)[0]
        result: T = first
        return result

    def run(self, what: str, action: Callable[[], T]) -> T:
        """Run torch.distributed.checkpoint; make what it raises, on all ranks, a typed error.

        Raises:
            CheckpointError: It failed on a rank, or a rank died.
        """
        try:
            return action()
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            if rank == self.rank and isinstance(cause, MoeifyError):
                raise cause from None
            text = _text(cause)
            raise CheckpointError(f"rank {rank} could not {what}: {text}") from None
        except MoeifyError:
            raise
        except OSError as error:
            raise _typed(error, what) from error
        except (RuntimeError, ValueError) as error:
            if self.group is None:
                raise _typed(error, what) from error
            raise died(what, error) from error


def died(what: str, error: BaseException) -> CheckpointError:
    """Return the error of a rank that could not speak to the others."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    reason = str(error).split("\n", 1)[0]
    return CheckpointError(
        f"rank {rank} could not {what} with the other ranks: {reason} (a peer died or stalled; "
        "look for its own error)"
    )


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, MoeifyError) else f"{type(error).__name__}: {error}"


def _typed(error: BaseException, what: str) -> MoeifyError:
    if isinstance(error, MoeifyError):
        return error
    return CheckpointError(f"could not {what}: {_text(error)}")
