"""Moving rows in Triton: `dispatch`, `combine`, `combine_weights` and their backwards.

Gathers only, so that nothing depends on scheduling: where the gradient of a gather would scatter,
the index of the other direction is read instead.

Shapes: T tokens, D model width, K top-k, R = T * K rows.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels.combine_weights import COMBINES
from moeify.kernels.gate import EPSILON
from moeify.kernels.operands import FLOATS, contiguous

_EPSILON = tl.constexpr(EPSILON)


@triton.jit(do_not_specialize=["rows"])
def dispatch_kernel(
    tokens,
    order,
    out,
    rows,
    width,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Copy the token of each row; zeros where the row is unused."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ok, column_ok = row < rows, column < width
    route = tl.load(order + row, mask=row_ok, other=-1)
    used = (route >= 0)[:, None] & column_ok[None, :]
    token = (route // TOP_K).to(tl.int64)
    values = tl.load(tokens + token[:, None] * width + column[None, :], mask=used, other=0.0)
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(out + place, values, mask=row_ok[:, None] & column_ok[None, :])


@triton.jit(do_not_specialize=["rows"])
def combine_kernel(
    hidden,
    weights,
    slots,
    out,
    rows,
    width,
    TOP_K: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum each token's rows times their weights, in order of choice."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    token_ok, column_ok = token < rows, column < width
    token = token.to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for choice in range(TOP_K):
        slot = tl.load(slots + token * TOP_K + choice, mask=token_ok, other=-1).to(tl.int64)
        kept = (slot >= 0)[:, None]
        place = slot[:, None] * width + column[None, :]
        part = tl.load(hidden + place, mask=kept & column_ok[None, :], other=0.0).to(tl.float32)
        if weights is not None:
            weight = tl.load(weights + token * TOP_K + choice, mask=token_ok, other=0.0)
            part = tl.where(kept, part * weight.to(tl.float32)[:, None], 0.0)
        total += part
    place = token[:, None] * width + column[None, :]
    inside = token_ok[:, None] & column_ok[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["routes"])
def combine_backward_kernel(
    grad,
    hidden,
    weights,
    order,
    slots,
    grad_hidden,
    grad_weights,
    routes,
    rows,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Fill the row of each kept route, and, index for index, the unused rows with zeros."""
    route = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    route_ok = route < routes
    slot = tl.load(slots + route, mask=route_ok, other=-1).to(tl.int64)
    kept = slot >= 0
    weight = tl.load(weights + route, mask=kept, other=0.0).to(tl.float32)
    unused = tl.load(order + route, mask=route < rows, other=0) < 0
    token, row = (route // TOP_K).to(tl.int64), route.to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        column_ok = (column < WIDTH)[None, :]
        column = column[None, :]
        inside = kept[:, None] & column_ok
        g = tl.load(grad + token[:, None] * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        place = slot[:, None] * WIDTH + column
        h = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        total += g * h
        product = (g * weight[:, None]).to(grad_hidden.dtype.element_ty)
        tl.store(grad_hidden + place, product, mask=inside)
        zeros = tl.zeros_like(product)
        tl.store(
            grad_hidden + row[:, None] * WIDTH + column, zeros, mask=unused[:, None] & column_ok
        )
    sums = tl.sum(total, axis=1).to(grad_weights.dtype.element_ty)
    tl.store(grad_weights + route, sums, mask=route_ok)


@triton.jit
def _kept_scores(
    scores, slots, rows, TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return scores [BLOCK_T, BLOCK_K], 0 where dropped; where kept; the places; their mask."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    choice = tl.arange(0, BLOCK_K)
    place = token.to(tl.int64)[:, None] * TOP_K + choice[None, :]
    inside = (token < rows)[:, None] & (choice < TOP_K)[None, :]
    kept = tl.load(slots + place, mask=inside, other=-1) >= 0
    return tl.load(scores + place, mask=kept, other=0.0), kept, place, inside


@triton.jit(do_not_specialize=["rows"])
def combine_weights_kernel(
    scores,
    slots,
    out,
    rows,
    TOP_K: tl.constexpr,
    COMBINE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Turn scores into weights."""
    score, kept, place, inside = _kept_scores(scores, slots, rows, TOP_K, BLOCK_T, BLOCK_K)
    if COMBINE == "probability":
        weight = score
    elif COMBINE == "sum" or (COMBINE == "straight_through" and TOP_K == 1):
        weight = tl.where(kept, 1 + (score - score), 0.0)  # NaN stays NaN
    else:
        weight = score / (tl.sum(score, axis=1) + _EPSILON)[:, None]
    tl.store(out + place, weight, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def combine_weights_backward_kernel(
    grad,
    scores,
    slots,
    out,
    rows,
    TOP_K: tl.constexpr,
    NORMALIZED: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Turn the gradient of the weights into that of the scores."""
    score, kept, place, inside = _kept_scores(scores, slots, rows, TOP_K, BLOCK_T, BLOCK_K)
    value = tl.load(grad + place, mask=kept, other=0.0)
    if NORMALIZED:
        total = (tl.sum(score, axis=1) + _EPSILON)[:, None]
        inner = tl.sum(value * score / total, axis=1)[:, None]
        value = (value - inner) / total
    tl.store(out + place, tl.where(kept, value, 0.0), mask=inside)


def dispatch(tokens: Tensor, order: Tensor, slots: Tensor) -> Any:
    """Do what `dispatch_reference` does, in float32, float16 or bfloat16."""
    if tokens.dtype not in FLOATS:
        return NotImplemented
    rows, width = order.shape[0], tokens.shape[1]
    out = tokens.new_empty(rows, width)
    if out.numel():
        block_r, block_d = row_block(width)
        dispatch_kernel[(triton.cdiv(rows, block_r), triton.cdiv(width, block_d))](
            *contiguous(tokens, order),
            out,
            rows,
            width,
            TOP_K=slots.shape[1],
            BLOCK_R=block_r,
            BLOCK_D=block_d,
        )
    return out


def combine(hidden: Tensor, weights: Tensor | None, order: Tensor, slots: Tensor) -> Any:
    """Do what `combine_reference` does, in float32, float16 or bfloat16."""
    if hidden.dtype not in FLOATS or (weights is not None and weights.dtype not in FLOATS):
        return NotImplemented
    (rows, top_k), width = slots.shape, hidden.shape[1]
    out = hidden.new_empty(rows, width)
    if out.numel():
        block_t, block_d = row_block(width)
        combine_kernel[(triton.cdiv(rows, block_t), triton.cdiv(width, block_d))](
            *contiguous(hidden, weights, slots),
            out,
            rows,
            width,
            TOP_K=top_k,
            BLOCK_T=block_t,
            BLOCK_D=block_d,
        )
    return out


def combine_backward(
    grad: Tensor, hidden: Tensor, weights: Tensor, order: Tensor, slots: Tensor
) -> Any:
    """Do what `combine_backward_reference` does, in float32, float16 or bfloat16."""
    if not {grad.dtype, hidden.dtype, weights.dtype} <= set(FLOATS):
        return NotImplemented
    width = hidden.shape[1]
    grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    grad_weights = torch.empty_like(weights, memory_format=torch.contiguous_format)
    most = max(slots.numel(), order.shape[0])
    if most:
        block_r, block_d = row_block(width)
        combine_backward_kernel[(triton.cdiv(most, block_r),)](
            *contiguous(grad, hidden, weights, order, slots),
            grad_hidden,
            grad_weights,
            slots.numel(),
            order.shape[0],
            WIDTH=width,
            TOP_K=slots.shape[1],
            BLOCK_R=block_r,
            BLOCK_D=block_d,
        )
    return grad_hidden, grad_weights


def combine_weights(scores: Tensor, slots: Tensor, combine: str) -> Any:
    """Do what `combine_weights_reference` does, in float32."""
    if combine not in COMBINES or scores.dtype != torch.float32:
        return NotImplemented
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if out.numel():
        rows, top_k = scores.shape
        block_t, block_k = choice_block(top_k)
        combine_weights_kernel[(triton.cdiv(rows, block_t),)](
            *contiguous(scores, slots),
            out,
            rows,
            TOP_K=top_k,
            COMBINE=combine,
            BLOCK_T=block_t,
            BLOCK_K=block_k,
        )
    return out


def combine_weights_backward(grad: Tensor, scores: Tensor, slots: Tensor, combine: str) -> Any:
    """Do what `combine_weights_backward_reference` does, in float32."""
    if combine not in COMBINES or {grad.dtype, scores.dtype} != {torch.float32}:
        return NotImplemented
    out = torch.empty_like(scores, memory_format=torch.contiguous_format)
    if out.numel():
        rows, top_k = scores.shape
        block_t, block_k = choice_block(top_k)
        combine_weights_backward_kernel[(triton.cdiv(rows, block_t),)](
            *contiguous(grad, scores, slots),
            out,
            rows,
            TOP_K=top_k,
            NORMALIZED=combine == "normalized",
            BLOCK_T=block_t,
            BLOCK_K=block_k,
        )
    return out


def row_block(width: int) -> tuple[int, int]:
    """Return how many rows and columns of [R, D] one program takes."""
    columns = min(1024, max(16, triton.next_power_of_2(width)))
    return 4096 // columns, columns


def choice_block(top_k: int) -> tuple[int, int]:
    """Return how many rows and columns of [T, K] one program takes."""
    columns = triton.next_power_of_2(top_k)
    return max(1, 1024 // columns), columns
