"""What must hold for a graph after every pass: a list of named rules.

A rule is a function from a module and its context to sentences, one per problem. Add one by
giving the manager a longer list; nothing else has to change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from moeify.errors import PassError
from moeify.passes.infra.base import PlanContext
from moeify.passes.infra.printer import format_node
from moeify.passes.infra.records import record_of

__all__ = ["DEFAULT_RULES", "Check", "Rule", "find_problems", "verify_graph"]

Check = Callable[[GraphModule, PlanContext], list[str]]
"""Return one sentence for each problem with a graph; none if all is well."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that must hold.

    Args:
        name: A few words, such as `targets-exist`.
        check: Returns one sentence for each problem; none if all is well.
        fact: Apply the rule only while this fact holds; None applies it always.
    """

    name: str
    check: Check
    fact: str | None = None


def _graphs(gm: GraphModule) -> Iterator[tuple[str, GraphModule]]:
    """Yield all GraphModules in a module, itself first, with a prefix for messages."""
    for path, module in gm.named_modules():
        if isinstance(module, GraphModule):
            yield f"{path}: " if path else "", module


def _nodes(gm: GraphModule) -> Iterator[tuple[str, GraphModule, Node]]:
    for where, module in _graphs(gm):
        for node in module.graph.nodes:
            yield where, module, node


def _output_is_last(gm: GraphModule, ctx: PlanContext) -> list[str]:
    problems = []
    for where, module in _graphs(gm):
        ops = [node.op for node in module.graph.nodes]
        if ops.count("output") != 1:
            problems.append(f"{where}{ops.count('output')} output nodes; a graph has exactly one")
        elif ops[-1] != "output":
            problems.append(f"{where}the output node is not the last node")
    return problems


def _names_are_unique(gm: GraphModule, ctx: PlanContext) -> list[str]:
    problems = []
    for where, module in _graphs(gm):
        counts = Counter(node.name for node in module.graph.nodes)
        problems += [f"{where}{n} nodes are named %{name}" for name, n in counts.items() if n > 1]
    return problems


def _targets_exist(gm: GraphModule, ctx: PlanContext) -> list[str]:
    problems = []
    for where, module, node in _nodes(gm):
        if node.op not in ("get_attr", "call_module"):
            continue
        found: object = module
        for part in str(node.target).split("."):
            if not hasattr(found, part):
                problems.append(f"{where}nothing at {node.target!r}, in {format_node(node)}")
                break
            found = getattr(found, part)
        else:
            if node.op == "call_module" and not isinstance(found, torch.nn.Module):
                problems.append(f"{where}{node.target!r} is not a module, in {format_node(node)}")
    return problems


def _uses_agree(gm: GraphModule, ctx: PlanContext) -> list[str]:
    problems = []
    for where, module in _graphs(gm):
        live = set(module.graph.nodes)
        for node in module.graph.nodes:
            problems += [
                f"{where}%{node.name} counts %{user.name} as a user, which "
                + ("does not read it" if user in live else "is not in the graph")
                for user in node.users
                if user not in live or node not in user.all_input_nodes
            ]
            problems += [
                f"{where}%{source.name} is not in the graph, read by {format_node(node)}"
                for source in node.all_input_nodes
                if source not in live
            ]
    return problems


def _lints(gm: GraphModule, ctx: PlanContext) -> list[str]:
    problems = []
    for where, module in _graphs(gm):
        try:
            module.graph.lint()
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            problems.append(f"{where}{error}")
    return problems


def _records_are_whole(gm: GraphModule, ctx: PlanContext) -> list[str]:
    problems = []
    for where, _, node in _nodes(gm):
        try:
            rec = record_of(node)
        except TypeError as error:
            problems.append(f"{where}{error}")
            continue
        if rec is None:
            continue
        if len(rec.shapes) != len(rec.dtypes):
            counts = f"{len(rec.shapes)} shapes and {len(rec.dtypes)} dtypes"
            problems.append(f"{where}its record has {counts}: {format_node(node)}")
        if (rec.site is None) != (rec.role is None):
            has, lacks = ("role", "site") if rec.site is None else ("site", "role")
            problems.append(f"{where}its record has a {has} but no {lacks}: {format_node(node)}")
    return problems


DEFAULT_RULES: tuple[Rule, ...] = (
    Rule("records-are-whole", _records_are_whole),
    Rule("output-is-last", _output_is_last),
    Rule("names-are-unique", _names_are_unique),
    Rule("targets-exist", _targets_exist),
    Rule("uses-agree", _uses_agree),
    Rule("lint", _lints),
)
"""The rules that every graph of moeify obeys, nested graphs included."""


def find_problems(
    gm: GraphModule, ctx: PlanContext, rules: Sequence[Rule] = DEFAULT_RULES
) -> list[str]:
    """Return `rule: sentence` for each problem; empty if the graph obeys all rules.

    `ctx.facts` decides which rules apply.
    """
    problems: list[str] = []
    for rule in rules:
        if rule.fact is None or rule.fact in ctx.facts:
            problems += [f"{rule.name}: {problem}" for problem in rule.check(gm, ctx)]
    return problems


def verify_graph(gm: GraphModule, ctx: PlanContext, rules: Sequence[Rule] = DEFAULT_RULES) -> None:
    """Raise if a graph breaks a rule; `ctx.facts` decides which rules apply.

    Raises:
        PassError: Lists every problem with its node.
    """
    problems = find_problems(gm, ctx, rules)
    if problems:
        noun = "rule is" if len(problems) == 1 else "rules are"
        listed = "".join(f"\n  - {problem}" for problem in problems)
        raise PassError(f"{len(problems)} {noun} broken:{listed}")
