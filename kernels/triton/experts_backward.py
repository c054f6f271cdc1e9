"""The backward of the fused experts in Triton: two matmuls for the inputs, two for the parameters.

The first matmul takes the gradient of a token straight to its rows and ends, in its epilogue, with
all that is known per hidden value: the weighted activation (for the down projection's gradient),
the gradient of the hidden values, and a row's share of its combine weight's gradient. Such shares
are summed in a fixed order afterwards, as are a token's rows: nothing is atomic, two runs are equal
bit by bit, and no kernel needs a number that only the device knows.

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R = T * K rows, B = cdiv(F, BN) blocks of F.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels import combine as _combine  # noqa: F401  registers the op
from moeify.kernels.elementwise import FUSED
from moeify.kernels.experts import BackwardCall
from moeify.kernels.operands import contiguous
from moeify.kernels.triton.experts_wgrad import bias_gradient, combine_gradient, weight_gradient
from moeify.kernels.triton.grouped_linear import product
from moeify.kernels.triton.tile_config import TileConfig, choose
from moeify.kernels.triton.tiles import (
    activate,
    activate_slope,
    dot_precision,
    find_tile,
    multiply,
    order_tile,
    row_tiles,
    serves,
)


def experts_backward(*args: Any) -> Any:
    """Do what `experts_backward_reference` does, in float32, float16 or bfloat16.

    Kept between the kernels: [R, H], [R, F] with `needs_params`, and [R, D] if K > 1.

    Source:
        The router's gradient without the experts' outputs, and the order of the epilogue: SonicMoE
        (Guo et al. 2025) section 3. Gather and scatter inside the matmuls: ScatterMoE (Tan et al.
        2024) section 3.
    """
    call = BackwardCall(*args)
    if not _serves(call):
        return NotImplemented
    # Parameters may have any strides.
    grad, tokens, weights = contiguous(call.grad.to(call.tokens.dtype), call.tokens, call.weights)
    call = call._replace(grad=grad, tokens=tokens, weights=weights)
    order, offsets, top_k = call.order, call.offsets, call.slots.shape[1]
    grad_hidden, activated, shares = _down_backward(call)
    grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias = (
        tokens.new_empty(0)
        for _ in range(6)  # outputs of an op may not be one tensor
    )
    if shares is not None:
        grad_weights = combine_gradient(shares, call.slots, grad, call.down_bias, offsets)
    if activated is not None:
        grad_down = weight_gradient(grad, activated, order, offsets, top_k, gathered="left")
        grad_up = weight_gradient(grad_hidden, tokens, order, offsets, top_k, gathered="right")
        if call.down_bias is not None:
            grad_down_bias = bias_gradient(grad, weights, order, offsets, top_k, gathered=True)
        if call.up_has_bias:
            grad_up_bias = bias_gradient(grad_hidden, None, order, offsets, top_k, gathered=False)
    if call.needs_tokens:
        grad_tokens = _up_backward(grad_hidden, call.up, order, call.slots, offsets)
    return grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias


def _serves(call: BackwardCall) -> bool:
    return (
        call.kernel not in ("reference", "grouped_mm")
        and call.activation in FUSED
        and serves(call.tokens, call.up, call.down, call.down_bias, call.hidden)
        and call.up.numel() > 0
        and call.down.numel() > 0
        and (call.weights is None or call.weights.dtype == torch.float32)
    )


def _down_backward(call: BackwardCall) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return grad_hidden [R, H], and if needed weighted activated [R, F] and shares [R, B].

    Unused rows of all three are left as they are: nothing reads them.
    """
    grad, hidden, down = call.grad, call.hidden.contiguous(), call.down
    rows, (experts, depth, width) = call.order.shape[0], down.shape
    config = down_backward_tile(rows, experts, width, depth, grad.dtype, grad.device)
    blocks = triton.cdiv(width, config.bn)
    grad_hidden = torch.empty_like(hidden)
    activated = hidden.new_empty(rows, width) if call.needs_params else None
    shares = None
    if call.needs_weights and call.weights is not None:
        shares = hidden.new_empty(rows, blocks, dtype=torch.float32)
    if rows:
        down_backward_kernel[(row_tiles(rows, experts, config.bm) * blocks,)](
            grad,
            call.weights,
            down,
            hidden,
            call.order,
            call.offsets,
            grad_hidden,
            activated,
            shares,
            *down.stride(),
            K=call.slots.shape[1],
            OUTPUT=depth,
            F=width,
            E=experts,
            EP=triton.next_power_of_2(experts),
            ACT=FUSED.index(call.activation),
            GATED=call.gated,
            PRECISION=dot_precision(grad.dtype),
            **config.launch_options(),
        )
    return grad_hidden, activated, shares


def _up_backward(
    grad_hidden: Tensor, up: Tensor, order: Tensor, slots: Tensor, offsets: Tensor
) -> Tensor:
    """Return the gradient of the tokens, [T, D]."""
    single = slots.shape[1] == 1  # rows go straight to their tokens; dropped tokens stay zero
    shape = (order.shape[0], up.shape[2])
    rows = up.new_zeros(shape) if single else up.new_empty(shape)
    if rows.numel():
        weight = up.transpose(1, 2)
        place = order if single else None
        product(grad_hidden, weight, None, None, place, offsets, rows, scatter=single)
    if single:
        return rows
    total: Tensor = torch.ops.moeify.combine(rows, None, order, slots)
    return total


def down_backward_tile(
    rows: int, experts: int, width: int, depth: int, dtype: torch.dtype, device: torch.device
) -> TileConfig:
    """Return the tile of the first product, no larger than its epilogue has registers for."""
    config = choose(rows, experts, width, depth, dtype, device)
    if width % 16 == depth % 16 == 0:
        return dataclasses.replace(config, bn=min(config.bn, 128))
    # Unaligned rows are read element by element, an address each.
    bm, bn, bk = min(config.bm, 64), min(config.bn, 64), min(config.bk, 32)
    return dataclasses.replace(config, bm=bm, bn=bn, bk=bk, warps=8 if bm == 64 else 4)


@triton.jit
def down_backward_kernel(
    grad,
    weights,
    down,
    hidden,
    order,
    offsets,
    grad_hidden,
    activated,
    shares,
    stride_e,
    stride_o,
    stride_f,
    K: tl.constexpr,
    OUTPUT: tl.constexpr,
    F: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One tile of BM rows and BN of F: the gradient of the activated values and all it leads to."""
    blocks: tl.constexpr = (F + BN - 1) // BN
    tile, block = order_tile(tl.program_id(0), tl.num_programs(0) // blocks, blocks, GROUP)
    expert, first, end = find_tile(tile, offsets, E, EP, BM)
    if expert >= 0:
        rows = first + tl.arange(0, BM)
        columns = block * BN + tl.arange(0, BN)
        route = tl.load(order + rows, mask=rows < end, other=-1)
        kept = route >= 0
        x = grad + (route // K).to(tl.int64) * OUTPUT
        w = down + expert.to(tl.int64) * stride_e + columns.to(tl.int64) * stride_f
        delta = multiply(x, kept, w, columns < F, stride_o, OUTPUT, BM, BN, BK, PRECISION)
        weight = tl.full((BM,), 1.0, tl.float32)
        if weights is not None:
            weight = tl.load(weights + route, mask=kept, other=0)
        base = first.to(tl.int64)
        hidden += base * (2 * F if GATED else F)
        grad_hidden += base * (2 * F if GATED else F)
        if activated is not None:
            activated += base * F
        height, column = end - first, block * BN
        share = _finish(
            delta, weight, hidden, grad_hidden, activated, height, column, F, ACT, GATED
        )
        if shares is not None:
            tl.store(shares + rows.to(tl.int64) * blocks + block, share, mask=rows < end)


@triton.jit
def _finish(
    delta,
    weight,
    hidden,
    grad_hidden,
    activated,
    height,
    column,
    F: tl.constexpr,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
):
    """Store what follows from the activated values' gradient; return each row's share.

    `delta` [BM, BN] is that gradient without the combine weight; `hidden`, `grad_hidden` and
    `activated` point to the tile's first row, of which `height` rows belong to the expert. Goes in
    pieces of 32 columns: the registers do not hold every value of a whole tile.
    """
    BM: tl.constexpr = delta.shape[0]
    BN: tl.constexpr = delta.shape[1]
    if BN > 32:
        half: tl.constexpr = BN // 2
        one, two = tl.split(tl.permute(tl.reshape(delta, (BM, 2, half)), (0, 2, 1)))
        share = _finish(one, weight, hidden, grad_hidden, activated, height, column, F, ACT, GATED)
        column += half
        share += _finish(two, weight, hidden, grad_hidden, activated, height, column, F, ACT, GATED)
    else:
        row = tl.arange(0, BM)[:, None]
        columns = column + tl.arange(0, BN)[None, :]
        mask = (row < height) & (columns < F)
        place = row * (2 * F if GATED else F) + columns
        gate = tl.load(hidden + place, mask=mask, other=0).to(tl.float32)
        gate_value = activate(gate, ACT)
        value = gate_value
        if GATED:
            linear = tl.load(hidden + F + place, mask=mask, other=0).to(tl.float32)
            value *= linear
        share = tl.sum(delta * value, axis=1)
        delta *= weight[:, None]
        if activated is not None:
            value = (value * weight[:, None]).to(activated.dtype.element_ty)
            tl.store(activated + row * F + columns, value, mask=mask)
        if GATED:
            grad_linear = (delta * gate_value).to(grad_hidden.dtype.element_ty)
            tl.store(grad_hidden + F + place, grad_linear, mask=mask)
            delta *= linear
        delta *= activate_slope(gate, ACT)
        tl.store(grad_hidden + place, delta.to(grad_hidden.dtype.element_ty), mask=mask)
    return share
