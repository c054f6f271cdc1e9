"""Plans by name: the layouts of the papers, with the options that one usually turns.

Each preset is a function of keyword options that returns a plan's data, as a plan file would hold
it. Positions count over the model's installable sites, so a preset fits a model of any depth.
Importable without torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from moeify.errors import PlanError
from moeify.plan.errors import unknown

PlanData: TypeAlias = dict[str, Any]


def _plan(*rules: PlanData, **router: Any) -> PlanData:
    return {"version": 1, "layers": list(rules), "router": router}


def moe(
    *,
    experts: int = 8,
    top_k: int = 1,
    residual: str = "none",
    every: int = 2,
    start: int = 1,
    aux_loss: float = 0.01,
    capacity_factor: float | None = 1.25,
) -> PlanData:
    """Standard MoE: every second MLP, from the second on. Source: GShard, Switch, DeepSpeed-MoE."""
    rule = {
        "select": {"every": every, "start": start},
        "experts": experts,
        "top_k": top_k,
        "residual": residual,
    }
    return _plan(rule, aux_loss=aux_loss, capacity_factor=capacity_factor)


def residual(
    *,
    experts: int = 8,
    every: int = 2,
    start: int = 1,
    aux_loss: float = 0.01,
    capacity_factor: float | None = 1.25,
) -> PlanData:
    """Residual-MoE: each expert corrects a dense MLP that stays. Source: DeepSpeed-MoE, 4.1."""
    return moe(
        experts=experts,
        residual="coefficient",
        every=every,
        start=start,
        aux_loss=aux_loss,
        capacity_factor=capacity_factor,
    )


def pr_moe(
    *,
    experts: int = 32,
    last: int = 64,
    every: int = 2,
    start: int = 1,
    top_k: int = 1,
    aux_loss: float = 0.01,
    capacity_factor: float | None = 1.25,
) -> PlanData:
    """Pyramid-Residual-MoE: `last` experts in the last two MoE layers. Source: DeepSpeed-MoE, 4.1.

    The second rule counts over the sites that the first one selected (`of: selected`): counted over
    all sites it would turn the second-last MLP of the model into an MoE as well.
    """
    rule = {
        "select": {"every": every, "start": start},
        "experts": experts,
        "top_k": top_k,
        "residual": "coefficient",
    }
    pyramid = {"select": {"last": 2, "of": "selected"}, "experts": last}
    return _plan(rule, pyramid, aux_loss=aux_loss, capacity_factor=capacity_factor)


def top2(
    *,
    experts: int = 8,
    residual: str = "none",
    every: int = 2,
    start: int = 1,
    aux_loss: float = 0.01,
    capacity_factor: float | None = 1.25,
) -> PlanData:
    """Every second MLP, two experts per token. Source: GShard."""
    return moe(
        experts=experts,
        top_k=2,
        residual=residual,
        every=every,
        start=start,
        aux_loss=aux_loss,
        capacity_factor=capacity_factor,
    )


def _half(which: str, experts: int, top_k: int, residual: str, router: PlanData) -> PlanData:
    rule = {"select": {"half": which}, "experts": experts, "top_k": top_k, "residual": residual}
    return _plan(rule, **router)


def first_half(
    *,
    experts: int = 8,
    top_k: int = 1,
    residual: str = "none",
    aux_loss: float = 0.01,
    capacity_factor: float | None = 1.25,
) -> PlanData:
    """Every MLP of the first half. Source: the placement study of DeepSpeed-MoE, 4.1."""
    router = {"aux_loss": aux_loss, "capacity_factor": capacity_factor}
    return _half("first", experts, top_k, residual, router)


def second_half(
    *,
    experts: int = 8,
    top_k: int = 1,
    residual: str = "none",
    aux_loss: float = 0.01,
    capacity_factor: float | None = 1.25,
) -> PlanData:
    """Every MLP of the second half. Source: the placement study of DeepSpeed-MoE, 4.1."""
    router = {"aux_loss": aux_loss, "capacity_factor": capacity_factor}
    return _half("second", experts, top_k, residual, router)


def switch(
    *,
    experts: int = 8,
    every: int = 2,
    start: int = 1,
    aux_loss: float = 0.01,
    capacity_factor: float | None = 1.25,
) -> PlanData:
    """Switch Transformer: one expert, scaled by its probability, jittered. Source: Switch, 2.1.

    Scaling by the probability changes what the model computes, so this one does not start equal
    to the dense model; `moe` does.
    """
    data = moe(
        experts=experts,
        every=every,
        start=start,
        aux_loss=aux_loss,
        capacity_factor=capacity_factor,
    )
    data["router"] |= {"combine": "probability", "noise": "jitter"}
    return data


def mixtral(*, experts: int = 8, top_k: int = 2, aux_loss: float = 0.01) -> PlanData:
    """Every MLP, two of eight experts, nothing dropped. Source: Mixtral of Experts."""
    rule = {"select": "all", "experts": experts, "top_k": top_k}
    return _plan(rule, combine="normalized", capacity_factor=None, aux_loss=aux_loss)


PRESETS: Mapping[str, Callable[..., PlanData]] = MappingProxyType(
    {
        "moe": moe,
        "pr-moe": pr_moe,
        "residual": residual,
        "top2": top2,
        "first-half": first_half,
        "second-half": second_half,
        "switch": switch,
        "mixtral": mixtral,
    }
)


def preset_data(name: str, options: Mapping[str, Any]) -> PlanData:
    """Makes a preset's data.

    Args:
        name: One of `PRESETS`.
        options: Keyword options of that preset.

    Returns:
        The plan's data, not yet validated.

    Raises:
        PlanError: If the name or an option is unknown; it lists those that exist.
    """
    if name not in PRESETS:
        raise PlanError(unknown(name, tuple(PRESETS), "preset"))
    make = PRESETS[name]
    allowed = tuple(inspect.signature(make).parameters)
    for option in options:
        if option not in allowed:
            raise PlanError(unknown(option, allowed, "option"), path=f"preset {name}")
    return make(**options)
