"""How a slice of one dimension travels through a recorded graph.

A column-wise projection leaves each of N ranks with one of N equal, contiguous blocks of its last
dimension. An operation after it either works on such a block as it would on the whole, and its rule
returns the sliced dimension of the result; or it does not, and its rule raises the reason. Sizes
are those of the recorded, unsliced run. Nothing is decided by names of modules.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from moeify.passes.infra.records import module_path_of, record_of
from moeify.passes.match.dataflow import Linear
from moeify.passes.match.elementwise import acts_elementwise
from moeify.passes.match.operations import (
    CASTS,
    DROPOUTS,
    ELEMENTWISE,
    RESHAPES,
    SPLITS,
    TRANSPOSES,
    argument,
    op_name,
    opaque_call,
    shape_of,
)

_ELEMENTWISE = (ELEMENTWISE | DROPOUTS) - {"softmax", "prelu", "glu"}
_STRIDED = TRANSPOSES | SPLITS | {"getitem", "expand", "narrow", "select", "detach"}
_REDUCTIONS = frozenset("mean sum var std amax amin norm vector_norm".split())
_PRIMES = (10007, 20011, 30011, 40009, 50021, 60013, 70001, 80021)
"""Strides that tell dimensions apart after any view."""


class Unsliceable(Exception):
    """A sliced value meets what needs the whole one; the message says what and where."""


@dataclass(slots=True)
class Slicing:
    """What is sliced between projections."""

    dims: dict[fx.Node, int] = field(default_factory=dict)  # the sliced dimension of each value
    # whole values that are combined with sliced ones
    joined: set[fx.Node] = field(default_factory=set)


def follow(
    ups: Iterable[Linear], down: Linear, parts: int, place: Mapping[fx.Node, int]
) -> Slicing:
    """Follow the slices that the column-wise `ups` make until the row-wise `down` sums them up.

    `parts` is the number of slices, `place` the position of each node in the graph.

    Raises:
        Unsliceable: Something between needs whole values, or reads them elsewhere.
    """
    step = _Step(parts)
    todo: list[tuple[int, fx.Node]] = []
    queued: set[fx.Node] = set()

    def queue(node: fx.Node) -> None:
        for user in node.users:
            if user not in queued:
                queued.add(user)
                heapq.heappush(todo, (place[user], user))

    for up in ups:
        step.state.dims[up.out] = len(shape_of(up.out)) - 1
        queue(up.out)
    reached = False
    while todo:
        node = heapq.heappop(todo)[1]
        if node is down.node:
            if step.state.dims.get(down.source) != len(shape_of(down.source)) - 1:
                raise Unsliceable(f"{_what(node)} does not sum over what is sliced")
            reached = True
        elif (dim := step.run(node)) is not None:
            step.state.dims[node] = dim
            queue(node)
    if not reached:
        raise Unsliceable(f"{_what(down.node)} does not read what is sliced")
    return step.state


def _what(node: fx.Node) -> str:
    path = module_path_of(node)
    return f"`{op_name(node)}`{f' in {path}' if path else ''}"


class _Step:
    """Apply the rule of one node after the other."""

    def __init__(self, parts: int) -> None:
        self.parts, self.state = parts, Slicing()

    def run(self, node: fx.Node) -> int | None:
        """Return the sliced dimension of what `node` returns; None if it returns a whole value."""
        if node.op == "output":
            raise Unsliceable("a value that would be sliced is returned by the model")
        name, first = op_name(node), node.all_input_nodes[0]
        record = record_of(node)
        if record is not None and record.mutates and first not in self.state.dims:
            raise Unsliceable(f"{_what(node)} writes a slice into a whole value")
        if name in CASTS and first not in self.state.dims:
            return None  # only the dtype of the sliced value is read
        rule = self._rule(node, name)
        if rule is None:
            raise Unsliceable(f"{_what(node)} reads a value that would be sliced")
        dim = rule(node)
        sizes = record.shapes if record is not None else ()
        if any(size[dim] % self.parts for size in sizes):
            raise Unsliceable(f"{_what(node)} cuts the sliced width")
        return dim

    def _rule(self, node: fx.Node, name: str) -> Callable[[fx.Node], int] | None:
        if name in CASTS or name in RESHAPES:
            return self._reshape
        if name in _STRIDED:
            return self._view
        if name in _ELEMENTWISE:
            return self._elementwise
        custom = opaque_call(node)
        if custom is not None and acts_elementwise(custom):
            return self._elementwise
        if name in _REDUCTIONS:
            return self._reduce
        rules: dict[str, Callable[[fx.Node], int]] = {
            "softmax": self._softmax,
            "log_softmax": self._softmax,
            "layer_norm": self._norm,
            "rms_norm": self._norm,
            "cat": self._cat,
            "concat": self._cat,
            "stack": partial(self._cat, shift=True),
            "matmul": self._matmul,
            "bmm": self._matmul,
            "scaled_dot_product_attention": self._attention,
        }
        return rules.get(name)

    def _sliced(self, node: fx.Node) -> tuple[fx.Node, int]:
        """Return the first input, which must be the sliced one."""
        first = node.args[0] if node.args else node.all_input_nodes[0]
        if not isinstance(first, fx.Node) or first not in self.state.dims:
            raise Unsliceable(f"{_what(node)} joins a whole value with a sliced one")
        return first, self.state.dims[first]

    def _reshape(self, node: fx.Node) -> int:
        """Keep the order of the elements: blocks stay blocks where they start a dimension."""
        first, dim = self._sliced(node)
        before, after = shape_of(first), shape_of(node)
        outer, seen = math.prod(before[:dim]), 1
        for place, size in enumerate(after):
            if seen == outer and size > 1:
                if size % self.parts:
                    raise Unsliceable(
                        f"{_what(node)} cuts a width of {before[dim]} in {size} parts, which do "
                        f"not divide over {self.parts} tensor ranks"
                    )
                return place
            seen *= size
        raise Unsliceable(f"{_what(node)} {before} -> {after} merges the sliced dimension")

    def _view(self, node: fx.Node) -> int:
        """Run the view on a tensor whose strides say where each dimension went."""
        first, dim = self._sliced(node)
        if op_name(first) in SPLITS:
            return dim  # unpacking
        shape = shape_of(first)
        probe = torch.empty_strided(shape, _PRIMES[: len(shape)], device="meta")
        rest = (*node.args[1:], *node.kwargs.values())
        if len(shape) > len(_PRIMES) or any(isinstance(a, fx.Node) for a in _leaves(rest)):
            raise Unsliceable(f"{_what(node)} picks elements by an index that is computed")
        made = _call(node, probe)
        found = {self._place_of(part, _PRIMES[dim], shape[dim]) for part in _tensors(made)}
        place = found.pop() if len(found) == 1 else None
        if place is None:
            raise Unsliceable(f"{_what(node)} cuts the sliced width")
        return place

    def _place_of(self, view: Tensor, stride: int, size: int) -> int | None:
        places = [i for i, s in enumerate(view.stride()) if s == stride and view.shape[i] == size]
        return places[0] if len(places) == 1 else None

    def _elementwise(self, node: fx.Node) -> int:
        return self._broadcast(node, node.all_input_nodes, len(shape_of(node)))

    def _broadcast(self, node: fx.Node, operands: Iterable[fx.Node], ndim: int) -> int:
        """Align operands at their last dimension; whole ones must not have the sliced one."""
        operands = list(operands)
        missing = {n: ndim - len(shape_of(n)) for n in operands}
        dims = self.state.dims
        places = {dims[n] + missing[n] for n in operands if n in dims}
        if len(places) != 1:
            raise Unsliceable(f"{_what(node)} joins values sliced in different dimensions")
        place = places.pop()
        for operand in operands:
            if operand in dims:
                continue
            at = place - missing[operand]
            if at >= 0 and shape_of(operand)[at] != 1:
                raise Unsliceable(
                    f"{_what(node)} joins a sliced value with a whole one of "
                    f"{shape_of(operand)[at]} along it"
                )
            self.state.joined.add(operand)
        return place

    def _reduce(self, node: fx.Node) -> int:
        first, dim = self._sliced(node)
        ndim, second = len(shape_of(first)), op_name(node) in ("norm", "vector_norm")
        over: Any = node.kwargs.get("dim", argument(node, 2 if second else 1, "axis"))
        dims = over if isinstance(over, tuple | list) else (over,)
        if any(not isinstance(d, int) or isinstance(d, bool) or d % ndim == dim for d in dims):
            raise Unsliceable(f"{_what(node)} reduces over the sliced width")
        kept = len(shape_of(node)) == ndim
        return dim if kept else dim - sum(d % ndim < dim for d in dims)

    def _softmax(self, node: fx.Node) -> int:
        first, dim = self._sliced(node)
        over = argument(node, 1, "dim")
        if not isinstance(over, int) or over % len(shape_of(first)) == dim:
            raise Unsliceable(f"{_what(node)} reduces over the sliced width")
        return dim

    def _norm(self, node: fx.Node) -> int:
        first, dim = self._sliced(node)
        over = argument(node, 1, "normalized_shape")
        count = len(over) if isinstance(over, tuple | list) else 1
        if dim >= len(shape_of(first)) - count:
            raise Unsliceable(f"{_what(node)} reduces over the sliced width")
        self.state.joined |= {n for n in node.all_input_nodes if n not in self.state.dims}
        return dim

    def _cat(self, node: fx.Node, *, shift: bool = False) -> int:
        over = argument(node, 1, "dim") or 0
        values = [n for n in node.all_input_nodes if shape_of(n) != (0,)]  # an empty cache
        ndim = len(shape_of(node))
        dims = {self.state.dims.get(n) for n in values}
        dim = dims.pop() if len(dims) == 1 else None
        if dim is None or not isinstance(over, int):
            raise Unsliceable(f"{_what(node)} joins a whole value with a sliced one")
        if shift:
            return dim + (over % ndim <= dim)
        if over % ndim == dim:
            raise Unsliceable(f"{_what(node)} joins values along the sliced width")
        return dim

    def _matmul(self, node: fx.Node) -> int:
        """Multiply slice by slice: the sliced dimension must be one of the batch."""
        for operand in node.all_input_nodes:
            dim = self.state.dims.get(operand)
            if dim is not None and dim >= len(shape_of(operand)) - 2:
                raise Unsliceable(f"{_what(node)} sums over what is sliced, or mixes it")
        return self._broadcast(node, node.all_input_nodes, len(shape_of(node)))

    def _attention(self, node: fx.Node) -> int:
        heads = {argument(node, i, name) for i, name in enumerate(("query", "key", "value"))}
        for operand in heads:
            if not isinstance(operand, fx.Node) or operand not in self.state.dims:
                raise Unsliceable(f"{_what(node)} joins whole heads with sliced ones")
            if self.state.dims[operand] >= len(shape_of(operand)) - 2:
                raise Unsliceable(f"{_what(node)} mixes what is sliced")
        return self._broadcast(node, node.all_input_nodes, len(shape_of(node)))


def _leaves(value: object) -> Iterable[object]:
    if isinstance(value, tuple | list):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


def _call(node: fx.Node, probe: Tensor) -> object:
    if node.op == "call_method":
        return getattr(probe, str(node.target))(*node.args[1:], **node.kwargs)
    assert callable(node.target)
    return node.target(probe, *node.args[1:], **node.kwargs)


def _tensors(value: object) -> list[Tensor]:
    parts = value if isinstance(value, tuple | list) else (value,)
    return [part for part in parts if isinstance(part, Tensor)]
