"""What the ops that multiply matrices cost, for `torch.utils.flop_counter`.

A multiplication and an addition count as two, as everywhere in torch. The numbers follow from
shapes alone: every route counts, also one that was dropped, for which of them are is data; a
capacity does not matter. With rows that a rank received, every received row counts.

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R rows.
"""

from __future__ import annotations

import functools
from math import prod
from typing import Any

import torch

from moeify.kernels import experts as _experts  # noqa: F401  registers its ops
from moeify.kernels import gate as _gate  # noqa: F401
from moeify.kernels import grouped_linear as _grouped_linear  # noqa: F401
from moeify.kernels.experts import BackwardCall, ExpertsCall

Shape = tuple[int, ...]


def gate(tokens: Shape, weight: Shape, *_: Any, out_shape: Any = None) -> int:
    """Count the logits: `tokens @ weight.T`."""
    return 2 * prod(tokens) * weight[0]


def gate_backward(*args: Any, out_shape: Any = None) -> int:
    """Count both gradients of the logits' product."""
    tokens, weight = args[4:6]
    return 2 * gate(tokens, weight)


def experts(*args: Any, out_shape: Any = None) -> int:
    """Count both projections of T * K rows."""
    call: Any = ExpertsCall(*args)  # of shapes
    up: int = prod(call.up[1:])
    down: int = prod(call.down[1:])
    rows: int = prod(call.slots)
    return 2 * rows * (up + down)


def experts_backward(*args: Any, out_shape: Any = None) -> int:
    """Count the gradients that are asked for; that of the activated values always is."""
    call: Any = BackwardCall(*args)  # of shapes
    up: int = prod(call.up[1:])
    down: int = prod(call.down[1:])
    rows: int = prod(call.slots)
    parts = down
    if call.needs_params:
        parts += up + down
    if call.needs_tokens:
        parts += up
    return 2 * rows * parts


def grouped_linear(rows: Shape, weight: Shape, *_: Any, out_shape: Any = None) -> int:
    """Count `rows @ weight[e].T`."""
    return 2 * prod(rows) * weight[1]


def grouped_linear_backward(grad: Shape, rows: Shape, *_: Any, out_shape: Any = None) -> int:
    """Count `grad.T @ rows`."""
    return 2 * prod(grad) * rows[1]


FORMULAS = {
    "gate": gate,
    "gate_backward": gate_backward,
    "experts": experts,
    "experts_backward": experts_backward,
    "grouped_linear": grouped_linear,
    "grouped_linear_backward": grouped_linear_backward,
}
"""By name of the op; the other ops move or weight rows."""


@functools.cache
def register_flops() -> None:
    """Make `torch.utils.flop_counter.FlopCounterMode` count these ops.

    Called when a router or experts are built, not when moeify is imported: the counter imports
    Triton, which takes longer than the whole of moeify.
    """
    from torch.utils.flop_counter import register_flop_formula

    for name, formula in FORMULAS.items():
        register: Any = register_flop_formula(getattr(torch.ops.moeify, name))
        register(formula)
