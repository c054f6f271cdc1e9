"""`moeify::dispatch`: tokens into the packed, expert-major buffer; a pure gather.

Shapes: T tokens, D model width, K top-k, R rows: T * K, or another number after `send_layout`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.kernels import combine  # noqa: F401  its op is the backward of this one
from moeify.kernels.registry import define, differentiable, fake


def dispatch_reference(tokens: Tensor, order: Tensor, slots: Tensor) -> Tensor:
    """Copy each kept token to its rows.

    Args:
        tokens: [T, D], any dtype.
        order: [R] int32, flat route `t * K + j` of each row, -1 where unused.
        slots: [T, K] int32, row of each route, -1 where dropped; the inverse of `order`.

    Returns:
        [R, D] rows in the dtype of `tokens`; zeros where `order` is -1.

    Source:
        ScatterMoE (Tan et al. 2024) section 3: indices instead of GShard's one-hot einsum.
    """
    if tokens.shape[0] == 0:
        return tokens.new_zeros(order.shape[0], tokens.shape[1])
    unused = (order < 0)[:, None]
    token_of_row = order.clamp_min(0).div(slots.shape[1], rounding_mode="floor")
    return tokens.index_select(0, token_of_row).masked_fill(unused, 0)


dispatch = define(
    "dispatch",
    "(Tensor tokens, Tensor order, Tensor slots) -> Tensor",
    dispatch_reference,
    cpu="moeify.kernels.cpu.rows:dispatch",
    cuda="moeify.kernels.triton.rows:dispatch",
)


@fake("dispatch")
def _(tokens: Tensor, order: Tensor, slots: Tensor) -> Tensor:
    return tokens.new_empty(order.shape[0], tokens.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, order, slots = inputs
    ctx.save_for_backward(order, slots)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    order, slots = ctx.saved_tensors
    return torch.ops.moeify.combine(grad, None, order, slots), None, None


differentiable("dispatch", dispatch_reference, backward=_backward, setup_context=_setup_context)
