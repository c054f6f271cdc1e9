"""The weight of the distillation term over a run: constant, staged, decaying, or while it helps.

Small students learn from a teacher early and are held back by it late, so the paper stops
distilling part of the way: alpha is 0 from a step on.

Source: DeepSpeed-MoE (Rajbhandari et al. 2022), section 4.2.1 (staged knowledge distillation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, Final, Literal, get_args

from moeify.errors import CheckpointError, PlanError

Kind = Literal["constant", "staged", "linear", "cosine", "ahead"]
KINDS: Final = get_args(Kind)


class AlphaSchedule:
    """alpha as a function of the optimizer step.

    - `constant`: alpha.
    - `staged`: alpha before `stop`, 0 from `stop` on.
    - `linear`: alpha * (1 - step / stop), 0 from `stop` on.
    - `cosine`: alpha * (1 + cos(pi * step / stop)) / 2, 0 from `stop` on.
    - `ahead`: alpha until the losses given to `observe` show that the teacher no longer helps, then
      0 for good. An observation counts against the teacher if the student's validation loss is not
      below that of a run without distillation (`baseline`) at the same step or, where the baseline
      has no such step, not below the best one so far, each by more than `min_delta`. It stops after
      `patience` such observations in a row.

    Args:
        kind: One of the above.
        alpha: Weight of the term while it is on.
        stop: A step (int), or a share of `total` (float in (0, 1]).
        total: Optimizer steps of the run, which a share needs; can be set later.
        patience: Observations in a row that end `ahead`.
        min_delta: How much a loss must be lower to count as lower.
        baseline: Validation loss by step of a run without distillation; interpolated linearly.

    Attributes:
        stopped_at: The step at which `ahead` stopped, or None.

    Raises:
        PlanError: An option is out of range.

    Example:
        >>> staged = AlphaSchedule("staged", stop=0.5, total=10)
        >>> [staged(step) for step in (0, 4, 5, 9)]
        [1.0, 1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        kind: Kind = "constant",
        *,
        alpha: float = 1.0,
        stop: float | int = 0.5,
        total: int | None = None,
        patience: int = 3,
        min_delta: float = 0.0,
        baseline: Mapping[int, float] | None = None,
    ) -> None:
        if kind not in KINDS:
            raise PlanError(f"{kind!r} is unknown; use {', '.join(KINDS)}", path="distill.schedule")
        _check_number("alpha", alpha)
        _check_number("min_delta", min_delta)
        share = isinstance(stop, float)
        if isinstance(stop, bool) or not (0 < stop <= 1 if share else stop >= 1):
            raise PlanError(
                f"{stop!r} is neither a step of at least 1 nor a share in (0, 1]",
                path="distill.stop",
            )
        if patience < 1:
            raise PlanError(f"{patience} is not at least 1", path="distill.patience")
        self.kind, self.alpha, self.stop, self.total = kind, float(alpha), stop, total
        self.patience, self.min_delta = patience, float(min_delta)
        self._curve = sorted((int(s), float(v)) for s, v in (baseline or {}).items())
        if not all(math.isfinite(loss) for _, loss in self._curve):
            raise PlanError("a loss in it is not finite", path="distill.baseline")
        self.stopped_at: int | None = None
        self._best, self._against, self._last = math.inf, 0, -1

    def __call__(self, step: int) -> float:
        """Return alpha for optimizer step `step`, counted from 0.

        Raises:
            PlanError: `stop` is a share and `total` is not known.
        """
        if self.kind == "constant":
            return self.alpha
        if self.kind == "ahead":
            return self.alpha if self.stopped_at is None else 0.0
        end = self._end()
        if step >= end:
            return 0.0
        if self.kind == "staged":
            return self.alpha
        part = float(step / end)
        if self.kind == "linear":
            return self.alpha * (1 - part)
        return self.alpha * (1 + math.cos(math.pi * part)) / 2

    @property
    def done(self) -> bool:
        """Whether `ahead` has stopped."""
        return self.stopped_at is not None

    def observe(self, step: int, val_loss: float) -> bool:
        """Record a validation loss of the student, and return whether distillation goes on.

        Only `ahead` uses it. A loss that is not finite counts against the teacher. A step that was
        recorded already is ignored, so that a log can be replayed.

        Args:
            step: Optimizer steps done when it was measured.
            val_loss: The student's loss on held-out text, without the distillation term.
        """
        if self.kind != "ahead" or step <= self._last:
            return not self.done
        self._last = step
        reference = self._reference(step)
        bar = self._best if reference is None else reference
        ahead = math.isfinite(val_loss) and val_loss < bar - self.min_delta
        if math.isfinite(val_loss):
            self._best = min(self._best, val_loss)
        self._against = 0 if ahead else self._against + 1
        if self._against >= self.patience and self.stopped_at is None:
            self.stopped_at = step
        return not self.done

    def state_dict(self) -> dict[str, Any]:
        """Return what a run has to keep, as plain numbers."""
        best = self._best if math.isfinite(self._best) else None
        return {
            "kind": self.kind,
            "total": self.total,
            "stopped_at": self.stopped_at,
            "best": best,
            "against": self._against,
            "last": self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            CheckpointError: It is of another kind of schedule, or damaged.
        """
        if state.get("kind") != self.kind:
            raise CheckpointError(
                f"the saved schedule is {state.get('kind')!r} and this one {self.kind!r}: make it "
                "with the same options"
            )
        try:
            total, stopped = state["total"], state["stopped_at"]
            best, against, last = state["best"], int(state["against"]), int(state["last"])
            best = math.inf if best is None else float(best)
            stopped = None if stopped is None else int(stopped)
            total = None if total is None else int(total)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the saved schedule is damaged: {error!r}") from error
        self.total = self.total if total is None else total
        self.stopped_at = stopped
        self._best, self._against, self._last = best, against, last

    def _end(self) -> Fraction:
        """Return the step at which alpha becomes 0, as a fraction: 0.1 of 30 is exactly 3."""
        if not isinstance(self.stop, float):
            return Fraction(self.stop)
        if self.total is None or self.total < 1:
            raise PlanError(
                f"stop {self.stop} is a share of a run whose length is not known: give the steps "
                "of the run, or a step instead of a share",
                path="distill.stop",
            )
        return Fraction(str(self.stop)) * self.total

    def _reference(self, step: int) -> float | None:
        """Return the baseline's loss at a step, or None outside its curve."""
        curve = self._curve
        if not curve or not curve[0][0] <= step <= curve[-1][0]:
            return None
        after = next(i for i, (at, _) in enumerate(curve) if at >= step)
        (right, high) = curve[after]
        if right == step:
            return high
        left, low = curve[after - 1]
        return low + (high - low) * (step - left) / (right - left)


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not (value >= 0 and math.isfinite(value)):
        raise PlanError(f"{value!r} is not a number of at least 0", path=f"distill.{name}")
