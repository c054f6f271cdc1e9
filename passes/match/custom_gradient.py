"""Custom `autograd.Function`s whose gradient is, by its operations, that of their forward.

Both are traced, and the backward is compared with the derivative of the forward, worked out by the
rules for sums, products and a few functions. Such a function is what its forward says; any other
one may have a gradient of its own and stays closed.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import fx

from moeify.passes.match.expression import Atom, Sum, Unknown, graph_of, same
from moeify.passes.match.operations import OpaqueCall

ARGUMENT: Final = Sum.atom(Atom("argument"))
GRADIENT: Final = Sum.atom(Atom("gradient"))


class _Context:
    """What a Function's forward leaves for its backward."""

    def __init__(self) -> None:
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *values: Any) -> None:
        self.saved_tensors = values


def traced(call: OpaqueCall) -> tuple[fx.Graph, fx.Graph]:
    """Return the forward, and the backward as a graph of (argument, gradient of the output).

    Raises:
        Unknown: It is no Function of one tensor alone, or branches on values.
    """
    function: Any = call.owner
    plain = isinstance(function, type) and issubclass(function, torch.autograd.Function)
    if (
        not plain
        or call.rest
        or function.setup_context is not torch.autograd.Function.setup_context
    ):
        raise Unknown("a custom function with more arguments")

    def forward(argument: Any) -> Any:
        return function.forward(_Context(), argument)

    def backward(argument: Any, gradient: Any) -> Any:
        context = _Context()
        function.forward(context, argument)
        found = function.backward(context, gradient)
        return found[0] if isinstance(found, tuple) else found

    try:
        return graph_of(forward), graph_of(backward, 2)
    except Exception as error:  # the user's code, on values that have no numbers
        raise Unknown("a custom function that cannot be traced") from error


def is_true_gradient(forward: Sum, backward: Sum, tolerance: float) -> bool:
    """Tell whether `backward` is the derivative of `forward` times `GRADIENT`.

    Raises:
        Unknown: The forward has no derivative here.
    """
    return same(backward, derivative(forward).times(GRADIENT), tolerance)


def derivative(value: Sum) -> Sum:
    """Return the derivative by `ARGUMENT`."""
    total = Sum.number(0)
    for powers, factor in value.terms:
        for place, (atom, power) in enumerate(powers):
            rest = (*powers[:place], *powers[place + 1 :])
            if power != 1:
                rest = (*rest, (atom, power - 1))
            others = Sum.of({(): factor * power})
            for other, exponent in rest:
                others = others.times(Sum.atom(other).power(exponent))
            total = total.plus(others.times(_slope(atom)))
    return total


def _slope(atom: Atom) -> Sum:
    if atom.name == "argument":
        return Sum.number(1)
    own, one = Sum.atom(atom), Sum.number(1)
    (inner,) = atom.of
    match atom.name:
        case "tanh":
            outer = one.plus(own.power(2), -1)
        case "sigmoid":
            outer = own.plus(own.power(2), -1)
        case "exp":
            outer = own
        case "reciprocal":
            outer = own.power(2).times(Sum.number(-1))
        case "erf":
            bell = Sum.atom(Atom("exp", (inner.power(2).times(Sum.number(-1)),)))
            outer = bell.times(Sum.number(2 / math.sqrt(math.pi)))
        case _:
            raise Unknown(f"the derivative of {atom.name}")
    return outer.times(derivative(inner))
