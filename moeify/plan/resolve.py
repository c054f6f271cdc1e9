"""A plan applied to one model's sites: what each becomes, checked and counted. Without torch.

`resolve_sites` is the whole of it and looks at `Site` records only, so that a plan can be tried
without the model. What the numbers count is said in `LayerPlan`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from moeify.errors import UnsupportedModuleError
from moeify.plan.checks import check_layer, check_layers
from moeify.plan.layer_plan import LayerPlan, ResolvedPlan
from moeify.plan.plan import Plan
from moeify.plan.rule_match import Universe, match_rule
from moeify.plan.rules import LayerRule
from moeify.plan.selection import Schedule
from moeify.plan.site import Projection, Site
from moeify.plan.specs import InitSpec, RouterSpec
from moeify.plan.strict_yaml import Where


@dataclass(slots=True)
class _Choice:
    """What the rules have said of one site so far; `said` is where each field was stated."""

    experts: int
    rule: int
    top_k: int = 1
    residual: str = "none"
    kernel: str = "auto"
    router: RouterSpec = field(default_factory=RouterSpec)
    init: InitSpec = field(default_factory=InitSpec)
    said: dict[str, Where] = field(default_factory=dict)


def resolve_sites(
    plan: Plan,
    sites: Sequence[Site],
    *,
    parameters: int,
    parameter_bytes: int,
    linears: Sequence[Projection] = (),
    near_misses: Sequence[str] = (),
) -> ResolvedPlan:
    """Applies a plan to sites.

    Args:
        plan: The plan.
        sites: Every site of the model in execution order, refused ones too.
        parameters: Parameter elements of the whole model, shared ones counted once.
        parameter_bytes: Their bytes.
        linears: Linear layers that are modules of their own, for rules with `expert: linear`.
        near_misses: What nearly is an MLP and why it is none, for the message where none is.

    Returns:
        What every selected site becomes.

    Raises:
        PlanError: If a rule selects nothing, or what it says does not fit a site.
        UnsupportedModuleError: If a selected site is blocked by the state of its weights.
    """
    itemsize = parameter_bytes // parameters if parameters else 4
    like = next((site for site in sites), None)
    linear_sites: dict[str, Site] = {}
    for projection in linears:
        if projection.module is not None and projection.module not in linear_sites:
            position = len(sites) + len(linear_sites)
            linear_sites[projection.module] = _linear_site(projection, position, like, itemsize)
    universe = Universe(
        mlps={site.name: site for site in sites if site.install != "refused" or site.blocked},
        linears=linear_sites,
        refused={
            site.name: site.reason
            for site in sites
            if site.install == "refused" and not site.blocked
        },
        near=near_misses,
    )
    chosen: dict[str, dict[str, _Choice]] = {"mlp": {}, "linear": {}}
    for position, rule in enumerate(plan.layers):
        names = match_rule(plan, position, universe, frozenset(chosen[rule.expert]))
        _apply(plan, position, rule, names, chosen[rule.expert])
    layers = []
    for expert, candidates in (("mlp", universe.mlps), ("linear", universe.linears)):
        for name, site in candidates.items():
            if (choice := chosen[expert].get(name)) is not None:
                if site.blocked:
                    raise UnsupportedModuleError(
                        name, f"{site.reason}; mend it, or take it back with `experts: dense`"
                    )
                layers.append(_layer(plan, site, expert, choice))
    if not layers:
        raise plan.fault(("layers",), "the rules take back all that they select; nothing is left")
    check_layers(plan, layers)
    return ResolvedPlan(plan, tuple(layers), tuple(sites), parameters, parameter_bytes)


def _linear_site(projection: Projection, position: int, like: Site | None, itemsize: int) -> Site:
    bias = projection.out_features if projection.bias is not None else 0
    by_size = {2: "bfloat16", 4: "float32", 8: "float64"}
    return Site(
        name=projection.module or projection.weight,
        index=position,
        install="module",
        reason="",
        d_in=projection.in_features,
        d_ff=0,
        d_out=projection.out_features,
        activation="linear",
        gated=False,
        up=(),
        down=projection,
        # A projection does not know its dtype: take that of an MLP, else the model's average.
        dtype=like.dtype if like else by_size.get(itemsize, "float32"),
        itemsize=like.itemsize if like else itemsize,
        parameters=projection.in_features * projection.out_features + bias,
    )


def _apply(
    plan: Plan, position: int, rule: LayerRule, names: Sequence[str], chosen: dict[str, _Choice]
) -> None:
    """Lets one rule speak on the sites it selects."""
    if rule.experts == "dense":
        for name in names:
            chosen.pop(name, None)
        return
    counts: Sequence[int | None]
    if isinstance(rule.experts, Schedule):
        counts = rule.experts.spread(len(names))
    else:
        counts = [rule.experts if isinstance(rule.experts, int) else None] * len(names)
    for name, count in zip(names, counts, strict=True):
        choice = chosen.get(name)
        if choice is None:
            if count is None:
                raise plan.fault(
                    ("layers", position),
                    f"say how many `experts`: no earlier rule selects `{name}`",
                )
            choice = chosen[name] = _Choice(count, position, router=plan.router, init=plan.init)
        _override(choice, position, rule, count)


def _override(choice: _Choice, position: int, rule: LayerRule, count: int | None) -> None:
    here: Where = ("layers", position)
    choice.rule = position
    if count is not None:
        choice.experts, choice.said["experts"] = count, (*here, "experts")
    if "top_k" in rule.model_fields_set:
        choice.top_k, choice.said["top_k"] = rule.top_k, (*here, "top_k")
    if "residual" in rule.model_fields_set:
        choice.residual, choice.said["residual"] = rule.residual, (*here, "residual")
    if "kernel" in rule.model_fields_set:
        choice.kernel, choice.said["kernel"] = rule.kernel, (*here, "kernel")
    router = {key: getattr(rule.router, key) for key in rule.router.model_fields_set}
    init = {key: getattr(rule.init, key) for key in rule.init.model_fields_set}
    choice.router = choice.router.model_copy(update=router)
    choice.init = choice.init.model_copy(update=init)
    choice.said |= {f"router.{key}": (*here, "router", key) for key in router}
    for key in init:
        written = key.rstrip("_")  # `from` in a plan
        choice.said[f"init.{written}"] = (*here, "init", written)


def _layer(plan: Plan, site: Site, expert: str, choice: _Choice) -> LayerPlan:
    router = choice.router
    if router.combine == "auto":
        combine = "straight_through" if choice.top_k == 1 else "normalized"
        combine = "sum" if choice.init.experts == "split" else combine
        router = router.model_copy(update={"combine": combine})
    layer = LayerPlan(
        site,
        choice.experts,
        choice.top_k,
        choice.residual,
        expert,
        router,
        choice.init,
        choice.rule,
        choice.kernel,
        plan.folder,
    )
    check_layer(plan, layer, choice.said)
    return layer
