"""The student of a plan: which layers it keeps, and how it learns from its teacher. Without torch.

A student is its teacher with whole transformer layers left out (Mixture-of-Students). The plan says
which ones go, what the others start from, and how the teacher's logits enter the student's loss.

Source: DeepSpeed-MoE (Rajbhandari et al. 2022), section 4.2: 21 of 24 layers, staged distillation.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from moeify.plan.errors import plan_error
from moeify.plan.selection import LISTED, MAX_INT, Count, Natural, Strict, require_exactly_one


def _share_or_count(value: Any) -> str:
    return "<share>" if isinstance(value, float) else "<count>"


def _ascending(positions: tuple[int, ...]) -> tuple[int, ...]:
    if any(after <= before for before, after in itertools.pairwise(positions)):
        raise PydanticCustomError(
            "plan", "layers keep their order: list each position once, in ascending order"
        )
    return positions


_Share: TypeAlias = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]
_Part: TypeAlias = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_Kept: TypeAlias = Annotated[
    tuple[Natural, ...], LISTED, Field(min_length=1), AfterValidator(_ascending)
]
_Positive: TypeAlias = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class DistillSpec(Strict):
    """How the teacher's logits enter the student's loss: CE + alpha(t) * T^2 * KL.

    Attributes:
        alpha: Weight of the distillation term while it is on.
        temperature: T, which divides both models' logits.
        schedule: alpha over the run: `constant`; `staged`: on until `stop`, then off (the paper's);
            `linear` or `cosine`: down to 0 at `stop`; `ahead`: on until the student is no longer
            better with it than without it on held-out text.
        stop: Where the schedule ends: a share of the run (0.5, at most 1.0) or a step (1000).
        top_k: Teacher logits kept per token where they are cached; null keeps all.
    """

    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    temperature: _Positive = 1.0
    schedule: Literal["constant", "staged", "linear", "cosine", "ahead"] = "constant"
    stop: Annotated[
        Annotated[Count, Tag("<count>")] | Annotated[_Part, Tag("<share>")],
        Discriminator(_share_or_count),
    ] = 0.5
    top_k: Count | None = None


class DropSpec(Strict):
    """Which layers go, by a rule.

    Attributes:
        every: Every n-th layer: 8 drops the 8th, the 16th and the 24th.
    """

    every: Annotated[int, Field(ge=2, le=MAX_INT)]


class StudentSpec(Strict):
    """A model of the teacher's with fewer layers, and how it is taught.

    Exactly one of `drop`, `keep` and `depth` says which layers it has.

    Attributes:
        drop: Layers to leave out, by a rule: `{every: 8}`.
        keep: 0-based positions of the layers to keep, ascending.
        depth: How many layers to keep, as a number (21) or a share (0.875); they are spread evenly,
            the first and the last among them.
        stack: Of a model with an encoder and a decoder, which one gets shorter.
        weights: What the student starts from: the `teacher`'s kept layers, or `fresh` weights
            (seeded by the plan's `init: {seed: ...}`).
        distill: How it learns from the teacher.
    """

    drop: DropSpec | None = None
    keep: _Kept | None = None
    depth: (
        Annotated[
            Annotated[Count, Tag("<count>")] | Annotated[_Share, Tag("<share>")],
            Discriminator(_share_or_count),
        ]
        | None
    ) = None
    stack: Literal["all", "encoder", "decoder"] = "all"
    weights: Literal["teacher", "fresh"] = "teacher"
    distill: DistillSpec = DistillSpec()

    @model_validator(mode="after")
    def _exactly_one(self) -> StudentSpec:
        keys = ("drop", "keep", "depth")
        require_exactly_one([key for key in keys if getattr(self, key) is not None], keys)
        return self

    def positions(self, count: int) -> tuple[int, ...]:
        """Return which of a stack's `count` layers to keep, as ascending 0-based positions.

        Raises:
            ValueError: The choice does not fit; the message says what would.
        """
        if self.drop is not None:
            every = self.drop.every
            if every > count:
                raise ValueError(
                    f"drop.every: {every} drops none of {count} layers; use at most {count}"
                )
            return tuple(at for at in range(count) if (at + 1) % every)
        if self.keep is not None:
            if self.keep[-1] >= count:
                raise ValueError(
                    f"keep: there is no layer {self.keep[-1]}; positions go from 0 to {count - 1}"
                )
            return self.keep
        assert self.depth is not None
        depth = self.depth if isinstance(self.depth, int) else max(1, round(self.depth * count))
        if depth > count:
            raise ValueError(f"depth: {depth} is more than the model's {count} layers")
        if depth == 1:
            return (0,)
        # i (n - 1) / (d - 1), rounded to the nearest integer, halves up.
        last = depth - 1
        return tuple((2 * i * (count - 1) + last) // (2 * last) for i in range(depth))


_Section = TypeVar("_Section", StudentSpec, DistillSpec)


def read_section(kind: type[_Section], data: Mapping[str, Any]) -> _Section:
    """Parse what a plan has under `student:`, or under that section's `distill:`, on its own.

    Raises:
        PlanError: The data does not fit; the path in it starts at the section.
    """
    keys: dict[str, type[Strict]] = {"": kind, "drop": DropSpec, "distill": DistillSpec}
    known = {where: tuple(part.model_fields) for where, part in keys.items()}
    try:
        return kind.model_validate(dict(data))
    except ValidationError as error:
        raise plan_error(error, known, {}, None) from None
