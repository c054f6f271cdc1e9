"""One rule of a plan: which sites, and what they become. Importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Tag

from moeify.plan.selection import Count, Schedule, Select, Strict
from moeify.plan.specs import InitSpec, RouterSpec


def _kind_of_select(value: Any) -> str:
    return "<by>" if isinstance(value, Mapping | Select) else "<all>"


def _kind_of_experts(value: Any) -> str:
    if isinstance(value, str):
        return "<word>"
    return "<schedule>" if isinstance(value, Mapping | Schedule) else "<count>"


class LayerRule(Strict):
    """One rule: which sites, and what they become. Fields it does not state it leaves alone.

    Attributes:
        select: Which sites.
        experts: How many experts each; a schedule over the selected sites; `dense` undoes what
            earlier rules selected; `keep` (the default) leaves the count of an earlier rule.
        top_k: Experts per token.
        residual: How the dense MLP is kept beside the experts: not at all, mixed by a learned
            two-way softmax (`coefficient`), added, or scaled by a sigmoid gate.
        expert: What an expert is: the site's `mlp`, or a square `linear` in front of a linear layer
            that `select: {name: ...}` gives by its module path.
        kernel: What runs the experts: `auto` decides by device, dtype and sizes, or one of
            `reference` (plain torch), `cpu`, `triton`, `grouped_mm`, used where it can run.
        router: Overrides of the plan's `router`.
        init: Overrides of the plan's `init`.
    """

    select: Annotated[
        Annotated[Literal["all"], Tag("<all>")] | Annotated[Select, Tag("<by>")],
        Discriminator(_kind_of_select),
    ]
    experts: Annotated[
        Annotated[Count, Tag("<count>")]
        | Annotated[Literal["dense", "keep"], Tag("<word>")]
        | Annotated[Schedule, Tag("<schedule>")],
        Discriminator(_kind_of_experts),
    ] = "keep"
    top_k: Count = 1
    residual: Literal["none", "coefficient", "add", "sigmoid"] = "none"
    expert: Literal["mlp", "linear"] = "mlp"
    kernel: Literal["auto", "reference", "cpu", "triton", "grouped_mm"] = "auto"
    router: RouterSpec = RouterSpec()
    init: InitSpec = InitSpec()
