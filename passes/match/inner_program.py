"""What happens to the hidden value between the projections, as a small program over rows.

The recorded nodes carry the sizes of one run. Their rows are independent, so the program is
rewritten over `[rows, width]`: reshapes vanish, dimensions become the last one, an affine norm is
split in norm and per-row scale. Where its operations are one of the known forms of a canonical
activation (`known_forms`), such as a GELU written out by hand, the program is that activation.
Every other one is kept, operation by operation.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import fx, nn

from moeify import compat
from moeify.passes.match.dataflow import Linear, is_parameter, weight_of
from moeify.passes.match.elementwise import acts_elementwise
from moeify.passes.match.known_forms import recognise
from moeify.passes.match.norms import only_normalises
from moeify.passes.match.operations import (
    CASTS,
    DROPOUTS,
    IN_PLACE,
    OVER_WIDTH,
    RESHAPES,
    SPLITS,
    OpaqueCall,
    dtype_of,
    op_name,
    opaque_call,
    shape_of,
)
from moeify.units import dtype_from_name


class NotTokenwise(Exception):
    """The program cannot be written over independent rows; the message says why."""


@dataclass(frozen=True, slots=True)
class InnerProgram:
    """The hidden part of an MLP."""

    activation: str  # canonical name, or "custom"
    gated: bool  # the hidden value is `activation(gate) * linear`
    swap: bool  # the linear half comes first in the stored weights, or is projected first
    dropout: float  # probability of the one right before the last projection
    # parameters of the program (an inner norm), in the order of its arguments
    params: tuple[str, ...]
    # `module(hidden [R, sum of up widths], *params)`; None if canonical
    module: fx.GraphModule | None
    narrow: int  # also runs on a hidden value of this width (a placeholder's), or 0


Known: TypeAlias = dict[tuple[str, int, torch.dtype], tuple[str, bool, bool] | None]
"""Names of programs by what determines them: code without modules, width and dtype."""


def build_program(
    ups: Sequence[Linear],
    interior: Sequence[fx.Node],
    down: Linear,
    *,
    training: bool = False,
    known: Known | None = None,
) -> InnerProgram:
    """Rewrite the nodes between the projections over rows and name what they compute.

    `known` are the names found before in the same graph, most of whose MLPs are alike.

    Raises:
        NotTokenwise: A node mixes tokens or needs something that rows do not have.
    """
    writer = _Writer(ups, interior, down, lift_dropout=True, training=training)
    named = None
    if not writer.params:
        key = writer.module.code, writer.width, writer.dtype
        known = {} if known is None else known
        if any(True for _ in writer.root.children()):  # not operations of torch alone
            named = recognise(writer.module, writer.width, writer.dtype)
        elif key in known:
            named = known[key]
        else:
            named = known[key] = recognise(writer.module, writer.width, writer.dtype)
    narrow = _narrow_width(interior)
    if named is not None:
        activation, gated, swap = named
        return InnerProgram(activation, gated, swap, writer.dropout, (), None, narrow)
    if only_normalises(writer.module):
        raise NotTokenwise("between its projections is only a normalisation, no activation")
    if writer.dropout:  # a custom program keeps every dropout where it was
        writer = _Writer(ups, interior, down, lift_dropout=False, training=training)
    gated = len(ups) > 1
    return InnerProgram("custom", gated, False, 0.0, tuple(writer.params), writer.module, narrow)


def _out_of_place(func: Callable[..., Any], args: list[Any]) -> list[Any]:
    """Return the arguments of a call with `inplace` off, where it is given by position."""
    try:
        names = list(inspect.signature(func).parameters)
    except (TypeError, ValueError):  # written in C: it has no such argument
        return args
    place = names.index("inplace") if "inplace" in names else len(args)
    return [*args[:place], False, *args[place + 1 :]] if place < len(args) else args


def _is_cast(value: fx.Node) -> bool:
    """Tell whether a value of the program may have another dtype than the hidden value."""
    seen, todo = set(), [value]
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if op_name(node) in CASTS:
            return True
        todo += node.all_input_nodes
    return False


def _narrow_width(interior: Sequence[fx.Node]) -> int:
    """Return the smallest width on which the recorded nodes run as they are; 0 for the full one."""
    width = 1
    for node in interior:
        name = op_name(node)
        if name == "chunk":
            width = max(width, int(_option(node, 1, "chunks", 2)))
        elif name in OVER_WIDTH or name in SPLITS or name in ("prelu", "glu"):
            return 0
        elif name in ("view", "reshape", "unflatten", "flatten"):
            return 0
        elif name == "getitem" and op_name(node.args[0]) not in SPLITS:  # type: ignore[arg-type]
            return 0
        elif any(weight_of(a) is not None for a in node.all_input_nodes):
            return 0
    return width


def _option(node: fx.Node, place: int, name: str, default: Any = None) -> Any:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


class _Writer:
    """Copies the interior into a graph over rows."""

    def __init__(
        self,
        ups: Sequence[Linear],
        interior: Sequence[fx.Node],
        down: Linear,
        *,
        lift_dropout: bool,
        training: bool,
    ) -> None:
        self.training = training
        self.ups, self.interior, self.down = ups, list(interior), down
        self.graph = fx.Graph()
        self.root = nn.Module()
        self.params: list[str] = []
        self.env: dict[fx.Node, fx.Node] = {}
        self.width = sum(up.out_features for up in ups)
        self.dropout = 0.0
        self.hidden = self.graph.placeholder("hidden")
        self._slots: dict[str, fx.Node] = {}
        self._unfit = ""
        self.dtype = dtype_from_name(dtype_of(ups[0].out))
        for node in self.interior:  # parameters are arguments: they come first
            self._collect_params(node)
        self._emit_ups()
        last = self._last_dropout() if lift_dropout else None
        for node in self.interior:
            if node is last:
                self.dropout = self._probability(node)
                self.env[node] = self.env[node.all_input_nodes[0]]
            else:
                self.env[node] = self._emit(node)
        if self._unfit:
            raise NotTokenwise(self._unfit)
        self.graph.output(self.env[down.source])
        self.graph.lint()
        self.module = fx.GraphModule(self.root, self.graph, class_name="InnerProgram")

    def _emit_ups(self) -> None:
        start = 0
        for up in self.ups:
            stop = start + up.out_features
            piece = self.hidden
            if len(self.ups) > 1:
                place: Any = (Ellipsis, slice(start, stop))
                piece = self.graph.call_function(operator.getitem, (self.hidden, place))
            self.env[up.out] = piece
            start = stop

    def _last_dropout(self) -> fx.Node | None:
        """Return the plain dropout whose value goes straight into the last projection, if any."""
        node = self.down.source
        while op_name(node) in RESHAPES and node in self.interior:
            node = node.all_input_nodes[0]
        return node if op_name(node) == "dropout" and node in self.interior else None

    def _collect_params(self, node: fx.Node) -> None:
        for value in node.all_input_nodes:
            weight = weight_of(value)
            if weight is None or value in self.env or value in self.interior:
                continue
            if weight.name not in self._slots:
                plain = not (weight.stacked or weight.flipped)
                plain = plain and is_parameter(value.graph, weight)
                if not plain or weight.shape not in ((), (1,), (self.down.in_features,)):
                    self._unfit = self._unfit or (
                        f"`{op_name(node)}` between its projections reads {weight.name} of shape "
                        f"{weight.shape}: only parameters of one value, or one per hidden unit, "
                        "can be copied into experts"
                    )
                slot = self.graph.placeholder(f"param_{len(self.params)}")
                self._slots[weight.name] = slot
                self.params.append(weight.name)
            self.env[value] = self._slots[weight.name]

    def _map(self, value: Any) -> Any:
        return fx.node.map_arg(value, lambda n: self.env[n])

    def _axis(self, node: fx.Node, dim: Any) -> int:
        source = node.all_input_nodes[0]
        dims = dim if isinstance(dim, tuple | list) else (dim,)
        ndim = len(shape_of(source))
        channel = self.ups[0].channel % ndim
        if len(dims) != 1 or dims[0] is None or dims[0] % ndim != channel:
            raise NotTokenwise(f"`{op_name(node)}` over dimension {dim} mixes tokens")
        return -1

    def _emit(self, node: fx.Node) -> fx.Node:
        name = op_name(node)
        if not node.all_input_nodes:  # a constant
            return self._call(node, list(node.args), dict(node.kwargs))
        first = node.all_input_nodes[0]
        opaque = opaque_call(node)
        if opaque is not None:
            return self._opaque(node, opaque)
        if name in RESHAPES:
            channel = self.ups[0].channel
            before, after = shape_of(first), shape_of(node)
            if not before or not after or before[channel] != after[channel]:
                raise NotTokenwise(f"`{name}` {before} -> {after} reshapes the hidden width")
            return self.env[first]
        if name in CASTS:
            return self._cast(node, first)
        if name in DROPOUTS:
            return self._dropout(node)
        if name in ("layer_norm", "rms_norm"):
            return self._norm(node, name)
        if name == "prelu":
            return self._prelu(node, first)
        if name == "getitem" and op_name(first) not in SPLITS:
            index = node.args[1]
            parts = index if isinstance(index, tuple) else (index,)
            kept = [p for p in parts if isinstance(p, slice) and p != slice(None)]
            place: Any = (Ellipsis, kept[0] if kept else slice(None))
            return self.graph.call_function(operator.getitem, (self.env[first], place))
        args, kwargs = list(self._map(node.args)), dict(self._map(node.kwargs))
        kwargs.pop("inplace", None)
        if name in SPLITS | OVER_WIDTH | {"glu"}:
            self._use_last(node, name, args, kwargs)
        return self._call(node, args, kwargs)

    def _prelu(self, node: fx.Node, first: fx.Node) -> fx.Node:
        value, slope = self.env[first], self._map(_option(node, 1, "weight"))
        per_unit = shape_of(node.all_input_nodes[-1]) not in ((), (1,))
        if per_unit and self.ups[0].channel == -1 and len(shape_of(first)) != 2:
            raise NotTokenwise("`prelu` has one parameter per position, not per hidden unit")
        positive = self.graph.call_function(torch.gt, (value, 0))
        scaled = self.graph.call_function(operator.mul, (value, slope))
        return self.graph.call_function(torch.where, (positive, value, scaled))

    def _use_last(self, node: fx.Node, name: str, args: list[Any], kwargs: dict[str, Any]) -> None:
        second = ("chunk", "split", "split_with_sizes", "tensor_split", "norm", "vector_norm")
        place = 2 if name in second else 1
        default = -1 if name == "glu" else (0 if name in SPLITS else None)
        key = "axis" if "axis" in kwargs else "dim"
        dim = args[place] if len(args) > place else kwargs.get(key, default)
        self._axis(node, dim)
        if name in OVER_WIDTH - {"softmax"}:
            keep = kwargs.get("keepdim", args[place + 1] if len(args) > place + 1 else False)
            if keep is not True:
                raise NotTokenwise(f"`{name}` without keepdim drops the hidden width")
        if len(args) > place:
            args[place] = -1
        else:
            kwargs.pop(key, None)
            kwargs["dim"] = -1

    def _opaque(self, node: fx.Node, module: OpaqueCall) -> fx.Node:
        if module.unfit:
            raise NotTokenwise(
                f"`{op_name(node)}` takes {module.unfit}, which may change after the conversion: "
                "pass it numbers"
            )
        if not acts_elementwise(module):
            raise NotTokenwise(f"`{op_name(node)}` is not elementwise")
        name = f"custom_{len(list(self.root.children()))}"
        self.root.add_module(name, module)
        return self.graph.call_module(name, (self.env[node.all_input_nodes[0]],))

    def _call(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        if node.op == "call_method":
            target = str(node.target)
            if target in IN_PLACE:
                target = "__" + target[3:]
            elif target.endswith("_") and not target.endswith("__"):
                target = target[:-1]
            return self.graph.call_method(target, tuple(args), kwargs)
        func: Callable[..., Any] = node.target  # type: ignore[assignment]
        space, plain = compat.base_name(func)
        if not space:
            args = _out_of_place(func, args)
        if plain.endswith("_") and not plain.endswith("__"):
            if space:
                func = getattr(getattr(torch.ops, space), plain[:-1])
            else:
                func = getattr(torch, plain[:-1], None) or getattr(F, plain[:-1])
        return self.graph.call_function(func, tuple(args), kwargs)

    def _cast(self, node: fx.Node, first: fx.Node) -> fx.Node:
        """Keep a cast, also one that changed nothing when recorded: the model may be cast later.

        One to the hidden value's dtype is written so, unless the method names its dtype.
        """
        value, dtype = self.env[first], dtype_from_name(dtype_of(node))
        if op_name(node) in ("float", "double", "half", "bfloat16"):
            return self.graph.call_method("to", (value, dtype))
        if dtype != self.dtype:
            return self.graph.call_method("to", (value, dtype))
        if dtype_of(first) == dtype_of(node) and not _is_cast(value):
            return value
        own = self.graph.call_function(getattr, (self.hidden, "dtype"))
        return self.graph.call_method("to", (value, own))

    def _dropout(self, node: fx.Node) -> fx.Node:
        p = self._probability(node)
        value = self.env[node.all_input_nodes[0]]
        if p == 0.0:
            return value
        kinds: dict[str, type[nn.Module]] = {
            "dropout": nn.Dropout,
            "alpha_dropout": nn.AlphaDropout,
        }
        if op_name(node) not in kinds:
            raise NotTokenwise(f"`{op_name(node)}` drops whole channels of a sample")
        kind: Any = kinds[op_name(node)]
        name = f"dropout_{len(list(self.root.children()))}"
        self.root.add_module(name, kind(p))
        return self.graph.call_module(name, (value,))

    def _probability(self, node: fx.Node) -> float:
        """Return the probability that a dropout has in training."""
        p = float(_option(node, 1, "p", 0.5))
        active = bool(_option(node, 2, "train" if "train" in node.kwargs else "training", True))
        if active and not self.training and p:
            raise NotTokenwise(f"`{op_name(node)}` between its projections is on in evaluation too")
        return p if active or not self.training else 0.0

    def _norm(self, node: fx.Node, name: str) -> fx.Node:
        first = node.all_input_nodes[0]
        shape = tuple(_option(node, 1, "normalized_shape"))
        if self.ups[0].channel != -1 or shape != shape_of(first)[-1:]:
            raise NotTokenwise(f"`{name}` over {shape} mixes tokens")
        value = self.env[first]
        weight = self._map(_option(node, 2, "weight"))
        if name == "layer_norm":
            bias, eps = self._map(_option(node, 3, "bias")), _option(node, 4, "eps", 1e-5)
            out = self.graph.call_function(F.layer_norm, (value, shape, None, None, eps))
        else:
            bias, eps = None, _option(node, 3, "eps")
            out = self.graph.call_function(F.rms_norm, (value, shape, None, eps))
        if weight is not None:
            out = self.graph.call_function(operator.mul, (out, weight))
        if bias is not None:
            out = self.graph.call_function(operator.add, (out, bias))
        return out
