"""`moeify::gate_backward` in Triton: the gradient of the logits, then two matrix products.

The gradient of the logits is [T, E] in float32, and all else is tiled. The products are not left to
cuBLAS: it would need copies of the tokens and of their gradient in float32, [T, D] each,
where these kernels read and write the model's dtype, and multiply as exactly (`arithmetic.dot`).
The weight's gradient sums over all tokens; it is split into parts of them, added in a fixed order.

Shapes: T tokens, D model width, E experts, K top-k, S parts of the tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels.gate import BALANCES, EPSILON, SCORES
from moeify.kernels.operands import FLOATS, contiguous
from moeify.kernels.triton.arithmetic import (
    dot,
    float32_precision,
    on_tensor_cores,
    probabilities,
)
from moeify.kernels.triton.assign import count
from moeify.kernels.triton.gate import MAX_EXPERTS

_EPSILON = tl.constexpr(EPSILON)


@triton.jit
def _logits_gradient(grad, scores, SCORE: tl.constexpr):
    """Return the gradient of the logits, given that of the scores."""
    if SCORE == "softmax":
        return scores * (grad - tl.sum(grad * scores, axis=1)[:, None])
    else:
        return grad * scores * (1 - scores)


@triton.jit(do_not_specialize=["rows"])
def grad_logits_kernel(
    grad_scores,
    grad_logits,
    grad_aux,
    grad_z,
    logits,
    ids,
    totals,
    grad_out,
    true_out,
    rows,
    experts,
    TOP_K: tl.constexpr,
    COUNTED: tl.constexpr,
    SCORE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store the gradient of the logits; true_out is the same without that of the scores."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    row_ok = row < rows
    row = row.to(tl.int64)
    columns, valid = expert[None, :], (expert < experts)[None, :]
    place, inside = row[:, None] * experts + columns, row_ok[:, None] & valid

    values = tl.load(logits + place, mask=inside, other=0.0)
    scores, shares, logsumexp = probabilities(values, valid, SCORE)
    grad = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if grad_aux is not None:
        load = tl.load(totals + expert, mask=expert < experts, other=0).to(tl.float32)
        tokens = rows.to(tl.float32)
        target = load * (experts / (tokens * COUNTED)) * (tl.load(grad_aux) / tokens)
        if SCORE == "softmax":
            to_scores = target[None, :] + grad
        else:
            total = tl.sum(scores, axis=1)[:, None] + _EPSILON
            to_scores = (
                target[None, :] - tl.sum(target[None, :] * shares, axis=1)[:, None]
            ) / total
        grad += _logits_gradient(to_scores, scores, SCORE)
    if grad_z is not None:
        slope = 2 * tl.load(grad_z) / rows.to(tl.float32)
        softmax = tl.exp(values - logsumexp[:, None])
        grad += slope * logsumexp[:, None] * softmax
    if grad_logits is not None:
        grad += tl.load(grad_logits + place, mask=inside, other=0.0).to(tl.float32)
    if true_out is not None:
        tl.store(true_out + place, grad, mask=inside)
    if grad_scores is not None:
        to_scores = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        for choice in range(TOP_K):
            chosen = tl.load(ids + row * TOP_K + choice, mask=row_ok, other=0)
            given = tl.load(grad_scores + row * TOP_K + choice, mask=row_ok, other=0.0)
            to_scores = tl.where(
                columns == chosen[:, None], given.to(tl.float32)[:, None], to_scores
            )
        grad += _logits_gradient(to_scores, scores, SCORE)
    tl.store(grad_out + place, grad, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def grad_tokens_kernel(
    grad,
    weight,
    input_noise,
    grad_tokens,
    rows,
    width,
    EXPERTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store `grad @ weight`, times the noise."""
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    row_ok, column_ok = row < rows, column < width
    row = row.to(tl.int64)
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, EXPERTS, BLOCK_E):
        expert = start + tl.arange(0, BLOCK_E)
        expert_ok = expert < EXPERTS
        g = tl.load(
            grad + row[:, None] * EXPERTS + expert[None, :],
            mask=row_ok[:, None] & expert_ok[None, :],
            other=0.0,
        )
        w = tl.load(
            weight + expert[:, None] * width + column[None, :],
            mask=expert_ok[:, None] & column_ok[None, :],
            other=0.0,
        )
        total = dot(g, w, total, PRECISION)
    place = row[:, None] * width + column[None, :]
    inside = row_ok[:, None] & column_ok[None, :]
    if input_noise is not None:
        total *= tl.load(input_noise + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(grad_tokens + place, total.to(grad_tokens.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def grad_weight_kernel(
    grad,
    tokens,
    input_noise,
    parts,
    rows,
    width,
    experts,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store `grad.T @ tokens` of each PART tokens; parts [S, E, D]."""
    column = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    expert = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    part = tl.program_id(2)
    column_ok, expert_ok = column < width, expert < experts
    total = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for start in range(0, PART, BLOCK_T):
        row = part * PART + start + tl.arange(0, BLOCK_T)
        row_ok = row < rows
        row = row.to(tl.int64)
        g = tl.load(
            grad + row[None, :] * experts + expert[:, None],
            mask=row_ok[None, :] & expert_ok[:, None],
            other=0.0,
        )
        place = row[:, None] * width + column[None, :]
        inside = row_ok[:, None] & column_ok[None, :]
        x = tl.load(tokens + place, mask=inside, other=0.0)
        if input_noise is not None:
            factor = tl.load(input_noise + place, mask=inside, other=0.0)
            x = x.to(tl.float32) * factor.to(tl.float32)
        total = dot(g, x, total, PRECISION)
    place = (part * experts + expert[:, None]).to(tl.int64) * width + column[None, :]
    inside = expert_ok[:, None] & column_ok[None, :]
    tl.store(parts + place, total.to(parts.dtype.element_ty), mask=inside)


def gate_backward(
    grad_scores: Tensor | None,
    grad_logits: Tensor | None,
    grad_aux: Tensor | None,
    grad_z: Tensor | None,
    tokens: Tensor,
    weight: Tensor,
    input_noise: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    score: str,
    balance: str,
    surrogate: bool,
) -> Any:
    """Do what `gate_backward_reference` does, for what `gate.gate` serves."""
    rows, experts, top_k = tokens.shape[0], weight.shape[0], ids.shape[1]
    known = score in SCORES and balance in BALANCES and experts <= MAX_EXPERTS
    if not known or not {tokens.dtype, weight.dtype} <= set(FLOATS):
        return NotImplemented
    if not rows:
        return torch.empty_like(tokens), torch.zeros_like(weight)
    tokens, weight, ids, input_noise = contiguous(tokens, weight, ids, input_noise)
    totals = None
    if grad_aux is not None:
        _, totals = count(ids, experts, choices=None if balance == "all" else 1)
    grad = torch.empty_like(logits)
    true_grad = torch.empty_like(logits) if surrogate and grad_scores is not None else None
    sizes = logits_sizes(experts)
    grad_logits_kernel[(triton.cdiv(rows, sizes["BLOCK_T"]),)](
        *contiguous(grad_scores, grad_logits),
        grad_aux,
        grad_z,
        logits.contiguous(),
        ids,
        totals,
        grad,
        true_grad,
        rows,
        experts,
        TOP_K=top_k,
        COUNTED=top_k if balance == "all" else 1,
        SCORE=score,
        **sizes,
    )
    grad_tokens = _grad_tokens(
        grad if true_grad is None else true_grad, weight, input_noise, tokens
    )
    return grad_tokens, _grad_weight(grad, tokens, input_noise, weight)


def _grad_tokens(
    grad: Tensor, weight: Tensor, input_noise: Tensor | None, tokens: Tensor
) -> Tensor:
    (rows, width), experts = tokens.shape, weight.shape[0]
    grad_tokens = torch.empty_like(tokens)
    sizes = product_sizes(experts, weight.dtype)
    grid = (triton.cdiv(rows, sizes["BLOCK_T"]), triton.cdiv(width, sizes["BLOCK_D"]))
    grad_tokens_kernel[grid](
        grad,
        weight,
        input_noise,
        grad_tokens,
        rows,
        width,
        EXPERTS=experts,
        PRECISION=float32_precision(),
        **sizes,
    )
    return grad_tokens


def _grad_weight(
    grad: Tensor, tokens: Tensor, input_noise: Tensor | None, weight: Tensor
) -> Tensor:
    (rows, width), experts = tokens.shape, weight.shape[0]
    sizes = product_sizes(experts, tokens.dtype if input_noise is None else torch.float32)
    part = 256 if rows <= 256 else 1024
    parts_count = triton.cdiv(rows, part)
    dtype = weight.dtype if parts_count == 1 else torch.float32
    parts = weight.new_empty(parts_count, experts, width, dtype=dtype)
    columns = triton.cdiv(width, sizes["BLOCK_D"])
    grad_weight_kernel[(columns, triton.cdiv(experts, sizes["BLOCK_E"]), parts_count)](
        grad,
        tokens,
        input_noise,
        parts,
        rows,
        width,
        experts,
        PART=part,
        PRECISION=float32_precision(),
        **sizes,
    )
    return parts[0] if parts_count == 1 else parts.sum(0).to(weight.dtype)


def logits_sizes(experts: int) -> dict[str, int]:
    """Return the blocks of `grad_logits_kernel`."""
    padded = max(16, triton.next_power_of_2(experts))
    return {"BLOCK_T": 2048 // padded, "BLOCK_E": padded}


def product_sizes(experts: int, other: torch.dtype) -> dict[str, int]:
    """Return the blocks of a product of the float32 gradient with a matrix of dtype `other`."""
    padded = max(16, triton.next_power_of_2(experts))
    exact = on_tensor_cores(torch.float32, other)
    return {
        "BLOCK_T": 32,
        "BLOCK_E": min(padded, 32),
        "BLOCK_D": 128 if exact else 64,
        "num_warps": 4,
        "num_stages": 3 if exact else 2,
    }
