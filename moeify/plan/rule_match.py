"""Which sites a rule selects, and, when it selects none, what would have worked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    def offered(self, expert: str) -> Mapping[str, Site]:
        """Return what a rule with this kind of expert can select."""
        return self.linears if expert == "linear" else self.mlps


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
    offered = universe.offered(rule.expert)
    if not offered:
        raise plan.fault(here, _nothing_offered(rule.expert, universe))
    if rule.select == "all":
        return tuple(offered)
    select = rule.select
    names = [name for name in offered if select.of == "all" or name in selected]
    if not names:
        raise plan.fault(here, "`of: selected` counts over earlier rules; they select nothing")
    if select.key == "name":
        return _by_name(plan, here, select, names, universe, rule.expert)
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
    universe: Universe,
    expert: str,
) -> tuple[str, ...]:
    found: set[str] = set()
    for at, pattern in enumerate(select.patterns):
        hits = [name for name in names if matches(pattern, name)]
        if not hits:
            where = (*here, "name") if isinstance(select.name, str) else (*here, "name", at)
            raise plan.fault(where, _miss(pattern, universe, expert))
        found.update(hits)
    return tuple(name for name in names if name in found)


def _miss(pattern: str, universe: Universe, expert: str) -> str:
    """Explain why a pattern matched nothing, by the nearest thing that it does match."""
    offered = universe.offered(expert)
    if _first(pattern, offered) is not None:
        return "matches only sites that no earlier rule selects; leave out `of: selected`"
    if (hit := _first(pattern, universe.refused)) is not None:
        return f"`{hit}` cannot be converted: {universe.refused[hit]}"
    if expert == "mlp" and (hit := _first(pattern, universe.linears)):
        return f"`{hit}` is a linear layer, not an MLP; use `expert: linear`"
    if expert == "linear" and (hit := _first(pattern, universe.mlps)):
        return f"`{hit}` is an MLP, not a linear layer; leave out `expert: linear`"
    return f"`{pattern}` matches nothing; {nearest(pattern, list(offered))}"


def _first(pattern: str, names: Iterable[str]) -> str | None:
    return next((name for name in names if matches(pattern, name)), None)
