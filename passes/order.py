"""Work out the order of passes from the facts they require, provide and invalidate.

Passes are the nodes of a directed graph. A provider of a fact comes before everyone who requires
it; everyone who requires or provides a fact comes before the pass that invalidates it. Where this
leaves a choice, passes keep the order in which they were declared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import networkx as nx

from moeify.errors import PassOrderError
from moeify.passes.base import Pass


def order_passes(passes: Sequence[Pass], given: frozenset[str] = frozenset()) -> list[Pass]:
    """Order passes by their facts.

    Args:
        passes: In any order; names must be unique.
        given: Facts that hold before the first pass.

    Returns:
        The same passes, ordered.

    Raises:
        PassOrderError: Two passes share a name, a pass breaks the fact it provides, a required
            fact has no provider, or the facts ask for a cycle.
    """
    _check_declarations(passes)
    by_name = {p.name: p for p in passes}
    rank = {name: position for position, name in enumerate(by_name)}
    dag: nx.DiGraph[str] = nx.DiGraph()
    dag.add_nodes_from(by_name)
    for first, then, why in _edges(passes, given):
        if dag.has_edge(first, then):
            dag.edges[first, then]["why"].append(why)
        else:
            dag.add_edge(first, then, why=[why])
    try:
        names = list(nx.lexicographical_topological_sort(dag, key=rank.__getitem__))
    except nx.NetworkXUnfeasible:
        raise PassOrderError(_describe_cycle(dag, rank)) from None
    return [by_name[name] for name in names]


def _check_declarations(passes: Sequence[Pass]) -> None:
    seen: set[str] = set()
    for p in passes:
        if p.name in seen:
            raise PassOrderError(f"two passes are named {p.name!r}; give one another name")
        seen.add(p.name)
        for fact in sorted(p.provides & p.invalidates):
            raise PassOrderError(
                f"{p.name} both provides and invalidates {str(fact)!r}; name the new state by "
                "a fact of its own"
            )


def _edges(passes: Sequence[Pass], given: frozenset[str]) -> Iterator[tuple[str, str, str]]:
    """Yield `(first, then, why)`, in the order of declaration and of the facts' names."""
    for p in passes:
        for fact in sorted(p.requires):
            makers = [q.name for q in passes if q is not p and fact in q.provides]
            if not makers and fact not in given:
                raise PassOrderError(
                    f"{p.name} requires {str(fact)!r}, which no other pass here provides; add a "
                    "pass that does, or start from a graph for which it holds"
                )
            yield from ((maker, p.name, f"requires {str(fact)!r}") for maker in makers)
        for fact in sorted(p.invalidates):
            for q in passes:
                if q is not p and fact in q.requires | q.provides:
                    yield q.name, p.name, f"invalidates {str(fact)!r}"


def _describe_cycle(dag: nx.DiGraph[str], rank: dict[str, int]) -> str:
    """Say the cycle, from its first declared pass, with the facts that ask for each step."""
    edges = [(edge[0], edge[1]) for edge in nx.find_cycle(dag, source=list(dag))]
    start = min(range(len(edges)), key=lambda i: rank[edges[i][0]])
    edges = edges[start:] + edges[:start]
    steps = "; ".join(
        f"{then} comes after {first} because it {' and '.join(dag.edges[first, then]['why'])}"
        for first, then in edges
    )
    loop = " -> ".join([edges[0][0], *(then for _, then in edges)])
    return f"the passes ask for a cycle: {loop} ({steps})"
