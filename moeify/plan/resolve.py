"""Apply a plan to a model's sites: what each becomes, checked and counted. Without torch.

`resolve_sites` looks at `Site` records only, so that a plan can be tried without the model.
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
    """What the rules read so far decide about one site."""

    experts: int
    rule: int
    top_k: int = 1
    residual: str = "none"
    kernel: str = "auto"
    router: RouterSpec = field(default_factory=RouterSpec)
    init: InitSpec = field(default_factory=InitSpec)
    stated: dict[str, Where] = field(default_factory=dict)  # the place of each stated field


def resolve_sites(
    plan: Plan,
    sites: Sequence[Site],
    *,
    parameters: int,
    parameter_bytes: int,
    linears: Sequence[Projection] = (),
    near_misses: Sequence[str] = (),
) -> ResolvedPlan:
    """Return what every selected site becomes.

    Args:
        plan: The plan.
        sites: Every site of the model in execution order, refused ones too.
        parameters: Parameter elements of the whole model, shared ones counted once.
        parameter_bytes: Their bytes.
        linears: Linear layers that are modules of their own, for rules with `expert: linear`.
        near_misses: Near misses with their reasons, for the message where there is no MLP.

    Raises:
        PlanError: A rule selects nothing, or what it states does not fit a site.
        UnsupportedModuleError: A selected site is blocked by the state of its weights.
    """
    itemsize = parameter_bytes // parameters if parameters else 4
    refused = {s.name: s.reason for s in sites if s.install == "refused" and not s.blocked}
    universe = Universe(
        mlps={site.name: site for site in sites if site.install != "refused" or site.blocked},
        linears=_linear_sites(linears, sites, itemsize),
        refused=refused,
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
                        name, f"{site.reason}; fix that, or leave it dense with `experts: dense`"
                    )
                layers.append(_layer(plan, site, expert, choice))
    if not layers:
        raise plan.fault(("layers",), "`experts: dense` undoes all that the rules select")
    check_layers(plan, layers)
    return ResolvedPlan(plan, tuple(layers), tuple(sites), parameters, parameter_bytes)


def _linear_sites(
    linears: Sequence[Projection], sites: Sequence[Site], itemsize: int
) -> dict[str, Site]:
    found: dict[str, Site] = {}
    for projection in linears:
        if projection.module is not None and projection.module not in found:
            position = len(sites) + len(found)
            like = sites[0] if sites else None
            found[projection.module] = _linear_site(projection, position, like, itemsize)
    return found


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
    """Apply one rule to the sites it selects."""
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
                    f"state how many `experts`: no earlier rule selects `{name}`",
                )
            choice = chosen[name] = _Choice(count, position, router=plan.router, init=plan.init)
        _override(choice, position, rule, count)


def _override(choice: _Choice, position: int, rule: LayerRule, count: int | None) -> None:
    here: Where = ("layers", position)
    choice.rule = position
    if count is not None:
        choice.experts, choice.stated["experts"] = count, (*here, "experts")
    for key in rule.model_fields_set & {"top_k", "residual", "kernel"}:
        setattr(choice, key, getattr(rule, key))
        choice.stated[key] = (*here, key)
    router = {key: getattr(rule.router, key) for key in rule.router.model_fields_set}
    init = {key: getattr(rule.init, key) for key in rule.init.model_fields_set}
    choice.router = choice.router.model_copy(update=router)
    choice.init = choice.init.model_copy(update=init)
    choice.stated |= {f"router.{key}": (*here, "router", key) for key in router}
    for key in init:
        written = key.rstrip("_")  # `from` in a plan
        choice.stated[f"init.{written}"] = (*here, "init", written)


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
    check_layer(plan, layer, choice.stated)
    return layer
