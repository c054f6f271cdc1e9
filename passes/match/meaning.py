"""When two programs compute the same, and how they differ.

Every argument counts: those of torch's functions, and those of custom functions too. Objects are
compared as themselves, never by their text or by an id that may be reused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx, nn

from moeify.passes.match.inner_program import InnerProgram
from moeify.passes.match.operations import OpaqueCall, op_name


def difference(one: InnerProgram, other: InnerProgram) -> str:
    """Say how `other` differs from `one`, or "" if it does not."""
    if one.activation != other.activation:
        return f"it computes {_name(other)} instead of {_name(one)}"
    if (one.gated, one.swap, one.params) != (other.gated, other.swap, other.params):
        return "it uses its projections in another way"
    if one.dropout != other.dropout:
        return f"its dropout is {other.dropout} instead of {one.dropout}"
    for left, right in zip(_steps(one), _steps(other), strict=False):
        if left != right:
            return _step_difference(left, right)
    if len(list(_steps(one))) != len(list(_steps(other))):
        return "it takes other steps"
    return ""


def _name(program: InnerProgram) -> str:
    return "another program" if program.activation == "custom" else program.activation


Step = tuple[str, object, tuple[object, ...]]


def _steps(program: InnerProgram) -> Iterator[Step]:
    """Yield name, operation and arguments of each node; other nodes by their positions."""
    if program.module is None:
        return
    place = {node: i for i, node in enumerate(program.module.graph.nodes)}
    for node in place:
        target: object = node.target
        arguments = [_exact(node.args, place), _exact(node.kwargs, place)]
        name = op_name(node)
        if node.op == "call_module":
            called = program.module.get_submodule(str(node.target))
            target, held = _module(called)
            name = str(getattr(target, "__name__", target))
            arguments += held
        yield name, target, tuple(_flat(arguments))


def _module(called: nn.Module) -> tuple[object, list[object]]:
    """Return what a module of a program runs, and its arguments."""
    if isinstance(called, OpaqueCall):
        return called.owner, [called.method, _exact(called.rest, {})]
    return type(called), [_exact(getattr(called, "p", None), {})]  # a dropout


def _exact(value: Any, place: dict[fx.Node, int]) -> object:
    """Return a value that equals only what is the same in type and digits."""
    if isinstance(value, fx.Node):
        return "node", place[value]
    if isinstance(value, dict):
        return [(key, _exact(part, place)) for key, part in sorted(value.items())]
    if isinstance(value, tuple | list):
        return [_exact(part, place) for part in value]
    if isinstance(value, slice):
        return [_exact(part, place) for part in (value.start, value.stop, value.step)]
    if isinstance(value, bool | int | float | complex):
        return _Number(type(value), repr(value))
    return value


class _Number(tuple[type, str]):
    """A number with its type: `1`, `1.0` and `True` are three."""

    __slots__ = ()

    def __new__(cls, kind: type, text: str) -> _Number:
        return super().__new__(cls, (kind, text))


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list):
        yield len(value)
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _step_difference(left: Step, right: Step) -> str:
    if left[:2] != right[:2]:
        return f"it runs `{right[0]}` instead of `{left[0]}`"
    for a, b in zip(left[2], right[2], strict=False):
        if a != b and isinstance(a, _Number) and isinstance(b, _Number):
            return f"a constant of `{left[0]}` is {b[1]} instead of {a[1]}"
    return f"`{left[0]}` gets other arguments"
