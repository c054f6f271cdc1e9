"""Which sites a rule selects, and, when it selects none, what would have worked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moeify.errors import PlanError
from moeify.plan.selection import Select, matches, nearest, shorten
from moeify.plan.site import Site
from moeify.plan.strict_yaml import Where

if TYPE_CHECKING:
    from moeify.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Universe:
    """What a model offers to a plan, by name in execution order."""

    mlps: Mapping[str, Site]  # those that can be converted
    linears: Mapping[str, Site]  # linear layers as sites, by module path
    refused: Mapping[str, str]  # why the other sites cannot be converted
    near: Sequence[str] = ()  # near misses, each with its reason


def match_rule(
    plan: Plan, position: int, universe: Universe, selected: Collection[str]
) -> tuple[str, ...]:
    """Return the names that the rule at `position` selects, in execution order, at least one.

    `selected` is what earlier rules have selected of this rule's kind of expert.

    Raises:
        PlanError: The model lacks some or all of what the rule names.
    """
    rule = plan.layers[position]
    here: Where = ("layers", position, "select")
    offered = universe.linears if rule.expert == "linear" else universe.mlps
    if not offered:
        raise plan.fault(here, _nothing_offered(rule.expert, universe))
    if rule.select == "all":
        return tuple(offered)
    select = rule.select
    names = [name for name in offered if select.of == "all" or name in selected]
    if not names:
        raise plan.fault(here, "`of: selected` counts over earlier rules; they select nothing")
    if select.key == "name":
        return _by_name(plan, here, select, names, offered, universe, rule.expert)
    try:
        positions = select.positions(len(names))
    except IndexError as error:
        message = f"there is no site {error.args[0]}; {_count(names, select)}"
        raise plan.fault((*here, "index"), message) from None
    if not positions:
        raise plan.fault(here, f"selects nothing; {_count(names, select)}")
    return tuple(names[at] for at in positions)


def _count(names: Sequence[str], select: Select) -> str:
    who = "the model has" if select.of == "all" else "earlier rules select"
    if len(names) == 1:
        return f"{who} 1 site: 0"
    return f"{who} {len(names)} sites: 0..{len(names) - 1}"


def _nothing_offered(expert: str, universe: Universe) -> str:
    if expert == "linear":
        return "the model has no linear layer that is a module of its own"
    message = "the model has no MLP that can be converted"
    if universe.refused:
        reasons = [f"{name}: {reason}" for name, reason in universe.refused.items()]
        message += f"; refused: {shorten(reasons, 4)}"
    if universe.near:
        message += f"; nearly: {shorten(list(universe.near), 4)}"
    if universe.linears:
        message += "; linear layers can be named with `expert: linear`"
    return message


def _by_name(
    plan: Plan,
    here: Where,
    select: Select,
    names: Sequence[str],
    offered: Mapping[str, Site],
    universe: Universe,
    expert: str,
) -> tuple[str, ...]:
    found: set[str] = set()
    for at, pattern in enumerate(select.patterns):
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            where = (*here, "name") if isinstance(select.name, str) else (*here, "name", at)
            raise _miss(plan, where, pattern, offered, universe, expert)
        found.update(hits)
    return tuple(name for name in names if name in found)


def _miss(
    plan: Plan,
    where: Where,
    pattern: str,
    offered: Mapping[str, Site],
    universe: Universe,
    expert: str,
) -> PlanError:
    """Explain why a pattern matched nothing, by the nearest thing that it does match."""
    if any(matches(pattern, name) for name in offered):
        reason = "matches only sites that no earlier rule selects; leave out `of: selected`"
    elif refused := [name for name in universe.refused if matches(pattern, name)]:
        reason = f"`{refused[0]}` cannot be converted: {universe.refused[refused[0]]}"
    elif expert == "mlp" and (hit := _first(pattern, universe.linears)):
        reason = f"`{hit}` is a linear layer, not an MLP; use `expert: linear`"
    elif expert == "linear" and (hit := _first(pattern, universe.mlps)):
        reason = f"`{hit}` is an MLP, not a linear layer; leave out `expert: linear`"
    else:
        reason = f"`{pattern}` matches nothing; {nearest(pattern, list(offered))}"
    return plan.fault(where, reason)


def _first(pattern: str, sites: Mapping[str, Site]) -> str | None:
    return next((name for name in sites if matches(pattern, name)), None)
