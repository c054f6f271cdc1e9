"""Keep ranks consistent: an error on one is raised on all, and what must be equal is compared.

A rank that raised alone would leave the others waiting in their next collective, and ranks that
hold different models or plans would hang there or exchange garbage.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.distributed as dist

from moeify.distributed.mesh import world_size
from moeify.errors import DispatchError, MoeifyError, PlanError

__all__ = [
    "assert_same_on_ranks",
    "can_talk",
    "named",
    "run_on_all_ranks",
    "run_on_first_rank",
    "silence_error",
]

T = TypeVar("T")


def run_on_all_ranks(
    what: str,
    action: Callable[[], T],
    *,
    group: Any = None,
    failure: type[MoeifyError] = MoeifyError,
    silence: type[MoeifyError] = DispatchError,
) -> T:
    """Run an action on every rank and return this rank's result; if it fails on one, raise on each.

    Args:
        what: Infinitive, for messages: "find the model's MLPs".
        action: May run collectives only if nothing that fails on one rank alone comes before.
        group: The ranks; None for the world.
        failure: What ranks raise when the action failed on another one.
        silence: What ranks raise when another one does not answer.
    """
    result, _ = _run(what, action, lambda _: None, group, failure, silence)
    return result


def run_on_first_rank(
    what: str,
    action: Callable[[], T],
    *,
    group: Any = None,
    failure: type[MoeifyError] = MoeifyError,
    silence: type[MoeifyError] = DispatchError,
) -> T:
    """Run an action on rank 0 and return its result, which must pickle, on all ranks.

    The action runs no collectives; arguments as those of `run_on_all_ranks`.
    """
    is_first = not can_talk(group) or dist.get_rank(group) == 0

    def on_first() -> T | None:
        return action() if is_first else None

    _, shared = _run(what, on_first, lambda result: result, group, failure, silence)
    first: T = shared[0]
    return first


def assert_same_on_ranks(
    facts: dict[str, str],
    advice: str,
    *,
    group: Any = None,
    failure: type[MoeifyError] = PlanError,
    silence: type[MoeifyError] = DispatchError,
) -> None:
    """Raise a `failure` that names the first of these facts in which ranks differ.

    `advice` tells the user what to do about it; the others are as in `run_on_all_ranks`.
    """
    if not can_talk(group):
        return
    # A model has thousands of facts: they are sent only if their digests differ.
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    if len(set(_gather(digest, "compare facts", group, silence))) == 1:
        return
    by_rank: list[dict[str, str]] = _gather(facts, "compare facts", group, silence)
    for name in {name: None for held in by_rank for name in held}:
        holders: dict[str, list[int]] = {}
        for rank, held in enumerate(by_rank):
            holders.setdefault(held.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            each = [f"{named(ranks)}: {value}" for value, ranks in holders.items()]
            more = f"; and {len(each) - 4} more" if len(each) > 4 else ""
            raise failure(f"ranks disagree on {name} ({'; '.join(each[:4])}{more}); {advice}")


def can_talk(group: Any = None) -> bool:
    """Tell whether there are other ranks to talk to; a simulated world has only one."""
    return group is not None or (world_size() > 1 and dist.get_backend() != "fake")


def silence_error(what: str, error: BaseException, kind: type[MoeifyError]) -> MoeifyError:
    """Return the error of a rank that could not reach the others."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    reason = str(error).split("\n", 1)[0]
    return kind(
        f"rank {rank} could not {what} with the other ranks: {reason} (a peer died or stalled, or "
        "does not make this call; look for its own error)"
    )


def _run(
    what: str,
    action: Callable[[], T],
    share: Callable[[T], Any],
    group: Any,
    failure: type[MoeifyError],
    silence: type[MoeifyError],
) -> tuple[T, list[Any]]:
    """Run an action; return its result and the `share` of each rank's result."""
    if not can_talk(group):
        alone = action()
        return alone, [share(alone)]
    error: Exception | None = None
    result: Any = None
    outcome: tuple[str | None, Any]
    try:
        result = action()
        outcome = None, share(result)
    except Exception as raised:
        error = raised
        outcome = f"{type(raised).__name__}: {raised}", None
    try:
        outcomes: list[tuple[str | None, Any]] = _gather(outcome, what, group, silence)
    except silence as unanswered:
        raise error or unanswered from None
    if error is not None:
        raise error
    failed = {rank: text for rank, (text, _) in enumerate(outcomes) if text is not None}
    if failed:
        first = next(iter(failed.values()))
        raise failure(f"{named([*failed])} could not {what}, so all ranks stop: {first}")
    return result, [shared for _, shared in outcomes]


def _gather(own: Any, what: str, group: Any, silence: type[MoeifyError]) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(gathered, own, group=group)
    except (RuntimeError, ValueError) as error:
        raise silence_error(what, error, silence) from error
    return gathered


def named(ranks: Sequence[int]) -> str:
    """Return ranks as words."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return f"ranks {', '.join(map(str, ranks[:8]))}{', ...' if len(ranks) > 8 else ''}"
