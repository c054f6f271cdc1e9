"""`moeify::grouped_linear` and its parameter gradients in Triton.

One kernel computes `rows @ weight[e].T` tile by tile; the fused experts' second product is the same
kernel with the combine weight in its epilogue. The parameter gradient gives every program a tile of
one expert's gradient and walks over that expert's rows, so that nothing is added up by atomics.

Shapes: R rows, K input width, N output width, E experts; BM, BN, BK rows, columns, depth of a tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels.triton.tile_config import (
    TileConfig,
    bucket,
    choose,
    fitting_stages,
    shared_memory,
)
from moeify.kernels.triton.tiles import (
    dot_precision,
    find_tile,
    multiply,
    order_tile,
    processors,
    row_tiles,
    serves,
)


@triton.jit(do_not_specialize=["row_count", "m_tiles"])
def product_kernel(
    rows,
    weight,
    bias,
    row_weights,
    order,
    offsets,
    out,
    row_count,
    m_tiles,
    stride_e,
    stride_n,
    stride_k,
    E: tl.constexpr,
    EP: tl.constexpr,
    K: tl.constexpr,
    N: tl.constexpr,
    SCATTER: tl.constexpr,
    ZERO_TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Multiply each expert's rows [R, K] by its weight [N, K], add its bias, weight the rows.

    `row_weights` [R] by route and `order` [R] are None for the plain product. SCATTER stores row
    `order[r]` (top-1: the token) in place of row r; ZERO_TAIL zeros the unused rows.
    """
    n_tiles: tl.constexpr = (N + BN - 1) // BN
    tile = tl.program_id(0)
    while tile < m_tiles * n_tiles:
        m_tile, n_tile = order_tile(tile, m_tiles, n_tiles, GROUP)
        expert, first, end = find_tile(m_tile, offsets, E, EP, BM)
        row = first + tl.arange(0, BM)
        column = n_tile * BN + tl.arange(0, BN)
        column_ok = column < N
        if expert >= 0:
            row_ok = row < end
            w = weight + expert.to(tl.int64) * stride_e + column.to(tl.int64) * stride_n
            x = rows + row.to(tl.int64) * K
            total = multiply(x, row_ok, w, column_ok, stride_k, K, BM, BN, BK, PRECISION)
            if bias is not None:
                shift = tl.load(bias + expert * N + column, mask=column_ok, other=0)
                total += shift.to(tl.float32)[None, :]
            place = row
            if order is not None:
                route = tl.load(order + row, mask=row_ok, other=-1)
                row_ok = route >= 0
                if row_weights is not None:
                    scale = tl.load(row_weights + route, mask=row_ok, other=0).to(tl.float32)
                    total *= scale[:, None]
                if SCATTER:
                    place = route
            target = out + place.to(tl.int64)[:, None] * N + column[None, :]
            value = total.to(out.dtype.element_ty)
            tl.store(target, value, mask=row_ok[:, None] & column_ok[None, :])
        elif ZERO_TAIL:
            target = out + row.to(tl.int64)[:, None] * N + column[None, :]
            zeros = tl.zeros((BM, BN), out.dtype.element_ty)
            tl.store(target, zeros, mask=(row < row_count)[:, None] & column_ok[None, :])
        tile += tl.num_programs(0)


@triton.jit
def gradient_kernel(
    grad,
    rows,
    offsets,
    grad_weight,
    grad_bias,
    K: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Compute a [BN, BK] tile of one expert's weight gradient, `grad.T @ rows`, and its bias'."""
    expert = tl.program_id(1)
    n_tile, k_tile = order_tile(tl.program_id(0), tl.cdiv(N, BN), tl.cdiv(K, BK), 8)
    column = n_tile * BN + tl.arange(0, BN)
    depth = k_tile * BK + tl.arange(0, BK)
    column_ok = column < N
    depth_ok = depth < K
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    total = tl.zeros((BN, BK), tl.float32)
    for first in range(start, end, BM):
        row = first + tl.arange(0, BM)
        row_ok = row < end
        place = row.to(tl.int64)
        left = tl.load(
            grad + place[None, :] * N + column[:, None],
            mask=row_ok[None, :] & column_ok[:, None],
            other=0,
        )
        right = tl.load(
            rows + place[:, None] * K + depth[None, :],
            mask=row_ok[:, None] & depth_ok[None, :],
            other=0,
        )
        total = tl.dot(left, right, total, input_precision=PRECISION)
    line = expert.to(tl.int64) * N + column
    target = grad_weight + line[:, None] * K + depth[None, :]
    value = total.to(grad_weight.dtype.element_ty)
    tl.store(target, value, mask=column_ok[:, None] & depth_ok[None, :])
    if grad_bias is not None and k_tile == 0:
        shift = tl.zeros((BM, BN), tl.float32)
        for first in range(start, end, BM):
            row = first + tl.arange(0, BM)
            source = grad + row.to(tl.int64)[:, None] * N + column[None, :]
            part = tl.load(source, mask=(row < end)[:, None] & column_ok[None, :], other=0)
            shift += part.to(tl.float32)
        sums = tl.sum(shift, axis=0).to(grad_bias.dtype.element_ty)
        tl.store(grad_bias + line, sums, mask=column_ok)


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Any:
    """Do what `grouped_linear_reference` does, in float32, float16 or bfloat16.

    Offsets that decrease or pass the last row are not detected: checking would wait for the device.

    Source:
        MegaBlocks (Gale et al. 2022) section 5.1, with tiles found from the offsets.
    """
    if not serves(rows, weight, bias) or not weight.shape[0] == offsets.shape[0] > 0:
        return NotImplemented
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    if out.numel():
        product(rows.contiguous(), weight, bias, None, None, offsets, out, scatter=False)
    return out


def grouped_linear_backward(grad: Tensor, rows: Tensor, offsets: Tensor, with_bias: bool) -> Any:
    """Do what `grouped_linear_backward_reference` does, in float32, float16 or bfloat16.

    Source:
        MegaBlocks (Gale et al. 2022) section 5.1: the transposed products of the backward.
    """
    experts, n, k = offsets.shape[0], grad.shape[1], rows.shape[1]
    if not serves(grad, rows) or not k:
        return NotImplemented
    grad_weight = grad.new_empty(experts, n, k)
    grad_bias = grad.new_empty((experts, n) if with_bias else (0,))
    if not grad_weight.numel():
        return grad_weight, grad_bias.zero_()
    tile = gradient_tile(rows.shape[0], experts, grad)
    tiles = triton.cdiv(n, tile["BN"]) * triton.cdiv(k, tile["BK"])
    gradient_kernel[(tiles, experts)](
        grad.contiguous(),
        rows.contiguous(),
        offsets,
        grad_weight,
        grad_bias if with_bias else None,
        K=k,
        N=n,
        PRECISION=dot_precision(grad.dtype),
        **tile,
    )
    return grad_weight, grad_bias


def product(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_weights: Tensor | None,
    order: Tensor | None,
    offsets: Tensor,
    out: Tensor,
    *,
    scatter: bool,
) -> None:
    """Launch `product_kernel` on contiguous rows [R, K] into `out` [R, N], or [T, N] scattered."""
    count, experts, (n, k) = rows.shape[0], weight.shape[0], weight.shape[1:]
    config = choose(count, experts, n, k, rows.dtype, rows.device)
    m_tiles = row_tiles(count, experts, config.bm)
    product_kernel[(persistent_grid(m_tiles * triton.cdiv(n, config.bn), config, rows),)](
        rows,
        weight,
        None if bias is None else bias.contiguous(),
        row_weights,
        order,
        offsets,
        out,
        count,
        m_tiles,
        *weight.stride(),
        E=experts,
        EP=triton.next_power_of_2(experts),
        K=k,
        N=n,
        SCATTER=scatter,
        ZERO_TAIL=order is None,
        PRECISION=dot_precision(rows.dtype),
        **config.launch_options(),
    )


def persistent_grid(tiles: int, config: TileConfig, rows: Tensor) -> int:
    """Return how many programs share the tiles: as many as the device of `rows` holds at once."""
    resident = config.programs(rows.element_size(), shared_memory(rows.device))
    return min(tiles, processors(rows.device) * resident)


def gradient_tile(rows: int, experts: int, grad: Tensor) -> dict[str, int]:
    """Return tile sizes, warps and stages of `gradient_kernel`."""
    wide = grad.dtype == torch.float32
    side, step, stages = (64, 32, 3) if wide else (128, 64, 4)
    step = min(bucket(rows, experts), step)
    needed = 2 * side * step * grad.element_size()
    stages = fitting_stages(stages, needed, shared_memory(grad.device))
    return {"BM": step, "BN": side, "BK": side, "num_warps": 8, "num_stages": stages}
