"""Find attention in a recorded graph: values weighted by a softmax, and the projections around.

From the product of both, which `scaled_dot_product_attention` is in one node, the search goes back
to the projections that it depends on and forward to the one that reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import fx

from moeify.passes.infra.records import module_path_of
from moeify.passes.match.dataflow import Linear
from moeify.passes.match.operations import CASTS, DROPOUTS, ELEMENTWISE, VIEWS, op_name

_FUSED = "scaled_dot_product_attention"
_WHOLE = "multi_head_attention_forward"
_PRODUCTS = frozenset("matmul bmm baddbmm einsum".split())
_BETWEEN = ELEMENTWISE | CASTS | DROPOUTS | VIEWS


@dataclass(frozen=True, slots=True, eq=False)
class Attention:
    """One run of one attention layer."""

    name: str  # path of the module that runs its core, or the core's name
    ups: tuple[Linear, ...]  # the projections that it depends on, in execution order
    down: Linear | None  # the one projection that reads its result
    reason: str = ""  # why there is no such pair, or ""


def find_attention(graph: fx.Graph, linears: Sequence[Linear]) -> list[Attention]:
    """Return every run of every attention layer, in execution order."""
    by_out = {linear.out: linear for linear in linears}
    by_node = {linear.node: linear for linear in linears}
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[Attention] = []
    cores: set[fx.Node] = set()
    for node in graph.nodes:
        name = op_name(node)
        if name == _WHOLE:
            reason = "its projections and its heads are one call"
            found.append(Attention(_name(node), (), None, reason))
            continue
        core = node if name == _FUSED else _weighted(node, by_node)
        if core is None or core in cores:
            continue
        cores.add(core)
        ups = _reach(core, lambda n: n.all_input_nodes, by_out)
        downs = _reach(core, lambda n: list(n.users), by_node)
        ordered = tuple(sorted(ups, key=lambda up: order[up.node]))
        if len(downs) == 1 and ups:
            found.append(Attention(_name(node), ordered, downs[0]))
            continue
        reason = f"{len(downs)} projections read its result" if ups else "it has no projections"
        found.append(Attention(_name(node), ordered, None, reason))
    return found


def _name(node: fx.Node) -> str:
    return module_path_of(node) or node.name


def _weighted(node: fx.Node, projections: dict[fx.Node, Linear]) -> fx.Node | None:
    """Return the product of a softmax and the values, or None."""
    if op_name(node) != "softmax":
        return None
    todo, seen = list(node.users), {node}
    while todo:
        user = todo.pop()
        if user in seen or user in projections:
            continue
        seen.add(user)
        if op_name(user) in _PRODUCTS:
            return user
        if op_name(user) in _BETWEEN:
            todo += user.users
    return None


def _reach(
    start: fx.Node, step: Callable[[fx.Node], list[fx.Node]], ends: dict[fx.Node, Linear]
) -> list[Linear]:
    """Return the projections that are met first in one direction."""
    found: list[Linear] = []
    todo, seen = step(start), {start}
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in ends:
            found.append(ends[node])
        else:
            todo += step(node)
    return found
