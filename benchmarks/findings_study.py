"""What is compared: sizes, and contestants as plans over one dense model.

Every contestant but the dense one and those from scratch starts from the dense model of its seed,
sees the same text in the same order, and differs from its neighbour in one line of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

PlanData: TypeAlias = dict[str, Any]

TINY_TOKENS = 192 * 1024
"""Tokens of one continued run of `tiny`; all that it costs follows from this number."""
SMALL_TOKENS = 512 * 16384
"""The same of `small`."""


@dataclass(frozen=True)
class Size:
    """The size of the study."""

    name: str  # `tiny` or `small`
    width: int  # D
    layers: int  # layers of the dense model, even, at least 6
    heads: int  # attention heads
    context: int  # positions
    batch: int  # windows per step
    steps: int  # steps of a continued run
    dense_steps: int  # steps of the dense model that all start from
    experts: int  # experts per layer of the standard MoE, a multiple of 4
    held_out: int  # tokens of held-out text of one evaluation
    points: int  # evaluations of a continued run, beside the one before its first step
    rate: float  # peak learning rate
    dtype: Literal["float32", "bfloat16"]  # `float32`, or `bfloat16` for autocast
    device: Literal["cpu", "cuda"] = "cpu"  # where it runs, "cuda" only where there is one
    workers: int = 1  # processes of one thread each, on a CPU

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one step."""
        return self.batch * self.context

    def shortened(self, steps: int) -> Size:
        """Return the same models, trained for a few steps: a rehearsal."""
        few = {"steps": steps, "dense_steps": steps, "points": min(steps, self.points)}
        return replace(self, **few, held_out=4 * self.context)  # type: ignore[arg-type]


def tiny() -> Size:
    """Return the size for two cores: two processes of one thread, 30% faster than one of two."""
    context, batch = 128, 8
    steps = TINY_TOKENS // (context * batch)
    return Size(
        name="tiny",
        width=64,
        layers=6,
        heads=4,
        context=context,
        batch=batch,
        steps=steps,
        dense_steps=2 * steps,
        experts=8,
        held_out=192 * context,
        points=4,
        rate=2e-3,
        dtype="float32",
        workers=2,
    )


def small(device: Literal["cpu", "cuda"] = "cuda") -> Size:
    """Return the size for a GPU."""
    context, batch = 512, 32
    steps = SMALL_TOKENS // (context * batch)
    return Size(
        name="small",
        width=512,
        layers=12,
        heads=8,
        context=context,
        batch=batch,
        steps=steps,
        dense_steps=2 * steps,
        experts=32,
        held_out=512 * context,
        points=8,
        rate=1e-3,
        dtype="bfloat16",
        device=device,
    )


@dataclass(frozen=True)
class Contestant:
    """One way to spend the tokens."""

    name: str  # as in tables
    what: str  # what it is, in one line
    plan: PlanData | None = field(hash=False)  # the plan; None stays dense
    # `dense`: the trained model of the seed; `fresh`: an untrained one, for a run as long as both
    # parts of the others; `taught`: the dense model, converted and with layers left out
    start: Literal["dense", "fresh", "taught"] = "dense"
    after: str | None = None  # the contestant whose trained model teaches it
    # of which it spends as much as `continued`: its run is shorter if a step costs more, and the
    # learning rate falls over that run
    budget: Literal["tokens", "flops", "seconds"] = "tokens"


DENSE = "dense"
"""The job that trains the dense model of a seed."""
TEACHER = "pr-moe"
KD_STOP = 0.5
"""Share of the run after which staged distillation stops."""
BASELINE = "continued"
"""The contestant whose FLOPs and seconds are the budgets."""
DEPTH = 0.875
"""Share of the layers that a student keeps: 21 of 24 in the paper."""
TIGHT = 0.5
"""Capacity factor of the tight runs: at most half of the routes find room."""


def contestants(size: Size) -> Mapping[str, Contestant]:
    """Return all of them by name, in the order they run."""
    e = size.experts
    plan = _standard
    student = "a student of the PR-MoE"
    listed = (
        Contestant("continued", "the dense model, trained on", None),
        Contestant("copy", f"standard MoE: every other layer, {e} copies, top-1", plan(e)),
        Contestant(
            "noise", "copies with 5% of noise", plan(e, init=_init("noise", noise_std=0.05))
        ),
        Contestant(
            "drop",
            "Drop-Upcycling: half of the neurons drawn anew",
            plan(e, init=_init("drop", drop_ratio=0.5)),
        ),
        Contestant(
            "scratch",
            "the standard MoE, nothing trained before",
            plan(e, init=_init("random")),
            "fresh",
        ),
        Contestant("first half", "MoE in the first half", plan(e, select={"half": "first"})),
        Contestant("second half", "MoE in the second half", plan(e, select={"half": "second"})),
        Contestant("top-2", "two experts per token", plan(e, top_k=2)),
        Contestant("residual", "one expert beside the dense MLP", plan(e, residual="coefficient")),
        Contestant(TEACHER, f"residual, {e // 4} experts, {e // 2} in the last two", _pyramid(e)),
        Contestant(
            "probability", "top-1 weighted by its probability", plan(e, combine="probability")
        ),
        Contestant(
            "tight random",
            f"capacity factor {TIGHT}, random tokens stay",
            plan(e, capacity_factor=TIGHT, drop="random"),
        ),
        Contestant(
            "tight position",
            f"capacity factor {TIGHT}, the first tokens stay",
            plan(e, capacity_factor=TIGHT, drop="position"),
        ),
        Contestant(
            "copy, equal FLOPs",
            "the standard MoE, for the active FLOPs of `continued`",
            plan(e),
            budget="flops",
        ),
        Contestant(
            "copy, equal time",
            "the standard MoE, for the time of `continued`",
            plan(e),
            budget="seconds",
        ),
        Contestant("student", f"{student}, no distillation", _student(e, None), "taught", TEACHER),
        Contestant(
            "student KD",
            f"{student}, distilled to the end",
            _student(e, {"schedule": "constant"}),
            "taught",
            TEACHER,
        ),
        Contestant(
            "student staged",
            f"{student}, distilled for the first {KD_STOP:.0%}",
            _student(e, {"schedule": "staged", "stop": KD_STOP}),
            "taught",
            TEACHER,
        ),
    )
    return MappingProxyType({each.name: each for each in listed})


def _standard(
    experts: int,
    *,
    select: dict[str, Any] | None = None,
    top_k: int = 1,
    residual: str = "none",
    init: dict[str, Any] | None = None,
    **router: Any,
) -> PlanData:
    rule = {
        "select": select or {"every": 2, "start": 1},
        "experts": experts,
        "top_k": top_k,
        "residual": residual,
    }
    return {"version": 1, "layers": [rule], "router": router, "init": init or _init("copy")}


def _pyramid(experts: int) -> PlanData:
    """Return the paper's proportions: a quarter of the standard's experts, half in the last two."""
    plan = _standard(experts // 4, residual="coefficient")
    last = {"select": {"last": 2, "of": "selected"}, "experts": experts // 2}
    return plan | {"layers": [*plan["layers"], last]}


def _student(experts: int, distill: dict[str, Any] | None) -> PlanData:
    section: dict[str, Any] = {"depth": DEPTH, "weights": "teacher"}
    section["distill"] = {"alpha": 0.0} if distill is None else {"alpha": 1.0, **distill}
    return _pyramid(experts) | {"student": section}


def _init(experts: str, **more: float) -> dict[str, Any]:
    return {"experts": experts, **more}
