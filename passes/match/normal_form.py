"""What a small program computes, as an expression in normal form.

Two ways to write one function, `0.5 * x * (1 + erf(x / 2**0.5))` and
`x * (erf(x / 2**0.5) + 1) / 2`, become the same sum of products. The rules are those of real
numbers, so equal normal forms mean equal functions up to rounding; an operation without a rule here
makes the whole program `Unknown`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import fx, nn

from moeify.passes.match.custom_gradient import ARGUMENT, GRADIENT, is_true_gradient, traced
from moeify.passes.match.expression import Atom, Sum, Unknown, piece
from moeify.passes.match.operations import CASTS, CONSTANTS, OpaqueCall, argument, op_name

_OPTIONS: Final[Mapping[str, Sequence[tuple[str, object]]]] = {
    "gelu": (("approximate", "none"),),
    "silu": (),
    "relu": (),
    "relu6": (),
    "leaky_relu": (("negative_slope", 0.01),),
    "elu": (("alpha", 1.0),),
    "mish": (),
    "softplus": (("beta", 1.0), ("threshold", 20.0)),
    "hardswish": (),
    "sigmoid": (),
    "tanh": (),
    "erf": (),
    "exp": (),
}
"""Functions of one value, with the names and defaults of their options."""


ROUNDED: Final = 2e-7
"""Constants are compared up to the rounding of float32; exactly for a float64 model."""


def tolerance_for(dtype: torch.dtype) -> float:
    """Return by how much constants may differ, relative to them, in a model of this dtype."""
    return 1e-14 if dtype == torch.float64 else ROUNDED


def normal_form(
    graph: fx.Graph,
    hidden: Sum,
    width: int,
    dtype: torch.dtype,
    *others: Sum,
) -> Sum:
    """Return what a graph computes from `hidden`, a value of `width` columns, and from others.

    `dtype` is the hidden value's: a cast to one that holds less is no identity.

    Raises:
        Unknown: It has no normal form.
    """
    reader = _Reader(hidden, width, dtype, list(others))
    for node in graph.nodes:
        if node.op == "output":
            found = reader.env.get(node.args[0])
            if not isinstance(found, Sum):
                raise Unknown("it returns several values")
            return found
        reader.env[node] = reader.value(node)
    raise Unknown("it returns nothing")


class _Reader:
    def __init__(self, hidden: Sum, width: int, dtype: torch.dtype, others: list[Sum]) -> None:
        self.hidden, self.width, self.dtype = hidden, width, dtype
        self.inputs = [hidden, *others]
        self.env: dict[fx.Node, Any] = {}

    def value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            if not self.inputs:
                raise Unknown("it has parameters")
            return self.inputs.pop(0)
        if node.op == "call_module" and node.graph.owning_module is not None:
            return self._custom(node, node.graph.owning_module.get_submodule(str(node.target)))
        if node.op not in ("call_function", "call_method"):
            raise Unknown(f"a {node.op}")
        name = op_name(node)
        if node.target is getattr:
            return name  # `hidden.dtype`, for a cast back
        if name in CASTS:
            return self._cast(node, name)
        if name in ("getitem", "chunk", "split", "tensor_split", "glu"):
            return self._cut(node, name)
        if name in CONSTANTS or name in ("zeros_like", "ones_like", "full_like"):
            return self._filled(node, name)
        if name in _OPTIONS:
            return self._function(node, name)
        return self._arithmetic(node, name)

    def _custom(self, node: fx.Node, module: nn.Module) -> Sum:
        """Read a custom function, if its gradient is that of its forward."""
        if not isinstance(module, OpaqueCall):
            raise Unknown("a dropout")
        forward, backward = traced(module)
        itself = normal_form(forward, ARGUMENT, 1, self.dtype)
        slope = normal_form(backward, ARGUMENT, 1, self.dtype, GRADIENT)
        if not is_true_gradient(itself, slope, 4 * tolerance_for(self.dtype)):
            raise Unknown("a gradient of its own")
        return normal_form(forward, self._sum(node.args[0]), 1, self.dtype)

    def _sum(self, value: object) -> Sum:
        if isinstance(value, fx.Node):
            value = self.env[value]
        if isinstance(value, Sum):
            return value
        if isinstance(value, int | float) and math.isfinite(value):
            return Sum.number(value)
        raise Unknown(f"an operand of type {type(value).__name__}")

    def _arithmetic(self, node: fx.Node, name: str) -> Sum:
        args = list(node.args)
        known = {"alpha"} if name in ("add", "sub", "rsub") else set()
        if name in ("clamp", "clip", "clamp_min", "clamp_max"):
            return self._clamp(node, name)
        if "other" in node.kwargs:
            args.append(node.kwargs["other"])
            known = known | {"other"}
        if name == "pow" and "exponent" in node.kwargs:
            args.append(node.kwargs["exponent"])
            known = {"exponent"}
        if set(node.kwargs) - known:
            raise Unknown(f"`{name}` with options")
        scale = node.kwargs.get("alpha", 1)
        if not isinstance(scale, int | float):
            raise Unknown("a scale that is computed")
        match name, [self._sum(a) for a in args]:
            case (("add" | "radd"), [a, b]):
                return a.plus(b, scale)
            case "sub", [a, b]:
                return a.plus(b, -scale)
            case "rsub", [a, b]:
                return b.plus(a, -scale)
            case (("mul" | "rmul" | "multiply"), [a, b]):
                return a.times(b)
            case (("div" | "truediv" | "true_divide" | "divide"), [a, b]):
                return a.times(b.inverse())
            case (("rtruediv" | "rdiv"), [a, b]):
                return b.times(a.inverse())
            case (("neg" | "negative"), [a]):
                return a.times(Sum.number(-1))
            case "square", [a]:
                return a.power(2)
            case "reciprocal", [a]:
                return a.inverse()
            case "pow", [a, b] if b.constant is not None:
                return a.power(b.constant)
        raise Unknown(f"`{name}`")

    def _clamp(self, node: fx.Node, name: str) -> Sum:
        """Read a clamp whose bounds are all infinite, or one at zero from below."""
        low, high = argument(node, 1, "min"), argument(node, 2, "max")
        if name == "clamp_max":
            low, high = None, argument(node, 1, "max")
        value = self._sum(node.args[0])
        bounds = [b for b in (low, high) if b is not None]
        if not all(isinstance(b, int | float) for b in bounds):
            raise Unknown("a bound that is computed")
        if low in (None, -math.inf) and high in (None, math.inf):
            return value
        if low == 0 and high in (None, math.inf):
            return Sum.atom(Atom("clamp_min_0", (value,)))
        raise Unknown("a clamp")

    def _function(self, node: fx.Node, name: str) -> Sum:
        options = []
        for place, (option, default) in enumerate(_OPTIONS[name], start=1):
            given = argument(node, place, option)
            options.append(default if given is None else given)
        # Beyond the named options, only `inplace` may follow, which changes no value.
        extra = node.args[1 + len(options) :]
        names = {option for option, _ in _OPTIONS[name]}
        if set(node.kwargs) - names - {"inplace"} or any(not isinstance(e, bool) for e in extra):
            raise Unknown(f"`{name}` with more options")
        if any(isinstance(option, fx.Node) for option in options):
            raise Unknown(f"`{name}` with a computed option")
        return Sum.atom(Atom(name, (self._sum(node.args[0]),), tuple(options)))

    def _filled(self, node: fx.Node, name: str) -> Sum:
        if name in ("zeros", "zeros_like"):
            return Sum.number(0)
        if name in ("ones", "ones_like"):
            return Sum.number(1)
        fill = node.args[1 if name in ("full", "full_like") else 0 :][:1]
        value = fill[0] if fill else node.kwargs.get("fill_value", node.kwargs.get("data"))
        return self._sum(value)

    def _cast(self, node: fx.Node, name: str) -> Sum:
        value = self._sum(node.args[0])
        named = {
            "float": torch.float32,
            "double": torch.float64,
            "half": torch.float16,
            "bfloat16": torch.bfloat16,
        }
        target: object = named.get(name, argument(node, 1, "dtype"))
        if isinstance(target, fx.Node):
            if self.env[target] == "dtype":
                return value
        elif isinstance(target, torch.dtype) and target.is_floating_point:
            held, needed = torch.finfo(target), torch.finfo(self.dtype)
            if held.eps <= needed.eps and held.max >= needed.max:
                return value
        raise Unknown("a cast that rounds")

    def _cut(self, node: fx.Node, name: str) -> Any:
        """Read a slice, a split, or both at once, of a piece of the hidden value."""
        source = node.args[0]
        value: object = self.env[source] if isinstance(source, fx.Node) else None
        if name == "getitem" and isinstance(value, tuple):
            index = node.args[1]
            if not isinstance(index, int):
                raise Unknown("an index that is computed")
            return value[index]
        start, stop = self._columns(value)
        width = stop - start
        if name == "getitem":
            index = node.args[1]
            parts = index if isinstance(index, tuple) else ()
            last = parts[-1] if len(parts) == 2 and parts[0] is Ellipsis else None
            if not isinstance(last, slice):
                raise Unknown("an index")
            first, end, step = last.indices(width)
            if step != 1:
                raise Unknown("a slice with a step")
            return piece(start + first, start + end)
        if name == "glu":
            if width % 2 or argument(node, 1, "dim") not in (None, -1):
                raise Unknown("a glu of other halves")
            gate = Sum.atom(Atom("sigmoid", (piece(start + width // 2, stop),)))
            return piece(start, start + width // 2).times(gate)
        if argument(node, 2, "dim") not in (-1, 1):
            raise Unknown("a split of tokens")
        sizes = argument(node, 1, "chunks" if name == "chunk" else "split_size")
        if name == "tensor_split":
            sizes = argument(node, 1, "indices_or_sections")
        if name != "split" and isinstance(sizes, int):
            if sizes < 1 or width % sizes:
                raise Unknown("parts of different widths")
            sizes = width // sizes
        if isinstance(sizes, int):
            sizes = [sizes] * (width // sizes) if sizes > 0 and width % sizes == 0 else None
        if name == "tensor_split" or not isinstance(sizes, list | tuple) or sum(sizes) != width:
            raise Unknown("parts that do not add up")
        ends = [start + sum(sizes[: i + 1]) for i in range(len(sizes))]
        return tuple(piece(end - size, end) for end, size in zip(ends, sizes, strict=True))

    def _columns(self, value: object) -> tuple[int, int]:
        if value == self.hidden:
            return 0, self.width
        if isinstance(value, Sum) and len(value.terms) == 1:
            powers, factor = value.terms[0]
            if factor == 1 and len(powers) == 1 and powers[0][1] == 1:
                atom = powers[0][0]
                if atom.name == "hidden":
                    start, stop = atom.options
                    assert isinstance(start, int)
                    assert isinstance(stop, int)
                    return start, stop
        raise Unknown("a slice of a computed value")
