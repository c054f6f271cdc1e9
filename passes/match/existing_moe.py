"""Telling the experts of a Mixture-of-Experts block that is already there from ordinary MLPs.

Two traces: weights of all experts stacked in one parameter, and rows that a router chose. The MLP
that reads the same tokens beside them is the block's shared expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import networkx as nx
from torch import fx

from moeify.passes.match.dataflow import Linear
from moeify.passes.match.operations import CASTS, RESHAPES, VIEWS, op_name, shape_of, strip

_STACKED = frozenset("grouped_mm bmm baddbmm matmul einsum".split())
_SPREADS = RESHAPES | VIEWS | frozenset("repeat repeat_interleave mul broadcast_to".split())
_CHOICES = frozenset("index_select gather masked_select take_along_dim getitem".split())


class ExistingMoe:
    """What a graph says about MoE blocks that are already in it.

    Rows chosen by a mask of the inputs, as where padding is removed, are tokens like others: what
    counts is that a projection made the choice, or that several MLPs share the tokens. `sources`
    are (input, weights) of each MLP found.
    """

    def __init__(
        self,
        flow: nx.DiGraph[fx.Node],
        linears: Sequence[Linear],
        sources: Iterable[tuple[fx.Node, tuple[str, ...]]],
    ) -> None:
        self.flow, self.linears = flow, linears
        self.choosers: dict[fx.Node, set[tuple[str, ...]]] = {}
        self.tokens: set[fx.Node] = set()
        for linear in linears:
            if linear.weight.stacked:
                self.tokens |= _row_sources(linear.source)
        for node in flow.nodes:
            if op_name(node) in _STACKED and any(map(_is_stacked, node.all_input_nodes)):
                for value in node.all_input_nodes:
                    self.tokens |= _row_sources(value)
        chosen = [(source, key) for source, key in sources if _is_choice(source)]
        for source, key in chosen:
            self.choosers.setdefault(_before_choice(source), set()).add(key)
        self.routed = {source for source, _ in chosen if self._is_routed(source)}
        self.tokens |= {_before_choice(source) for source in self.routed}

    def reason(self, source: fx.Node) -> str:
        """Return why an MLP with this input belongs to a block that is already there, or ""."""
        if source in self.routed:
            return "its input is a choice of tokens, as in an existing MoE block"
        if source in self.tokens:
            return "it is the shared expert of an existing MoE block"
        return ""

    def _is_routed(self, source: fx.Node) -> bool:
        if len(self.choosers[_before_choice(source)]) > 1:
            return True
        data, *index = strip(source).all_input_nodes
        known = nx.ancestors(self.flow, data) | {data}
        chosen = set().union(*(nx.ancestors(self.flow, node) | {node} for node in index))
        return any(linear.node in chosen - known for linear in self.linears)


def _is_choice(node: fx.Node) -> bool:
    """Tell whether a value is a selection of rows by a tensor of indices."""
    node = strip(node)
    return op_name(node) in _CHOICES and len(node.all_input_nodes) > 1


def _before_choice(node: fx.Node) -> fx.Node:
    node = strip(node)
    while _is_choice(node):
        node = strip(node.all_input_nodes[0])
    return node


def _is_stacked(node: fx.Node) -> bool:
    """Tell whether a value is a view of a three-dimensional parameter: all experts' weights."""
    while node.op != "get_attr":
        if op_name(node) not in VIEWS | CASTS:
            return False
        node = node.all_input_nodes[0]
    return len(shape_of(node)) == 3


def _row_sources(node: fx.Node) -> set[fx.Node]:
    """Return the values that the rows of an expert come from: chosen, repeated or scaled."""
    found: set[fx.Node] = set()
    while True:
        node = strip(node)
        found.add(node)
        inputs = node.all_input_nodes
        scaled_by_norm = any(value.op == "get_attr" for value in inputs)
        if not inputs or scaled_by_norm or not (_is_choice(node) or op_name(node) in _SPREADS):
            return found
        node = inputs[0]
