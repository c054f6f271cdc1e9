"""Reading a recorded graph: which nodes are projections, which only reshape, which are elementwise.

Everything here is decided by operations, shapes and parameters; no module or model is ever named.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import networkx as nx
from torch import fx

from moeify.passes.records import record_of

RESHAPES = frozenset("view reshape contiguous flatten unflatten clone squeeze unsqueeze alias".split())
CASTS = frozenset("to type float half bfloat16 double type_as".split())
DROPOUTS = frozenset("dropout alpha_dropout feature_alpha_dropout".split())
NONLINEAR = frozenset(
    "gelu silu relu relu6 tanh sigmoid elu selu celu mish softplus softsign hardtanh hardswish "
    "hardsigmoid leaky_relu rrelu logsigmoid erf exp square pow abs clamp clamp_min clamp_max clip "
    "threshold softmax log1p log sqrt rsqrt sin cos prelu glu maximum minimum tanhshrink "
    "softshrink hardshrink expm1 erfc".split()
)
LINEAR_MAPS = frozenset(
    "add sub mul div truediv rmul radd rsub rtruediv neg where lerp addcmul ones_like zeros_like "
    "full_like true_divide rdiv rpow positive to".split()
)
OVER_WIDTH = frozenset("layer_norm rms_norm mean sum var std softmax norm vector_norm amax".split())
"""Operations that are allowed where they reduce over the hidden width alone."""

SPLITS = frozenset("chunk split split_with_sizes tensor_split unbind".split())
ELEMENTWISE = NONLINEAR | LINEAR_MAPS
_TRANSPOSES = frozenset("t T mT H transpose swapaxes permute movedim".split())
_PLAIN_VIEWS = frozenset("detach contiguous clone alias data".split())


def op_name(node: fx.Node) -> str:
    """Return the plain name of a node's operation: `relu` for `relu_`, `add` for `__iadd__`."""
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        name = getattr(node.target, "__name__", str(node.target))
    else:
        return node.op
    if name.startswith("__i") and name.endswith("__") and name[3:-2] in LINEAR_MAPS | {"pow"}:
        return name[3:-2]
    return name.strip("_")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the (first) tensor that a node returned."""
    record = record_of(node)
    return record.shapes[0] if record and record.shapes else ()


def dtype_of(node: fx.Node) -> str:
    """Return the dtype's name of the (first) tensor that a node returned."""
    record = record_of(node)
    return record.dtypes[0] if record and record.dtypes else ""


def tensor_args(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node reads, each once, in argument order."""
    return list(node.all_input_nodes)


def dataflow(graph: fx.Graph) -> nx.DiGraph[fx.Node]:
    """Return the graph as a networkx DiGraph: an edge from each value to each of its readers."""
    flow: nx.DiGraph[fx.Node] = nx.DiGraph()
    flow.add_nodes_from(graph.nodes)
    flow.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return flow


def strip(node: fx.Node) -> fx.Node:
    """Go back through reshapes and casts that change nothing: same elements, same width."""
    while True:
        name = op_name(node)
        inputs = tensor_args(node)
        if not inputs or node.op not in ("call_method", "call_function"):
            return node
        if name in RESHAPES or (name in CASTS and dtype_of(inputs[0]) == dtype_of(node)):
            node = inputs[0]
        else:
            return node


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter behind a view chain.

    Attributes:
        name: The parameter.
        shape: Its stored shape.
        flipped: The view is its transpose.
        stacked: The view is one slice of it (an expert's weight).
    """

    name: str
    shape: tuple[int, ...]
    flipped: bool = False
    stacked: bool = False


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
        name, inputs = op_name(node), tensor_args(node)
        if not inputs:
            return None
        source = inputs[0]
        if name in _TRANSPOSES and len(shape_of(source)) == 2:
            flipped = not flipped
        elif name in _TRANSPOSES and len(shape_of(source)) == 3:
            flipped = not flipped
        elif name in ("getitem", "select", "unbind", "index_select") and (
            stacked or len(shape_of(source)) == 3 or shape_of(node) == ()
        ):
            stacked = True
        elif name in _PLAIN_VIEWS or (name in CASTS and dtype_of(source) == dtype_of(node)):
            pass
        else:
            return None
        node = source
    return None


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """A projection as found in the graph.

    Attributes:
        node: The node that multiplies.
        out: The node that holds the result, after a bias that is added separately.
        source: The node that is projected.
        weight: The weight's parameter.
        bias: The bias's parameter, or None.
        transposed: True if the weight is stored `[in, out]`.
        channel: The dimension that is projected: -1, or 1 for a convolution.
        problem: Why it is no projection of tokens ("kernel 3 mixes neighbours"), or "".
    """

    node: fx.Node
    out: fx.Node
    source: fx.Node
    weight: Weight
    bias: Weight | None
    transposed: bool
    channel: int
    problem: str

    @property
    def in_features(self) -> int:
        """Input width."""
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """Output width."""
        return self.weight.shape[1 if self.transposed else 0]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes that make it up."""
        return (self.node,) if self.out is self.node else (self.node, self.out)


def _argument(node: fx.Node, place: int, name: str) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)


def linear_of(node: fx.Node) -> Linear | None:
    """Read a node as a projection by a parameter, or return None."""
    name = op_name(node)
    bias: Weight | None = None
    channel, problem = -1, ""
    if name == "linear":
        source, weight = _argument(node, 0, "input"), weight_of(_argument(node, 1, "weight"))
        bias_node = _argument(node, 2, "bias")
        stored_in_out = False
    elif name == "addmm":
        source, weight = _argument(node, 1, "mat1"), weight_of(_argument(node, 2, "mat2"))
        bias_node, stored_in_out = _argument(node, 0, "input"), True
        if node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1:
            problem = "addmm scales its terms"
    elif name in ("matmul", "mm"):
        source, weight = _argument(node, 0, "input"), weight_of(_argument(node, 1, "mat2"))
        if weight is None:
            weight = weight_of(node.kwargs.get("other"))
        bias_node, stored_in_out = None, True
    elif name in ("conv1d", "conv2d", "conv3d"):
        source, weight = _argument(node, 0, "input"), weight_of(_argument(node, 1, "weight"))
        bias_node, stored_in_out, channel = _argument(node, 2, "bias"), False, 1
        problem = _conv_problem(node, weight)
    else:
        return None
    if weight is None or not isinstance(source, fx.Node):
        return None
    if weight.stacked:
        problem = "its weight is one slice of a stacked parameter, as in an existing MoE block"
    elif channel == -1 and len(weight.shape) != 2:
        return None
    if isinstance(bias_node, fx.Node):
        bias = weight_of(bias_node)
        if bias is None:
            problem = problem or "its bias is computed, not a parameter"
    out = node
    transposed = stored_in_out != weight.flipped
    if not problem and bias is None and len(node.users) == 1:
        out, bias = _added_bias(node, weight.shape[1 if transposed else 0])
    return Linear(node, out, source, weight, bias, transposed, channel, problem)


def _conv_problem(node: fx.Node, weight: Weight | None) -> str:
    if weight is None:
        return ""
    if any(size != 1 for size in weight.shape[2:]):
        return f"a convolution of kernel {weight.shape[2:]} mixes neighbouring positions"
    groups = _argument(node, 6, "groups") or 1
    if groups != 1:
        return f"a convolution with {groups} groups is no full projection"
    for place, name, plain in ((3, "stride", 1), (4, "padding", 0)):
        value = _argument(node, place, name)
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


def is_slice_of_width(node: fx.Node, channel: int) -> bool:
    """Tell whether a `getitem` node slices the hidden width and nothing else."""
    if node.target is not operator.getitem:
        return False
    source, index = node.args[0], node.args[1]
    if not isinstance(source, fx.Node):
        return False
    if op_name(source) in SPLITS:
        return isinstance(index, int)
    ndim = len(shape_of(source))
    parts = index if isinstance(index, tuple) else (index,)
    if any(p is None or not isinstance(p, slice | type(Ellipsis)) for p in parts):
        return False
    if Ellipsis in parts:
        gap = ndim - (len(parts) - 1)
        at = parts.index(Ellipsis)
        parts = (*parts[:at], *([slice(None)] * gap), *parts[at + 1 :])
    at = channel % ndim
    return all(p == slice(None) for i, p in enumerate(parts) if i != at)


def changed_views(node: fx.Node) -> Iterator[fx.Node]:
    """Yield nodes that write through a view of `node`'s value, which the graph cannot show."""
    todo = [u for u in node.users if op_name(u) in RESHAPES | _TRANSPOSES | {"getitem"} | SPLITS]
    while todo:
        view = todo.pop()
        for user in view.users:
            record = record_of(user)
            if record and record.mutates and user.args and user.args[0] is view:
                yield user
            elif op_name(user) in RESHAPES | _TRANSPOSES | {"getitem"} | SPLITS:
                todo.append(user)


__all__ = [
    "CASTS",
    "DROPOUTS",
    "ELEMENTWISE",
    "NONLINEAR",
    "OVER_WIDTH",
    "RESHAPES",
    "SPLITS",
    "Linear",
    "Weight",
    "changed_views",
    "dataflow",
    "dtype_of",
    "is_slice_of_width",
    "linear_of",
    "linears_of",
    "op_name",
    "shape_of",
    "strip",
    "tensor_args",
    "weight_of",
]
