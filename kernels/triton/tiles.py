"""Parts that the grouped Triton kernels share: tiles over ragged groups, products, activations.

A grouped kernel covers the expert-major buffer with row tiles that never cross an expert's border.
How many there are depends on the routing, which only the device knows; the grid covers the most
there can be, `row_tiles`, and each program finds its expert from the offsets. Tile numbers beyond
the last expert's cover the unused rows at the end of the buffer, for kernels that zero them.

Shapes: E experts, R rows, BM, BN, BK rows, columns and depth of a tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch
from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels.elementwise import FUSED
from moeify.kernels.operands import FLOATS
from moeify.kernels.triton.arithmetic import float32_precision

GELU: tl.constexpr = tl.constexpr(FUSED.index("gelu"))
GELU_TANH: tl.constexpr = tl.constexpr(FUSED.index("gelu_tanh"))
QUICK_GELU: tl.constexpr = tl.constexpr(FUSED.index("quick_gelu"))
SILU: tl.constexpr = tl.constexpr(FUSED.index("silu"))
RELU: tl.constexpr = tl.constexpr(FUSED.index("relu"))
RELU2: tl.constexpr = tl.constexpr(FUSED.index("relu2"))


def serves(first: Tensor, *others: Tensor | None) -> bool:
    """Tell whether the kernels compute with the dtype of `first` and all others have it too."""
    return first.dtype in FLOATS and all(x is None or x.dtype == first.dtype for x in others)


def row_tiles(rows: int, experts: int, block: int) -> int:
    """Return a bound on the row tiles of all experts, with those of the unused rows."""
    return -(-rows // block) + min(experts, rows)


def dot_precision(dtype: torch.dtype) -> str:
    """Return the `input_precision` of products of `dtype`."""
    return float32_precision() if dtype == torch.float32 else "ieee"


def processors(device: torch.device) -> int:
    """Return how many multiprocessors `device` has; a few for the interpreter."""
    if device.type != "cuda":
        return 4
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


@triton.jit
def find_tile(tile, offsets, E, EP: tl.constexpr, BM: tl.constexpr):
    """Return the expert of a row tile, its first row, and the end of that expert's rows.

    Tiles are numbered through all experts. Beyond the last one the expert is -1 and the first row
    counts on from the last expert's end. EP is the power of two that covers E.
    """
    lane = tl.arange(0, EP)
    ends = tl.load(offsets + lane, mask=lane < E, other=0)
    starts = tl.load(offsets + lane - 1, mask=(lane > 0) & (lane < E), other=0)
    tiles = (ends - starts + BM - 1) // BM
    last_tiles = tl.cumsum(tiles, axis=0)
    expert = tl.sum(((last_tiles <= tile) & (lane < E)).to(tl.int32), axis=0)
    total = tl.max(last_tiles, axis=0)
    end = tl.max(ends, axis=0)
    first = end + (tile - total) * BM
    if expert < E:
        here = lane == expert
        first = tl.sum(tl.where(here, starts + (tile - last_tiles + tiles) * BM, 0), axis=0)
        end = tl.sum(tl.where(here, ends, 0), axis=0)
    expert = tl.where(expert < E, expert, -1)
    return expert, first, end


@triton.jit
def order_tile(tile, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Return the row tile and column tile of a number: GROUP row tiles share a column tile.

    Neighbours then read the same weights, which stay in the L2 cache.
    """
    first = tile // (GROUP * n_tiles) * GROUP
    inside = tile % (GROUP * n_tiles)
    size = tl.minimum(m_tiles - first, GROUP)
    return first + inside % size, inside // size


@triton.jit
def multiply(
    x,
    x_mask,
    w,
    w_mask,
    stride_wk,
    WIDTH: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return `x @ w.T` [BM, BN] in float32, BK of the WIDTH at a time.

    `x` [BM] points to contiguous rows, `w` [BN] to the weight's rows, whose elements are
    `stride_wk` apart; masked rows count as zeros.
    """
    depth = tl.arange(0, BK)
    x_tile = x[:, None] + depth[None, :]
    w_tile = w[None, :] + depth[:, None].to(tl.int64) * stride_wk
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, WIDTH, BK):
        if WIDTH % BK == 0:
            left = tl.load(x_tile, mask=x_mask[:, None], other=0)
            right = tl.load(w_tile, mask=w_mask[None, :], other=0)
        else:
            inside = start + depth < WIDTH
            left = tl.load(x_tile, mask=x_mask[:, None] & inside[None, :], other=0)
            right = tl.load(w_tile, mask=w_mask[None, :] & inside[:, None], other=0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        x_tile += BK
        w_tile += BK * stride_wk
    return total


@triton.jit
def activate(x, ACT: tl.constexpr):
    """Return the activation of float32 `x`; ACT is its place in `elementwise.FUSED`."""
    if ACT == GELU:
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == GELU_TANH:
        return 0.5 * x * (1 + _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == QUICK_GELU:
        return x * _sigmoid(1.702 * x)
    elif ACT == SILU:
        return x * _sigmoid(x)
    elif ACT == RELU:
        return tl.where(x <= 0, 0.0, x)  # keeps NaN
    elif ACT == RELU2:
        return tl.where(x <= 0, 0.0, x * x)
    else:
        return x


@triton.jit
def activate_slope(x, ACT: tl.constexpr):
    """Return the derivative of the activation at float32 `x`."""
    if ACT == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACT == GELU_TANH:
        tanh = _tanh(0.7978845608028654 * (x + 0.044715 * x * x * x))
        inner = 0.7978845608028654 * (1 + 0.134145 * x * x)
        return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh * tanh) * inner
    elif ACT == QUICK_GELU:
        share = _sigmoid(1.702 * x)
        return share * (1 + 1.702 * x * (1 - share))
    elif ACT == SILU:
        share = _sigmoid(x)
        return share * (1 + x * (1 - share))
    elif ACT == RELU:
        return tl.where(x <= 0, 0.0, 1.0)
    elif ACT == RELU2:
        return tl.where(x <= 0, 0.0, 2 * x)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))
