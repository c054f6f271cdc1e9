"""A `torch.fx.Graph` as plain data, node by node, so that it can be pickled without tracing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from moeify import compat


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to another node by its name."""

    name: str


@dataclass(frozen=True, slots=True)
class StoredNode:
    """One node."""

    op: str
    name: str
    target: Any  # a string, a function that pickles by its name, or a `StoredOp`
    args: Any  # with `Ref` for nodes
    kwargs: Any
    modules: dict[str, tuple[str, str]] | None  # the module stack: key to (path, class name)


@dataclass(frozen=True, slots=True)
class StoredOp:
    """An operator of `torch.ops`, such as ("aten", "mm", "default")."""

    namespace: str
    name: str
    overload: str

    @classmethod
    def of(cls, target: Any) -> StoredOp | None:
        """Return the stored form of an operator, or None for any other function."""
        found = compat.operator_name(target)
        return None if found is None else cls(*found)

    def operator(self) -> Any:
        """Return the operator; its library must have been imported."""
        found = getattr(getattr(torch.ops, self.namespace), self.name)
        return getattr(found, self.overload) if self.overload else found


def dump_nodes(graph: fx.Graph) -> Iterator[StoredNode]:
    """Yield the nodes of a graph as data, in order."""
    for node in graph.nodes:
        target = node.target
        if node.op == "call_function":
            target = StoredOp.of(target) or target
        args, kwargs = (fx.node.map_aggregate(part, _stored) for part in (node.args, node.kwargs))
        yield StoredNode(node.op, node.name, target, args, kwargs, _modules(node))


def load_nodes(nodes: Iterable[StoredNode]) -> fx.Graph:
    """Return the graph of the nodes that `dump_nodes` yielded, with the same names."""
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def resolved(value: Any) -> Any:
        return made[value.name] if isinstance(value, Ref) else value

    for stored in nodes:
        target = stored.target
        if isinstance(target, StoredOp):
            target = target.operator()
        args = fx.node.map_aggregate(stored.args, resolved)
        kwargs = fx.node.map_aggregate(stored.kwargs, resolved)
        node = graph.create_node(stored.op, target, args, kwargs, name=stored.name)
        if stored.modules is not None:
            node.meta["nn_module_stack"] = dict(stored.modules)
        made[stored.name] = node
    graph.lint()
    return graph


def _stored(value: Any) -> Any:
    return Ref(value.name) if isinstance(value, fx.Node) else value


def _modules(node: fx.Node) -> dict[str, tuple[str, str]] | None:
    stack = node.meta.get("nn_module_stack")
    if not isinstance(stack, dict):
        return None
    return {str(key): (str(path), str(kind)) for key, (path, kind) in stack.items()}
