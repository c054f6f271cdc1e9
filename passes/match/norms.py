"""Whether a program between two projections only normalises: each row is scaled as a whole.

Decided by operations: the hidden value is shifted and multiplied, by parameters and by numbers that
its rows are reduced to, and something divides.
"""

from __future__ import annotations

import operator
from typing import Literal

from torch import fx

from moeify.passes.match.operations import ACTIVATING, CASTS, OVER_WIDTH, op_name

_NORMS = frozenset(("layer_norm", "rms_norm"))
_DIVIDE = _NORMS | frozenset("div truediv true_divide rsqrt reciprocal pow".split())
_PRODUCTS = frozenset("mul rmul div truediv true_divide".split())
_SHIFTS = frozenset("add radd sub rsub neg".split())

Kind = Literal["scaled", "factor", "other"]


def only_normalises(module: fx.GraphModule) -> bool:
    """Tell whether a program over rows, with parameters behind them, is a norm alone."""
    kinds: dict[fx.Node, Kind] = {}
    divides = reduces = False
    for node in module.graph.nodes:
        if node.op == "output":
            value = node.args[0]
            return divides and reduces and kinds.get(value) == "scaled"
        name = op_name(node)
        if node.op == "call_module" or name in ACTIVATING:
            return False
        divides = divides or name in _DIVIDE
        reduces = reduces or name in OVER_WIDTH
        kinds[node] = _kind(node, name, kinds)
    return False


def _kind(node: fx.Node, name: str, kinds: dict[fx.Node, Kind]) -> Kind:
    if node.op == "placeholder":
        return "factor" if kinds else "scaled"
    if node.target is getattr:
        return "factor"
    given = [kinds[source] for source in node.all_input_nodes]
    if name in OVER_WIDTH - _NORMS - {"softmax"} or all(kind == "factor" for kind in given):
        return "factor"
    operands = [a for a in node.args if isinstance(a, fx.Node)]
    leading = kinds[operands[0]] if operands and operands[0] is node.args[0] else "factor"
    if "other" in given:
        return "other"
    if name in _NORMS or name in CASTS or name in _SHIFTS or node.target is operator.getitem:
        return "scaled"
    if name in _PRODUCTS and [kinds.get(a) for a in operands].count("scaled") == 1:
        return "scaled" if leading == "scaled" or name in ("mul", "rmul") else "other"
    return "other"
