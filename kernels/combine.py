"""`moeify::combine`: expert outputs back to tokens, weighted; gathers only, no atomics.

Shapes: T tokens, D model width, K top-k, R rows: T * K, or more or fewer after `send_layout`, which
leaves gaps and has no room for dropped routes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.kernels.precision import accumulation_dtype, without_autocast
from moeify.kernels.registry import define, differentiable, fake


def combine_reference(
    hidden: Tensor, weights: Tensor | None, order: Tensor, slots: Tensor
) -> Tensor:
    """Sum each token's rows, each times its weight, in float32 at least.

    A dropped route adds exactly zero, whatever `hidden` holds. The result does not depend on
    the number of threads or on scheduling.

    Args:
        hidden: [R, D], any float dtype.
        weights: [T, K] float32 or float64, or None for ones.
        order: [R] int32, flat route of each row, -1 where unused; read by the backward.
        slots: [T, K] int32, row of each route, -1 where dropped.

    Returns:
        [T, D] in the dtype of `hidden`.

    Source:
        Mixture of experts, Shazeer et al. 2017 eq. 1.
    """
    dtype = accumulation_dtype(hidden.dtype)
    total = hidden.new_zeros(slots.shape[0], hidden.shape[1], dtype=dtype)
    with without_autocast(hidden):
        for choice in range(slots.shape[1]):
            part = _rows_of(hidden, slots[:, choice], dtype)
            if weights is not None:
                kept = weights[:, choice].masked_fill(slots[:, choice] < 0, 0)
                part = part * kept[:, None].to(dtype)
            total = total + part
    return total.to(hidden.dtype)


combine = define(
    "combine",
    "(Tensor hidden, Tensor? weights, Tensor order, Tensor slots) -> Tensor",
    combine_reference,
    cpu="moeify.kernels.cpu.rows:combine",
    cuda="moeify.kernels.triton.rows:combine",
)


@fake("combine")
def _(hidden: Tensor, weights: Tensor | None, order: Tensor, slots: Tensor) -> Tensor:
    return hidden.new_empty(slots.shape[0], hidden.shape[1])


def combine_backward_reference(
    grad: Tensor, hidden: Tensor, weights: Tensor, order: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `combine` for hidden [R, D] and weights [T, K], in their dtypes.

    Unused rows and dropped routes get zeros.
    """
    dtype = accumulation_dtype(hidden.dtype)
    top_k = slots.shape[1]
    if slots.numel() == 0:
        return torch.zeros_like(hidden), torch.zeros_like(weights)
    with without_autocast(hidden):
        token_of_row = order.clamp_min(0).div(top_k, rounding_mode="floor")
        scale = row_weights(weights, order, dtype)[:, None]
        grad_hidden = grad.index_select(0, token_of_row).to(dtype) * scale
        grad_hidden = grad_hidden.masked_fill((order < 0)[:, None], 0)
        wide = grad.to(dtype)
        grad_weights = torch.stack(
            [(_rows_of(hidden, slots[:, j], dtype) * wide).sum(1) for j in range(top_k)], dim=1
        ).masked_fill(slots < 0, 0)  # the gradient of a dropped route may be NaN
    return grad_hidden.to(hidden.dtype), grad_weights.to(weights.dtype)


combine_backward = define(
    "combine_backward",
    "(Tensor grad, Tensor hidden, Tensor weights, Tensor order, Tensor slots) -> (Tensor, Tensor)",
    combine_backward_reference,
    cpu="moeify.kernels.cpu.rows:combine_backward",
    cuda="moeify.kernels.triton.rows:combine_backward",
)


@fake("combine_backward")
def _(
    grad: Tensor, hidden: Tensor, weights: Tensor, order: Tensor, slots: Tensor
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), weights.new_empty(weights.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weights, order, slots = ctx.saved_tensors
    ones = grad.new_ones(slots.shape) if weights is None else weights
    grad_hidden, grad_weights = torch.ops.moeify.combine_backward(grad, hidden, ones, order, slots)
    return grad_hidden, grad_weights if weights is not None else None, None, None


differentiable("combine", combine_reference, backward=_backward, setup_context=_setup_context)
differentiable("combine_backward", combine_backward_reference)


def row_weights(weights: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    """Return [R]: the combine weight of each row's route, 0 in unused rows."""
    picked = weights.flatten().index_select(0, order.clamp_min(0)).to(dtype)
    return picked.masked_fill(order < 0, 0)


def route_values(values: Tensor, slots: Tensor) -> Tensor:
    """Return [T, K]: the value [R] of each route's row, 0 for dropped routes."""
    picked = values.index_select(0, slots.flatten().clamp_min(0)).view(slots.shape)
    return picked.masked_fill(slots < 0, 0)


def _rows_of(hidden: Tensor, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows [T, D] at `slots` [T]; zeros for dropped routes, so that no NaN is read."""
    if hidden.shape[0] == 0:  # every route is dropped
        return hidden.new_zeros(slots.shape[0], hidden.shape[1], dtype=dtype)
    picked = hidden.index_select(0, slots.clamp_min(0))
    return picked.masked_fill((slots < 0)[:, None], 0).to(dtype)
