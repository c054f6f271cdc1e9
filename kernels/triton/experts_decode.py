"""`moeify::experts` for a handful of routes, as in decoding: matrix-vector products.

With a few tokens the time goes into reading weights. Each route reads the weights of its own expert
and nothing else; no schedule is built, and two launches do everything: one program per route and
block of features, then one per token and block of outputs, which sums over the token's routes.

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R = T * K routes; BN, BK rows and columns of a block of weights.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch

import triton
import triton.language as tl
from moeify.kernels.elementwise import FUSED
from moeify.kernels.experts import ExpertsCall
from moeify.kernels.operands import contiguous
from moeify.kernels.triton.tiles import activate, serves

MOST_ROUTES = 64


@triton.jit
def activate_kernel(
    tokens,
    up,
    bias,
    slots,
    offsets,
    activated,
    stride_e,
    stride_n,
    stride_k,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute a block of one route's activated features, [R, F] float32 in order of route.

    Gated, gate and up rows of the weight alternate within the block.
    """
    H: tl.constexpr = 2 * F if GATED else F
    BF: tl.constexpr = BN // 2 if GATED else BN
    route = tl.program_id(0)
    slot = tl.load(slots + route)
    if slot >= 0:
        expert = _expert_of(slot, offsets, E, EP)
        column = tl.program_id(1) * BN + tl.arange(0, BN)
        column_ok = column < H
        if GATED:
            column = column % 2 * F + column // 2
        w = up + expert * stride_e + column.to(tl.int64) * stride_n
        x = tokens + (route // TOP_K).to(tl.int64) * D
        result = _matrix_vector(w, column_ok, stride_k, x, D, BN, BK)
        if bias is not None:
            result += tl.load(bias + expert * H + column, mask=column_ok, other=0).to(tl.float32)
        if GATED:
            gate, value = tl.split(tl.reshape(result, (BF, 2)))
            result = activate(gate, ACT) * value
        else:
            result = activate(result, ACT)
        feature = tl.program_id(1) * BF + tl.arange(0, BF)
        tl.store(activated + route.to(tl.int64) * F + feature, result, mask=feature < F)


@triton.jit
def output_kernel(
    activated,
    down,
    bias,
    weights,
    slots,
    offsets,
    out,
    stride_e,
    stride_n,
    stride_k,
    E: tl.constexpr,
    EP: tl.constexpr,
    TOP_K: tl.constexpr,
    F: tl.constexpr,
    N: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute a block of one token's output: the weighted sum over its routes."""
    token = tl.program_id(0)
    column = tl.program_id(1) * BN + tl.arange(0, BN)
    column_ok = column < N
    total = tl.zeros((BN,), tl.float32)
    for choice in range(TOP_K):
        route = token * TOP_K + choice
        slot = tl.load(slots + route)
        if slot >= 0:
            expert = _expert_of(slot, offsets, E, EP)
            w = down + expert * stride_e + column.to(tl.int64) * stride_n
            x = activated + route.to(tl.int64) * F
            part = _matrix_vector(w, column_ok, stride_k, x, F, BN, BK)
            if bias is not None:
                shift = tl.load(bias + expert * N + column, mask=column_ok, other=0)
                part += shift.to(tl.float32)
            if weights is not None:
                part *= tl.load(weights + route).to(tl.float32)
            total += part
    target = out + token.to(tl.int64) * N + column
    tl.store(target, total.to(out.dtype.element_ty), mask=column_ok)


@triton.jit
def _expert_of(slot, offsets, E: tl.constexpr, EP: tl.constexpr):
    """Return the expert (int64) whose rows hold `slot`: the number of ends at or before it."""
    lane = tl.arange(0, EP)
    ends = tl.load(offsets + lane, mask=lane < E, other=0)
    return tl.sum(((ends <= slot) & (lane < E)).to(tl.int32), axis=0).to(tl.int64)


@triton.jit
def _matrix_vector(w, w_mask, stride_k, x, WIDTH: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Return [BN] float32: the rows at `w` [BN pointers] times the vector at `x` [WIDTH]."""
    depth = tl.arange(0, BK)
    total = tl.zeros((BN, BK), tl.float32)
    for start in range(0, WIDTH, BK):
        place = start + depth
        inside = place < WIDTH
        tile = w[:, None] + place[None, :].to(tl.int64) * stride_k
        matrix = tl.load(tile, mask=w_mask[:, None] & inside[None, :], other=0).to(tl.float32)
        vector = tl.load(x + place, mask=inside, other=0).to(tl.float32)
        total += matrix * vector[None, :]
    return tl.sum(total, axis=1)


def experts_decode(*args: Any) -> Any:
    """Do what `experts_reference` does without `save`, for at most `MOST_ROUTES` routes.

    Source:
        ScatterMoE (Tan et al. 2024) section 3, reduced to one row per program.
    """
    call = ExpertsCall(*args)
    tokens, up, down = call.tokens, call.up, call.down
    routes = call.order.shape[0]
    if call.save or routes > MOST_ROUTES or 0 in (*up.shape, *down.shape):
        return NotImplemented
    if not serves(tokens, up, call.up_bias, down, call.down_bias):
        return NotImplemented
    (experts, h, d), (_, o, f), top_k = up.shape, down.shape, call.slots.shape[1]
    hidden = tokens.new_empty(0, h)
    out = tokens.new_empty(tokens.shape[0], o)
    if not routes:
        return out, hidden
    activated = torch.empty(routes, f, dtype=torch.float32, device=tokens.device)
    tokens, up_bias, down_bias, weights, slots = contiguous(
        tokens, call.up_bias, call.down_bias, call.weights, call.slots
    )
    shared = {"E": experts, "EP": triton.next_power_of_2(experts), "TOP_K": top_k, "F": f}
    bn, bk = weight_block(16, d, tokens.dtype)
    activate_kernel[(routes, triton.cdiv(h, bn))](
        tokens,
        up,
        up_bias,
        slots,
        call.offsets,
        activated,
        *up.stride(),
        **shared,
        D=d,
        ACT=FUSED.index(call.activation),
        GATED=call.gated,
        BN=bn,
        BK=bk,
    )
    bn, bk = weight_block(8, f, tokens.dtype)
    output_kernel[(tokens.shape[0], triton.cdiv(o, bn))](
        activated,
        down,
        down_bias,
        weights,
        slots,
        call.offsets,
        out,
        *down.stride(),
        **shared,
        N=o,
        BN=bn,
        BK=bk,
    )
    return out, hidden


def weight_block(rows: int, width: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return BN and BK: 16 KiB of weights at once, so that enough loads are in flight."""
    most = 16384 // (rows * dtype.itemsize)
    return rows, min(most, triton.next_power_of_2(width))
