"""Reading a recorded graph: which nodes are projections by a parameter.

Everything here is decided by operations, shapes and parameters, never by names of modules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx, nn

from moeify.passes.infra.records import record_of
from moeify.passes.match.operations import (
    CASTS,
    PLAIN_VIEWS,
    TRANSPOSES,
    VIEWS,
    argument,
    dtype_of,
    op_name,
    shape_of,
)


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter, possibly seen through a chain of views."""

    name: str
    shape: tuple[int, ...]  # as stored
    flipped: bool = False  # the view is its transpose
    stacked: bool = False  # the view is one slice of it: one expert's weight

    @property
    def module(self) -> str:
        """The path of the module that holds it; "" for the model itself."""
        return self.name.rpartition(".")[0]


def weight_of(node: object) -> Weight | None:
    """Return the parameter that a node is a view of, or None."""
    flipped = stacked = False
    while isinstance(node, fx.Node):
        if node.op == "get_attr":
            record = record_of(node)
            if record is None or not record.params:
                return None
            ref = record.params[0]
            return Weight(ref.name, ref.shape, flipped, stacked)
        name, inputs = op_name(node), node.all_input_nodes
        if not inputs:
            return None
        source = inputs[0]
        if name in TRANSPOSES and len(shape_of(source)) in (2, 3):
            flipped = not flipped
        elif name in ("getitem", "select", "unbind", "index_select") and (
            stacked or len(shape_of(source)) == 3 or shape_of(node) == ()
        ):
            stacked = True
        elif name in PLAIN_VIEWS or (name in CASTS and dtype_of(source) == dtype_of(node)):
            pass
        else:
            return None
        node = source
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A projection as found in the graph."""

    node: fx.Node  # the one that multiplies
    out: fx.Node  # holds the result, after a bias that is added separately
    source: fx.Node  # what is projected
    weight: Weight
    bias: Weight | None
    transposed: bool  # the weight is stored [in, out]
    channel: int  # the dimension that is projected: -1, or 1 for a convolution
    problem: str  # why it is not a projection of tokens, or ""

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return (self.node,) if self.out is self.node else (self.node, self.out)


def linear_of(node: fx.Node) -> Linear | None:
    """Read a node as a projection by a parameter, or return None."""
    operands = _operands(node)
    if operands is None:
        return None
    source, weight_node, bias_node, stored_in_out, problem = operands
    weight = weight_of(weight_node)
    if weight is None and isinstance(weight_node, fx.Node):
        weight = _computed(weight_node)
        if weight is not None:
            record = record_of(weight_node)
            how = "changed in place by the forward"
            if record is None or not record.mutates:
                how = f"computed from {weight.name}: {_MERGE}"
            problem = f"its weight is {how}"
    if weight is None or not isinstance(source, fx.Node):
        return None
    channel = 1 if op_name(node) in _CONVOLUTIONS else -1
    if channel == 1:
        problem = problem or _conv_problem(node, weight)
    if weight.stacked:
        problem = f"its weight is one slice of {weight.name}, as in an existing MoE block"
    elif channel == -1 and len(weight.shape) != 2:
        return None
    problem = problem or _buffer_problem(node.graph, weight)
    bias: Weight | None = None
    if isinstance(bias_node, fx.Node):
        bias = weight_of(bias_node)
        if bias is None:
            problem = problem or "its bias is computed, not a parameter"
        else:
            problem = problem or _buffer_problem(node.graph, bias)
    out = node
    transposed = stored_in_out != weight.flipped
    if not problem and bias is None and len(node.users) == 1:
        out, bias = _added_bias(node, weight.shape[1 if transposed else 0])
    return Linear(node, out, source, weight, bias, transposed, channel, problem)


_CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
_MERGE = "remove the parametrization, or merge the adapter, first"

Operands = tuple[object, object, object, bool, str]


def _operands(node: fx.Node) -> Operands | None:
    """Return (source, weight, bias, weight stored as [in, out], problem) of a product."""
    name = op_name(node)
    if name == "linear" or name in _CONVOLUTIONS:
        source, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        return source, weight, argument(node, 2, "bias"), False, ""
    if name == "addmm":
        scaled = node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1
        problem = "addmm scales its terms" if scaled else ""
        source, weight = argument(node, 1, "mat1"), argument(node, 2, "mat2")
        return source, weight, argument(node, 0, "input"), True, problem
    if name in ("matmul", "mm"):
        weight = argument(node, 1, "mat2")
        weight = node.kwargs.get("other") if weight is None else weight
        return argument(node, 0, "input"), weight, None, True, ""
    if name == "einsum":
        return _einsum(node)
    return None


def _einsum(node: fx.Node) -> Operands | None:
    """Read `einsum("...d,fd->...f", x, weight)`, in either order of the operands."""
    equation, operands = node.args[0], list(node.args[1:])
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or len(operands) != 2:
        return None
    terms, _, out = equation.replace(" ", "").partition("->")
    parts = list(zip(terms.split(","), operands, strict=True))
    for (left, source), (right, weight) in (parts, parts[::-1]):
        if len(right) != 2 or not isinstance(weight, fx.Node) or _is_data(weight):
            continue
        for inner, outer in ((right[0], right[1]), (right[1], right[0])):
            if inner in left and left.replace(inner, outer) == out and outer not in left:
                problem = (
                    "" if left[-1] == inner else f"`{equation}` does not project the last dimension"
                )
                return source, weight, None, right[0] == inner, problem
    return None


def _is_data(node: fx.Node) -> bool:
    return weight_of(node) is None and _computed(node) is None


def _computed(node: fx.Node) -> Weight | None:
    """Return the largest of the parameters that a weight is computed from, and from nothing else.

    `stacked` where it is a slice of something three-dimensional, such as a view of all experts.
    """
    todo, seen, found = [node], {node}, []
    while todo:
        current = todo.pop()
        if current.op == "get_attr":
            found.append(current)
        elif current.op == "placeholder" or not current.all_input_nodes or len(seen) > 32:
            return None
        for source in current.all_input_nodes:
            if source not in seen:
                seen.add(source)
                todo.append(source)
    shape = shape_of(node)
    refs = [ref for source in found if (record := record_of(source)) for ref in record.params]
    if len(shape) < 2 or not refs or max(len(ref.shape) for ref in refs) < 2:
        return None
    sliced = all(n.op == "get_attr" or op_name(n) in VIEWS for n in seen)
    stacked = sliced and any(len(shape_of(n)) == 3 for n in seen)
    return Weight(max(refs, key=lambda ref: math.prod(ref.shape)).name, shape, False, stacked)


def is_parameter(graph: fx.Graph, weight: Weight) -> bool:
    """Tell whether a weight is a parameter, not a buffer."""
    value: object = graph.owning_module
    for part in weight.name.split("."):
        value = getattr(value, part, None)
    return value is None or isinstance(value, nn.Parameter)


def _buffer_problem(graph: fx.Graph, weight: Weight) -> str:
    return "" if is_parameter(graph, weight) else f"{weight.name} is a buffer, not a parameter"


def _conv_problem(node: fx.Node, weight: Weight) -> str:
    if any(size != 1 for size in weight.shape[2:]):
        return f"a convolution of kernel {weight.shape[2:]} mixes neighbouring positions"
    groups = argument(node, 6, "groups") or 1
    if groups != 1:
        return f"a convolution with {groups} groups is not a full projection"
    for place, name, plain in ((3, "stride", 1), (4, "padding", 0)):
        value = argument(node, place, name)
        values = value if isinstance(value, tuple | list) else (plain if value is None else value,)
        if any(v not in (plain, "valid", "same") for v in values):
            return f"a convolution with {name} {value} changes the positions"
    return ""


def _added_bias(node: fx.Node, width: int) -> tuple[fx.Node, Weight | None]:
    """Fold `x @ W + b` into one projection."""
    user = next(iter(node.users))
    if op_name(user) not in ("add", "radd") or user.kwargs:
        return node, None
    others = [a for a in user.args if a is not node]
    if len(others) != 1:
        return node, None
    bias = weight_of(others[0])
    if bias is None or bias.shape != (width,):
        return node, None
    return user, bias


def linears_of(graph: fx.Graph) -> list[Linear]:
    """Return every projection by a parameter, in execution order."""
    found = (linear_of(node) for node in graph.nodes)
    return [linear for linear in found if linear is not None]
