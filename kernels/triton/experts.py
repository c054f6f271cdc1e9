"""`moeify::experts` in Triton: two grouped products and, above top-1, a gathering sum.

The first product gathers its rows in the load; bias, activation and gating are its epilogue. Gate
and up columns alternate within a tile, so that both halves of a gated pair meet in one thread. The
second product weights its rows; with top-1 they go straight to their tokens, else a last kernel
sums each token's rows, in a fixed order and without atomics.

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R = T * K rows; BM, BN, BK rows, columns, depth of a tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels.elementwise import FUSED
from moeify.kernels.experts import ExpertsCall
from moeify.kernels.triton.experts_decode import experts_decode
from moeify.kernels.triton.grouped_linear import persistent_grid, product
from moeify.kernels.triton.tile_config import choose
from moeify.kernels.triton.tiles import (
    activate,
    dot_precision,
    find_tile,
    multiply,
    order_tile,
    row_tiles,
    serves,
)


@triton.jit(do_not_specialize=["row_count", "m_tiles"])
def up_kernel(
    tokens,
    up,
    bias,
    order,
    offsets,
    activated,
    hidden,
    row_count,
    m_tiles,
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
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gather tokens, project them up, activate: activated [R, F], and hidden [R, H] if not None.

    Unused rows of `hidden` become zeros; those of `activated` are left as they are.
    """
    H: tl.constexpr = 2 * F if GATED else F
    HALF: tl.constexpr = BN // 2
    STEP: tl.constexpr = HALF if GATED else BN  # features of a tile
    APART: tl.constexpr = F if GATED else HALF  # from a column of the first half to its partner
    n_tiles: tl.constexpr = (F + STEP - 1) // STEP
    tile = tl.program_id(0)
    while tile < m_tiles * n_tiles:
        m_tile, n_tile = order_tile(tile, m_tiles, n_tiles, GROUP)
        expert, first, end = find_tile(m_tile, offsets, E, EP, BM)
        row = first + tl.arange(0, BM)
        left = n_tile * STEP + tl.arange(0, HALF)
        left_ok = left < F
        right = left + APART
        right_ok = left_ok if GATED else right < F
        place = tl.arange(0, BM)[:, None]
        if expert >= 0:
            row_ok = row < end
            route = tl.load(order + row, mask=row_ok, other=-1)
            x = tokens + (route // TOP_K).to(tl.int64) * D
            lane = tl.arange(0, BN)
            column = n_tile * STEP + lane // 2 + lane % 2 * APART
            column_ok = n_tile * STEP + lane // 2 < F if GATED else column < F
            w = up + expert.to(tl.int64) * stride_e + column.to(tl.int64) * stride_n
            total = multiply(x, route >= 0, w, column_ok, stride_k, D, BM, BN, BK, PRECISION)
            a, b = tl.split(tl.reshape(total, (BM, HALF, 2)))
            if bias is not None:
                a += tl.load(bias + expert * H + left, mask=left_ok, other=0).to(tl.float32)
                b += tl.load(bias + expert * H + right, mask=right_ok, other=0).to(tl.float32)
            keep_left = row_ok[:, None] & left_ok[None, :]
            keep_right = row_ok[:, None] & right_ok[None, :]
            if hidden is not None:
                target = hidden + first.to(tl.int64) * H + place * H
                tl.store(target + left, a.to(hidden.dtype.element_ty), mask=keep_left)
                tl.store(target + right, b.to(hidden.dtype.element_ty), mask=keep_right)
            target = activated + first.to(tl.int64) * F + place * F
            if GATED:
                a = activate(a, ACT) * b
            else:
                a = activate(a, ACT)
                b = activate(b, ACT).to(activated.dtype.element_ty)
                tl.store(target + right, b, mask=keep_right)
            tl.store(target + left, a.to(activated.dtype.element_ty), mask=keep_left)
        elif hidden is not None:
            unused = (row < row_count)[:, None]
            target = hidden + first.to(tl.int64) * H + place * H
            zeros = tl.zeros((BM, HALF), hidden.dtype.element_ty)
            tl.store(target + left, zeros, mask=unused & left_ok[None, :])
            tl.store(target + right, zeros, mask=unused & right_ok[None, :])
        tile += tl.num_programs(0)


@triton.jit
def sum_kernel(rows, slots, out, TOP_K: tl.constexpr, WIDTH: tl.constexpr, BO: tl.constexpr):
    """Sum each token's rows [R, WIDTH] in float32; a dropped route adds nothing."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BO + tl.arange(0, BO)
    column_ok = column < WIDTH
    total = tl.zeros((BO,), tl.float32)
    for choice in tl.static_range(TOP_K):
        slot = tl.load(slots + token * TOP_K + choice).to(tl.int64)
        row = rows + slot * WIDTH + column
        total += tl.load(row, mask=column_ok & (slot >= 0), other=0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=column_ok)


def experts(*args: Any) -> Any:
    """Do what `experts_reference` does, in float32, float16 or bfloat16.

    Source:
        ScatterMoE (Tan et al. 2024) section 3: gather in the load; SonicMoE (Guo et al. 2025)
        section 4: activation in the epilogue, gather and sum in place of a scatter.
    """
    call = ExpertsCall(*args)
    tokens, down, slots = call.tokens, call.down, call.slots
    if not serves(tokens, call.up, call.up_bias, down, call.down_bias):
        return NotImplemented
    if 0 in (*call.up.shape, *down.shape):
        return NotImplemented
    # A route at a time reads an expert's weights once per route: only while few routes share one.
    if not call.save and call.order.shape[0] <= call.offsets.shape[0]:
        result = experts_decode(*args)
        if result is not NotImplemented:
            return result
    rows, top_k, width = call.order.shape[0], slots.shape[1], down.shape[1]
    hidden = tokens.new_empty(rows if call.save else 0, call.up.shape[1])
    if not rows:
        return tokens.new_zeros(tokens.shape[0], width), hidden
    activated = _project_up(call, hidden)
    weights = None if call.weights is None else call.weights.contiguous()
    factors = (activated, down, call.down_bias, weights, call.order, call.offsets)
    if top_k == 1:
        out = tokens.new_zeros(tokens.shape[0], width)
        product(*factors, out, scatter=True)
        return out, hidden
    weighted = tokens.new_empty(rows, width)
    product(*factors, weighted, scatter=False)
    out = tokens.new_empty(tokens.shape[0], width)
    block = min(triton.next_power_of_2(width), 1024)
    sum_kernel[(tokens.shape[0], triton.cdiv(width, block))](
        weighted, slots.contiguous(), out, TOP_K=top_k, WIDTH=width, BO=block
    )
    return out, hidden


def lean_epilogue(activation: str, gated: bool) -> bool:
    """Tell whether `up_kernel` would spill with the largest tiles."""
    return activation == "gelu" or not gated


def _project_up(call: ExpertsCall, hidden: Tensor) -> Tensor:
    """Launch `up_kernel`; return activated [R, F] and fill `hidden` [R, H] if it has rows."""
    tokens, up, (experts, n, k) = call.tokens, call.up, call.up.shape
    rows, features = call.order.shape[0], call.down.shape[2]
    activated = tokens.new_empty(rows, features)
    lean = lean_epilogue(call.activation, call.gated)
    config = choose(rows, experts, n, k, tokens.dtype, tokens.device, lean=lean)
    m_tiles = row_tiles(rows, experts, config.bm)
    up_kernel[(persistent_grid(m_tiles * triton.cdiv(n, config.bn), config, tokens),)](
        tokens.contiguous(),
        up,
        None if call.up_bias is None else call.up_bias.contiguous(),
        call.order,
        call.offsets,
        activated,
        hidden if hidden.shape[0] else None,
        rows,
        m_tiles,
        *up.stride(),
        E=experts,
        EP=triton.next_power_of_2(experts),
        TOP_K=call.slots.shape[1],
        D=k,
        F=features,
        ACT=FUSED.index(call.activation),
        GATED=call.gated,
        PRECISION=dot_precision(tokens.dtype),
        **config.launch_options(),
    )
    return activated
