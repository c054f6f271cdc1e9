"""What a graph is at one moment, to compare with what it is after a pass.

A pass can change two things. The *program* is what runs: the graphs' text, and the modules that
they call with their parameters, buffers and attributes. The *notes* are what passes know: the
records of nodes and the graphs' `meta`. Analyses write notes, transformations change the program.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule, Node

from moeify.passes.infra.printer import print_graph
from moeify.passes.infra.records import NodeRecord, record_or_none
from moeify.passes.infra.report import count_nodes, count_ops

__all__ = ["Changes", "Snapshot"]


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs from a snapshot, in words; "" if nothing does."""

    program: str = ""  # includes the records of new nodes
    notes: str = ""

    def __bool__(self) -> bool:
        return bool(self.program or self.notes)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A graph, and all that it calls, at one moment."""

    ops: Counter[str]
    nodes: int
    text: str  # the graphs, without records
    state: dict[str, object]  # modules, parameters, buffers and attributes, by path
    records: dict[Node, NodeRecord | None]
    meta: dict[str, object]  # the graphs' `meta`, by path and key

    @classmethod
    def of(cls, gm: GraphModule) -> Snapshot:
        """Take a snapshot; it keeps no tensor and no module alive."""
        return cls(
            count_ops(gm),
            count_nodes(gm),
            print_graph(gm, meta=False),
            dict(_state(gm)),
            _records(gm),
            dict(_meta(gm)),
        )

    def compare(self, gm: GraphModule) -> Changes:
        """Return what differs now."""
        if print_graph(gm, meta=False) != self.text:
            program = "the graph"
        else:
            program = _first_difference(self.state, dict(_state(gm)))
        return Changes(program, self._notes(gm))

    def _notes(self, gm: GraphModule) -> str:
        now = _records(gm)
        for node, record in self.records.items():
            if node in now and now[node] != record:
                return f"the record of %{node.name}"
        return _first_difference(self.meta, dict(_meta(gm)))


@dataclass(frozen=True, slots=True, eq=False)
class _Object:
    """A module or tensor, which is not kept alive, and how often it has been written to."""

    ref: weakref.ref[Any]
    version: int = 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Object) or self.version != other.version:
            return False
        value = self.ref()
        return value is not None and value is other.ref()


@dataclass(frozen=True, slots=True, eq=False)
class _Value:
    """Anything else: compared by identity, which is safe because this keeps it alive."""

    value: object

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Value) and other.value is self.value


def _state(gm: GraphModule) -> Iterator[tuple[str, object]]:
    for path, module in gm.named_modules():
        prefix = f"{path}." if path else ""
        yield path or "the root module", _Object(weakref.ref(module))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            yield prefix + name, None if tensor is None else _tensor(tensor)
        for name, value in _attributes(module):
            yield prefix + name, value


def _tensor(tensor: Tensor) -> _Object:
    # Tensors of inference mode have no version.
    return _Object(weakref.ref(tensor), 0 if tensor.is_inference() else tensor._version)


def _attributes(module: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield what a module holds besides tensors and modules: its settings."""
    for name, value in vars(module).items():
        if name.startswith("_") or (name == "meta" and isinstance(module, GraphModule)):
            continue
        simple = isinstance(value, str | int | float | None)
        yield name, (type(value), value) if simple else _Value(value)


def _records(gm: GraphModule) -> dict[Node, NodeRecord | None]:
    graphs = [m.graph for m in gm.modules() if isinstance(m, GraphModule)]
    return {node: record_or_none(node) for graph in graphs for node in graph.nodes}


def _meta(gm: GraphModule) -> Iterator[tuple[str, object]]:
    for path, module in gm.named_modules():
        if isinstance(module, GraphModule):
            for key, value in module.meta.items():
                yield f"{path or 'the graph'}.meta[{key!r}]", _Value(value)


def _first_difference(before: dict[str, Any], after: dict[str, Any]) -> str:
    for name in (*before, *after):
        if (name in before) != (name in after) or before[name] != after[name]:
            return name
    return ""
