"""The ranks that save or load together: a separate group, and errors that reach all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from moeify import compat
from moeify.distributed.agreement import (
    assert_same_on_ranks,
    run_on_all_ranks,
    run_on_first_rank,
    silence_error,
)
from moeify.distributed.mesh import world_size
from moeify.errors import CheckpointError, MoeifyError

__all__ = ["Ranks"]

T = TypeVar("T")
_made: list[tuple[Any, Any]] = []  # the world's group, and the one made for it


@dataclass(frozen=True, slots=True)
class Ranks:
    """The ranks, or this process alone."""

    group: Any  # gloo, separate from training's, so that a save may run beside it; None alone
    rank: int
    size: int

    @classmethod
    def here(cls) -> Ranks:
        """Return the running world; the first call is collective and makes the group."""
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
                raise silence_error("make a group", error, CheckpointError) from error
            compat.take_timeout_of_world([group])
            _made[:] = [(world, group)]
        return cls(_made[0][1], dist.get_rank(), size)

    def run_on_all(self, what: str, action: Callable[[], T]) -> T:
        """Run an action without collectives on all ranks; if it fails on one, raise on each."""
        return self._typed(run_on_all_ranks, what, action)

    def run_on_first(self, what: str, action: Callable[[], T]) -> T:
        """Run an action on rank 0 and return its result on all ranks; an error is raised on all."""
        return self._typed(run_on_first_rank, what, action)

    def assert_same(self, facts: dict[str, str], advice: str) -> None:
        """Raise a CheckpointError if ranks hold different facts."""
        assert_same_on_ranks(
            facts, advice, group=self.group, failure=CheckpointError, silence=CheckpointError
        )

    def _typed(self, run: Any, what: str, action: Callable[[], T]) -> T:
        try:
            done: T = run(
                what, action, group=self.group, failure=CheckpointError, silence=CheckpointError
            )
        except MoeifyError:
            raise
        except Exception as error:
            raise _as_checkpoint_error(error, what) from error
        return done

    def run(self, what: str, action: Callable[[], T]) -> T:
        """Run torch.distributed.checkpoint; turn what it raises into a CheckpointError."""
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
            raise _as_checkpoint_error(error, what) from error
        except (RuntimeError, ValueError) as error:
            if self.group is None:
                raise _as_checkpoint_error(error, what) from error
            raise silence_error(what, error, CheckpointError) from error


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, MoeifyError) else f"{type(error).__name__}: {error}"


def _as_checkpoint_error(error: Exception, what: str) -> CheckpointError:
    return CheckpointError(f"could not {what}: {_text(error)}")
