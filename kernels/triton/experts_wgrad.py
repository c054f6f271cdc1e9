"""Gradients of all weights of the fused experts in Triton: projections, biases, combine weights.

A program owns one tile of one expert's gradient and walks over that expert's rows, so that experts
without rows get zeros from the same code and the order of summation is fixed. One of the factors
is in token order and is gathered on the way in.

Shapes: T tokens, N output width, M input width, O output width of the experts, E experts, K top-k,
R = T * K rows, B blocks of the experts' width.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels.triton.tile_config import bucket, fitting_stages, shared_memory
from moeify.kernels.triton.tiles import dot_precision, order_tile


def weight_gradient(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, top_k: int, gathered: str
) -> Tensor:
    """Return [E, N, M]: `left.T @ right` over the rows of each expert, accumulated in float32.

    `gathered` names the factor that is in token order, "left" or "right": [T, N] or [T, M], where
    the other one has R rows. Both are contiguous.

    Source:
        MegaBlocks (Gale et al. 2022) section 5.1: the transposed products of the backward.
    """
    experts, height, width = offsets.shape[0], left.shape[1], right.shape[1]
    out = left.new_empty(experts, height, width)
    config = weight_tile(order.shape[0], experts, left.dtype, left.device)
    tiles = triton.cdiv(height, config["BN"]) * triton.cdiv(width, config["BM"])
    weight_kernel[(tiles, experts)](
        left,
        right,
        order,
        offsets,
        out,
        K=top_k,
        N=height,
        M=width,
        GATHER_LEFT=gathered == "left",
        PRECISION=dot_precision(left.dtype),
        **config,
    )
    return out


def bias_gradient(
    grad: Tensor,
    weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    top_k: int,
    gathered: bool,
) -> Tensor:
    """Return [E, N]: the sum of each expert's rows, each times its combine weight, if given.

    `grad` [R, N] is contiguous; if gathered it is in token order, [T, N].
    """
    experts, width = offsets.shape[0], grad.shape[1]
    out = grad.new_empty(experts, width)
    bias_kernel[(triton.cdiv(width, 128), experts)](
        grad,
        weights,
        order,
        offsets,
        out,
        K=top_k,
        N=width,
        GATHERED=gathered,
        BN=128,
        BR=32,
    )
    return out


def combine_gradient(
    shares: Tensor, slots: Tensor, grad: Tensor, down_bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """Return the gradient [T, K] of the combine weights, summed in a fixed order.

    `shares` [R, B] are the addends of `<grad W_down, activated>` by row.

    Source:
        SonicMoE (Guo et al. 2025) section 3.
    """
    out = torch.empty(slots.shape, dtype=torch.float32, device=slots.device)
    routes, experts = out.numel(), offsets.shape[0]
    if routes:
        combine_kernel[(triton.cdiv(routes, 16),)](
            shares,
            slots.contiguous(),
            grad,
            None if down_bias is None else down_bias.contiguous(),
            offsets,
            out,
            routes,
            K=slots.shape[1],
            OUTPUT=grad.shape[1],
            B=shares.shape[1],
            E=experts,
            EP=triton.next_power_of_2(experts),
            BR=16,
            BO=128,
        )
    return out


def weight_tile(
    rows: int, experts: int, dtype: torch.dtype, device: torch.device
) -> dict[str, int]:
    """Return tile sizes, warps and stages; the step over rows follows the rows per expert."""
    step = bucket(rows, experts)
    if dtype == torch.float32:
        return {"BN": 64, "BM": 64, "BR": min(step, 32), "num_warps": 8, "num_stages": 3}
    step = min(step, 64)
    stages = fitting_stages(5, (128 + 128) * step * 2, shared_memory(device))
    return {"BN": 128, "BM": 128, "BR": step, "num_warps": 8, "num_stages": stages}


@triton.jit
def weight_kernel(
    left,
    right,
    order,
    offsets,
    out,
    K: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    GATHER_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
):
    """One [BN, BM] tile of one expert's gradient."""
    expert = tl.program_id(1)
    n_tile, m_tile = order_tile(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(M, BM), 8)
    n = n_tile * BN + tl.arange(0, BN)
    m = m_tile * BM + tl.arange(0, BM)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    total = tl.zeros((BN, BM), tl.float32)
    for first in range(start, end, BR):
        rows = first + tl.arange(0, BR)
        route = tl.load(order + rows, mask=rows < end, other=-1)
        kept = (route >= 0)[:, None]
        token = (route // K).to(tl.int64)[:, None]
        row = rows.to(tl.int64)[:, None]
        left_row = token if GATHER_LEFT else row
        right_row = row if GATHER_LEFT else token
        a = tl.load(left + left_row * N + n[None, :], mask=kept & (n < N)[None, :], other=0)
        b = tl.load(right + right_row * M + m[None, :], mask=kept & (m < M)[None, :], other=0)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    place = out + (expert.to(tl.int64) * N + n[:, None]) * M + m[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def bias_kernel(
    grad,
    weights,
    order,
    offsets,
    out,
    K: tl.constexpr,
    N: tl.constexpr,
    GATHERED: tl.constexpr,
    BN: tl.constexpr,
    BR: tl.constexpr,
):
    """BN columns of one expert's sum."""
    expert = tl.program_id(1)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    total = tl.zeros((BR, BN), tl.float32)
    for first in range(start, end, BR):
        rows = first + tl.arange(0, BR)
        route = tl.load(order + rows, mask=rows < end, other=-1)
        kept = (route >= 0)[:, None]
        row = (route // K if GATHERED else rows).to(tl.int64)[:, None]
        part = tl.load(grad + row * N + n[None, :], mask=kept & (n < N)[None, :], other=0)
        part = part.to(tl.float32)
        if weights is not None:
            part *= tl.load(weights + route, mask=route >= 0, other=0)[:, None]
        total += part
    value = tl.sum(total, axis=0).to(out.dtype.element_ty)
    tl.store(out + expert.to(tl.int64) * N + n, value, mask=n < N)


@triton.jit(do_not_specialize=["routes"])
def combine_kernel(
    shares,
    slots,
    grad,
    down_bias,
    offsets,
    out,
    routes,
    K: tl.constexpr,
    OUTPUT: tl.constexpr,
    B: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BR: tl.constexpr,
    BO: tl.constexpr,
):
    """Sum the shares of BR routes, and add what the down projection's bias contributes."""
    route = tl.program_id(0) * BR + tl.arange(0, BR)
    here = route < routes
    slot = tl.load(slots + route, mask=here, other=-1)
    kept = (slot >= 0)[:, None]
    lane = tl.arange(0, BO)[None, :]
    total = tl.zeros((BR, BO), tl.float32)
    row = slot.to(tl.int64)[:, None] * B
    for start in range(0, B, BO):
        block = start + lane
        total += tl.load(shares + row + block, mask=kept & (block < B), other=0)
    if down_bias is not None:
        experts = tl.arange(0, EP)
        ends = tl.load(offsets + experts, mask=experts < E, other=2147483647)
        expert = tl.sum((ends[None, :] <= slot[:, None]).to(tl.int32), axis=1)
        token = grad + (route // K).to(tl.int64)[:, None] * OUTPUT
        bias = down_bias + expert.to(tl.int64)[:, None] * OUTPUT
        for start in range(0, OUTPUT, BO):
            column = start + lane
            mask = kept & (column < OUTPUT)
            left = tl.load(token + column, mask=mask, other=0).to(tl.float32)
            total += left * tl.load(bias + column, mask=mask, other=0).to(tl.float32)
    tl.store(out + route, tl.sum(total, axis=1), mask=here)
