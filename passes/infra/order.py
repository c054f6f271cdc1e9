"""Work out the order of passes from the facts they require and provide.

Passes are the nodes of a directed graph: a provider of a fact comes before everyone who requires
it. Where this leaves a choice, passes keep the order in which they were declared. Some of them may
be *fixed*: their declared order stays, and the others go between them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise

import networkx as nx

from moeify.errors import PassOrderError
from moeify.passes.infra.base import Pass

__all__ = ["order_passes"]

_Edge = tuple[str, str, str]


def order_passes(
    passes: Sequence[Pass],
    given: frozenset[str] = frozenset(),
    fixed: Collection[str] = (),
) -> list[Pass]:
    """Order passes by their facts.

    Args:
        passes: In any order; names must be unique.
        given: Facts that hold before the first pass.
        fixed: Names of passes whose order among each other stays as declared.

    Returns:
        The same passes, ordered. A pass that is not fixed stays where it was declared, unless
        what it requires is provided later, or a pass before it requires what it provides.

    Raises:
        PassOrderError: Two passes share a name, a required fact has no provider, or the facts
            (and the fixed order) ask for a cycle.
    """
    _check_names(passes)
    by_name = {p.name: p for p in passes}
    rank = {name: position for position, name in enumerate(by_name)}
    dag: nx.DiGraph[str] = nx.DiGraph()
    dag.add_nodes_from(by_name)
    for first, then, why in (*_facts(passes, given), *_chain(passes, fixed)):
        if dag.has_edge(first, then):
            dag.edges[first, then]["why"].append(why)
        else:
            dag.add_edge(first, then, why=[why])
    try:
        names = list(nx.lexicographical_topological_sort(dag, key=rank.__getitem__))
    except nx.NetworkXUnfeasible:
        raise PassOrderError(_describe_cycle(dag, rank)) from None
    return [by_name[name] for name in names]


def _check_names(passes: Sequence[Pass]) -> None:
    seen: set[str] = set()
    for p in passes:
        if p.name in seen:
            raise PassOrderError(f"two passes are named {p.name!r}; give one another name")
        seen.add(p.name)


def _facts(passes: Sequence[Pass], given: frozenset[str]) -> Iterator[_Edge]:
    """Yield `(first, then, why)` for each fact, in the order of declaration and of names."""
    for p in passes:
        for fact in sorted(p.requires):
            makers = [q.name for q in passes if q is not p and fact in q.provides]
            if not makers and fact not in given:
                raise PassOrderError(
                    f"{p.name} requires {str(fact)!r}, which no other pass here provides; add a "
                    "pass that does, or start from a graph for which it holds"
                )
            yield from ((maker, p.name, f"requires {str(fact)!r}") for maker in makers)


def _chain(passes: Sequence[Pass], fixed: Collection[str]) -> Iterator[_Edge]:
    """Yield `(first, then, why)` for neighbours in the fixed order."""
    for first, then in pairwise(p.name for p in passes if p.name in fixed):
        yield first, then, "is listed after it in the pipeline"


def _describe_cycle(dag: nx.DiGraph[str], rank: dict[str, int]) -> str:
    """Describe the cycle, from its first declared pass, with the reason for each step."""
    edges = [(edge[0], edge[1]) for edge in nx.find_cycle(dag, source=list(dag))]
    start = min(range(len(edges)), key=lambda i: rank[edges[i][0]])
    edges = edges[start:] + edges[:start]
    steps = "; ".join(
        f"{then} comes after {first} because it {' and '.join(dag.edges[first, then]['why'])}"
        for first, then in edges
    )
    loop = " -> ".join([edges[0][0], *(then for _, then in edges)])
    return f"the passes ask for a cycle: {loop} ({steps})"
