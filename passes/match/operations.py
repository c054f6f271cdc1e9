"""Reading single nodes of a recorded graph: which operation, what shape, what kind.

Everything here is decided by operations and shapes, never by names of modules.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import networkx as nx
from torch import Tensor, fx, nn

from moeify import compat
from moeify.capture.torch_calls import FunctionCall
from moeify.passes.infra.records import record_of

RESHAPES = frozenset(
    "view reshape contiguous flatten unflatten clone squeeze unsqueeze alias unsafe_view "
    "view_as reshape_as positive".split()
)
CASTS = frozenset("to type float half bfloat16 double type_as to_copy".split())
DROPOUTS = frozenset("dropout alpha_dropout feature_alpha_dropout".split())
NONLINEAR = frozenset(
    "gelu silu relu relu6 tanh sigmoid elu selu celu mish softplus softsign hardtanh hardswish "
    "hardsigmoid leaky_relu rrelu logsigmoid erf exp square pow abs clamp clamp_min clamp_max "
    "clip threshold softmax log1p log sqrt rsqrt sin cos prelu glu maximum minimum tanhshrink "
    "softshrink hardshrink expm1 erfc gt ge lt le eq ne sign sgn heaviside log2 exp2 log10 sinh "
    "cosh asinh atan arctan reciprocal masked_fill threshold logaddexp".split()
)
ACTIVATING = NONLINEAR - frozenset(
    "square pow abs sqrt rsqrt reciprocal clamp clamp_min clamp_max clip maximum minimum".split()
)
"""Operations that a hand-written norm does not use."""

LINEAR_MAPS = frozenset(
    "add sub mul div truediv rmul radd rsub rtruediv neg where lerp addcmul ones_like zeros_like "
    "full_like true_divide rdiv rpow to logical_and logical_or logical_not addcdiv and or invert "
    "ceil floor round nan_to_num".split()
)
OVER_WIDTH = frozenset("layer_norm rms_norm mean sum var std softmax norm vector_norm amax".split())
"""Operations that are allowed where they reduce over the hidden width alone."""

GATES = frozenset("sigmoid hardsigmoid".split())
CONSTANTS = frozenset("tensor full ones zeros scalar_tensor".split())
SPLITS = frozenset("chunk split split_with_sizes tensor_split unbind".split())
ELEMENTWISE = NONLINEAR | LINEAR_MAPS
TRANSPOSES = frozenset("t T mT H transpose swapaxes permute movedim".split())
IN_PLACE = frozenset(
    f"__i{name}__"
    for name in "add sub mul div truediv floordiv mod pow matmul and or xor lshift rshift".split()
)
"""The methods behind `+=` and the like; `__invert__` is none."""

PLAIN_VIEWS = frozenset("detach contiguous clone alias data".split())


def op_name(node: fx.Node) -> str:
    """Return the plain name of a node's operation: `relu` for `relu_`, `add` for `__iadd__`.

    What is not an operation of torch keeps its full name, so that it is never mistaken for one.
    """
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1])
        if isinstance(node.target, FunctionCall):
            return f"{node.target.function.__name__}.apply"
        space, name = compat.base_name(node.target)
        if space not in ("", "aten", "prims"):
            return f"{space}::{name}"
        module = getattr(node.target, "__module__", None) or "torch"
        if module.partition(".")[0] not in ("torch", "_operator", "builtins"):
            return f"{module}.{name}"
    else:
        return node.op
    if name in IN_PLACE:
        return name[3:-2]
    return name.strip("_").removeprefix("linalg_")


def opaque_call(node: fx.Node) -> OpaqueCall | None:
    """Return a module that runs what only its author knows: a custom function or operator.

    None where the node is an operation of torch, or takes several tensors.
    """
    if node.op != "call_function" or node.kwargs or len(node.args) < 1:
        return None
    first, *rest = node.args
    tensors = [source for source in node.all_input_nodes if not _is_object(source)]
    if tensors != [first]:
        return None
    target: Any = node.target
    if isinstance(target, FunctionCall):
        return OpaqueCall(target.function, "apply", tuple(rest))
    if compat.base_name(target)[0] not in ("", "aten", "prims"):
        return OpaqueCall(target, "", tuple(rest))
    return None


class OpaqueCall(nn.Module):
    """Call a custom `autograd.Function` or operator on one tensor."""

    def __init__(self, owner: Any, method: str, rest: tuple[Any, ...]) -> None:
        super().__init__()
        # The function's class, or the operator; what to call on it, or ""; no tensor in the rest.
        self.owner, self.method, self.rest = owner, method, rest

    @property
    def unfit(self) -> str:
        """Say which argument is an object, whose state may change later; "" if none is."""
        held: list[fx.Node] = []
        fx.node.map_arg(self.rest, held.append)
        if not held:
            return ""
        value = getattr(held[0].graph.owning_module, str(held[0].target), None)
        return f"an argument of type {type(value).__name__}"

    def forward(self, value: Tensor) -> Tensor:
        call = getattr(self.owner, self.method) if self.method else self.owner
        result: Tensor = call(value, *self.rest)
        return result

    def extra_repr(self) -> str:
        name = getattr(self.owner, "__name__", str(self.owner))
        return ", ".join([name, *map(repr, self.rest)])


def _is_object(node: fx.Node) -> bool:
    """Tell whether a node is an argument that is no tensor and has no literal form."""
    record = record_of(node)
    return node.op == "get_attr" and record is not None and not record.params


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of the (first) tensor that a node returned."""
    record = record_of(node)
    return record.shapes[0] if record and record.shapes else ()


def dtype_of(node: fx.Node) -> str:
    """Return the dtype's name of the (first) tensor that a node returned."""
    record = record_of(node)
    return record.dtypes[0] if record and record.dtypes else ""


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
        inputs = node.all_input_nodes
        if not inputs or node.op not in ("call_method", "call_function"):
            return node
        same_width = _same_width(shape_of(inputs[0]), shape_of(node))
        same_dtype = dtype_of(inputs[0]) == dtype_of(node)
        if (name in RESHAPES and same_width) or (name in CASTS and same_dtype):
            node = inputs[0]
        else:
            return node


def _same_width(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Tell whether a reshape keeps the last dimension, or those of a channels-first tensor."""
    return before[-1:] == after[-1:] or (len(before) > 2 and before[:2] == after[:2])


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


VIEWS = RESHAPES | TRANSPOSES | SPLITS | {"getitem", "detach", "expand", "narrow", "select", "data"}


def changed_views(node: fx.Node) -> Iterator[fx.Node]:
    """Yield nodes that write through a view of `node`'s value, which the graph cannot show."""
    todo = [user for user in node.users if op_name(user) in VIEWS]
    seen: set[fx.Node] = set()
    while todo:
        view = todo.pop()
        if view in seen:
            continue
        seen.add(view)
        for user in view.users:
            if writes(user, view):
                yield user
            elif op_name(user) in VIEWS:
                todo.append(user)


def writes(node: fx.Node, value: fx.Node) -> bool:
    """Tell whether `node` writes to the memory of `value`."""
    record = record_of(node)
    if record is None or not record.mutates:
        return False
    return (bool(node.args) and node.args[0] is value) or node.kwargs.get("out") is value


def written_after(value: fx.Node) -> Iterator[fx.Node]:
    """Yield nodes that write to `value`, to what it is a view of, or to other views of that."""
    root = value
    while op_name(root) in VIEWS and root.all_input_nodes:
        root = root.all_input_nodes[0]
    yield from (user for user in root.users if writes(user, root))
    yield from changed_views(root)


def argument(node: fx.Node, place: int, name: str) -> object:
    """Return an argument given by position or by name, or None."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name)
