"""The ways to write each canonical activation, and the search for a program among them.

A program gets a canonical name if its operations are those of one of these forms (`normal_form`
says what that means), and if in addition its numbers are the activation's wherever it is probed
(`probing`). In bfloat16 or float16 the named activation may round differently from operations
written by hand, which round after each step; it is never further from the exact value.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from moeify.nn.activations import ACTIVATIONS
from moeify.passes.match.expression import Sum, Unknown, graph_of, piece, same
from moeify.passes.match.normal_form import normal_form, tolerance_for
from moeify.passes.match.probing import same_numbers

Form = Callable[[Tensor], Tensor]

_SQRT_2 = math.sqrt(2)
_SQRT_2_PI = math.sqrt(2 / math.pi)


def _inner(x: Tensor) -> Tensor:
    return _SQRT_2_PI * (x + 0.044715 * x * x * x)


_BY_HAND: Final[Mapping[str, tuple[Form, ...]]] = {
    "gelu": (lambda x: 0.5 * x * (1 + torch.erf(x / _SQRT_2)),),
    "gelu_tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh(_inner(x))),
        lambda x: x * torch.sigmoid(2 * _inner(x)),
    ),
    "silu": (
        lambda x: x * torch.sigmoid(x),
        lambda x: x / (1 + torch.exp(-x)),
        lambda x: 0.5 * x * (1 + torch.tanh(0.5 * x)),
    ),
    "relu2": (
        lambda x: x * F.relu(x),
        lambda x: torch.clamp(x, min=0) * torch.clamp(x, min=0),
    ),
}
"""Forms beside the functions in `ACTIVATIONS` themselves. `clamp(x, min=0)` is not among those of
`relu`: its gradient at zero is one."""


def recognise(
    module: fx.GraphModule, width: int, dtype: torch.dtype
) -> tuple[str, bool, bool] | None:
    """Return (activation, gated, swap) where a program is a canonical one, else None.

    `module` maps rows [R, width] of `dtype` to [R, width], or to [R, width / 2] if gated.
    """
    tolerance = tolerance_for(dtype)
    whole, half = piece(0, width), width // 2
    try:
        program = normal_form(module.graph, whole, width, dtype)
    except Unknown:
        return None
    first, second, one = piece(0, half), piece(half, width), Sum.number(1)
    candidates = [(whole, one, False, False)]
    if width % 2 == 0:
        candidates += [(first, second, True, False), (second, first, True, True)]
    for name, graph in _forms():
        for gate, linear, gated, swap in candidates:
            form = normal_form(graph, gate, width, torch.float64).times(linear)
            if same(program, form, tolerance):
                known = same_numbers(
                    module, ACTIVATIONS[name], width, gated=gated, swap=swap, dtype=dtype
                )
                return (name, gated, swap) if known else None
    return None


@functools.cache
def _forms() -> tuple[tuple[str, fx.Graph], ...]:
    """Return each form as a graph, with its name."""
    found = []
    for name, function in ACTIVATIONS.items():
        for form in (function, *_BY_HAND.get(name, ())):
            found.append((name, graph_of(form)))
    return tuple(found)
