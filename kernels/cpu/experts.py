"""The fused experts on a CPU: C++ for float32, and for bfloat16 where experts have few rows.

bfloat16 with more rows goes expert by expert through torch's matmul, which reaches the processor's
own bfloat16 units (AMX, AVX512-BF16), into buffers that are used again for the next expert; the
elementwise work between the matmuls is one C++ call each.

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R = T * K rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moeify.errors import DispatchError
from moeify.kernels import experts_grouped_mm
from moeify.kernels.cpu.compile import address, floats, function, library
from moeify.kernels.elementwise import FUSED

FEW = 3
"""Mean rows per expert up to which bfloat16 is bound by reading weights, and C++ is ahead."""

_PANEL = 64
"""Upper bound of the rows in one of the C++ panels, whatever the vector width."""

_UNSOUND = (
    "offsets, order or slots do not fit: offsets must not decrease and not pass the last row, "
    "order and slots must name routes and rows that exist"
)

_ROWS = 256
"""Rows of one expert that the backward takes at a time."""


@functools.cache
def _forward(dtype: torch.dtype) -> Any:
    symbol = {torch.float32: "experts_float", torch.bfloat16: "experts_bfloat16"}[dtype]
    return function("experts", symbol, "p" * 14 + "l" * 6 + "ii")


@functools.cache
def _library(symbol: str, arguments: str) -> Any:
    return function("experts_backward", symbol, arguments)


def experts(
    tokens: Tensor,
    weights: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    activation: str,
    gated: bool,
    save: bool,
    kernel: str,
) -> Any:
    """Run `experts.experts_reference`; see there for arguments and results.

    Serves float32 and bfloat16 tensors of one dtype where a C++ compiler is at hand.
    """
    if kernel == "grouped_mm":
        return experts_grouped_mm.experts(
            tokens, weights, up, up_bias, down, down_bias, order, slots, offsets, activation,
            gated, save, kernel,
        )  # fmt: skip
    parts = (tokens, up, up_bias, down, down_bias)
    if kernel == "reference" or not _serves(tokens, weights, parts):
        return NotImplemented
    tokens, up, down = tokens.contiguous(), up.contiguous(), down.contiguous()
    down_bias = None if down_bias is None else down_bias.contiguous()
    up_bias = None if up_bias is None else up_bias.contiguous()
    (count, d_in), top_k = tokens.shape, slots.shape[1]
    number, d_out, d_ff = down.shape
    rows = count * top_k
    out = tokens.new_empty(count, d_out)
    hidden = tokens.new_empty(rows if save else 0, up.shape[1])
    if rows == 0:
        return out, hidden
    weights = None if weights is None else weights.contiguous()
    if tokens.dtype == torch.bfloat16 and (save or rows > FEW * min(number, rows)):
        return _by_matmul(
            tokens,
            weights,
            up,
            up_bias,
            down,
            down_bias,
            order,
            slots,
            offsets,
            activation,
            gated,
            save,
        )
    room = min(rows + _PANEL, 4 * _PANEL)
    scratch = floats(room * (d_in + d_ff) + (rows * d_out if top_k > 1 else 0))
    start = scratch.data_ptr()
    sound = _forward(tokens.dtype)(
        tokens.data_ptr(),
        address(weights),
        up.data_ptr(),
        address(up_bias),
        down.data_ptr(),
        address(down_bias),
        order.data_ptr(),
        slots.data_ptr(),
        offsets.data_ptr(),
        out.data_ptr(),
        hidden.data_ptr() if save else None,
        start + 4 * room * (d_in + d_ff),
        start,
        start + 4 * room * d_in,
        count,
        d_in,
        d_ff,
        d_out,
        number,
        top_k,
        FUSED.index(activation),
        gated,
    )
    if not sound:
        raise DispatchError(_UNSOUND)
    return out, hidden


def experts_backward(
    grad: Tensor,
    tokens: Tensor,
    weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    hidden: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    activation: str,
    gated: bool,
    up_has_bias: bool,
    needs_tokens: bool,
    needs_weights: bool,
    needs_params: bool,
    kernel: str,
) -> Any:
    """Run `experts.experts_backward_reference`; see there for arguments and results."""
    if kernel == "grouped_mm":
        return experts_grouped_mm.experts_backward(
            grad, tokens, weights, up, down, down_bias, hidden, order, slots, offsets, activation,
            gated, up_has_bias, needs_tokens, needs_weights, needs_params, kernel,
        )  # fmt: skip
    parts = (tokens, up, None, down, down_bias)
    if kernel == "reference" or not _serves(tokens, weights, parts):
        return NotImplemented
    grad = grad.to(tokens.dtype).contiguous()
    tokens, up, down = tokens.contiguous(), up.contiguous(), down.contiguous()
    down_bias = None if down_bias is None else down_bias.contiguous()
    weights = None if weights is None else weights.contiguous()
    with_down_bias = down_bias is not None
    grads = (
        torch.empty_like(tokens) if needs_tokens else tokens.new_empty(0),
        torch.empty_like(weights) if weights is not None and needs_weights else tokens.new_empty(0),
        torch.empty_like(up) if needs_params else tokens.new_empty(0),
        up.new_empty(up.shape[:2]) if needs_params and up_has_bias else tokens.new_empty(0),
        torch.empty_like(down) if needs_params else tokens.new_empty(0),
        down.new_empty(down.shape[:2]) if needs_params and with_down_bias else tokens.new_empty(0),
    )
    (count, d_in), top_k, width = tokens.shape, slots.shape[1], up.shape[1]
    number, d_out, d_ff = down.shape
    rows = count * top_k
    if rows == 0:
        for each in grads:
            each.zero_()
        return grads
    if tokens.dtype == torch.bfloat16:
        return _backward_by_matmul(
            grads, grad, tokens, weights, up, down, down_bias, hidden, order, slots, offsets,
            activation, gated,
        )  # fmt: skip
    chunk = min(_ROWS, rows)
    padded = 2 * d_in + d_out + d_ff + width + 4 * 16 + 48
    longest = max(d_out, width, chunk)
    back = floats(rows * d_in if needs_tokens and top_k > 1 else 0)
    inner = floats(rows)
    scratch = floats(chunk * padded)
    blocks = floats(torch.get_num_threads() * longest * 48)
    _library("experts_backward", "p" * 20 + "l" * 8 + "ii")(
        *(address(t) for t in (grad, tokens, weights, up, down, down_bias, hidden)),
        *(address(t) for t in (order, slots, offsets)),
        *(address(t) if t.numel() else None for t in grads),
        *(address(t) for t in (back, inner, scratch, blocks)),
        count,
        d_in,
        d_ff,
        d_out,
        number,
        top_k,
        chunk,
        longest,
        FUSED.index(activation),
        gated,
    )
    return grads


def _serves(tokens: Tensor, weights: Tensor | None, parts: tuple[Tensor | None, ...]) -> bool:
    dtype = tokens.dtype
    if dtype not in (torch.float32, torch.bfloat16) or tokens.device.type != "cpu":
        return False
    if any(part is not None and part.dtype != dtype for part in parts):
        return False
    if weights is not None and weights.dtype != torch.float32:
        return False
    return _forward(dtype) is not None and library("experts_backward") is not None


def _groups(offsets: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        if not start <= end <= rows:
            raise DispatchError(_UNSOUND)
        if end > start:
            yield expert, start, end
        start = end


def _longest(offsets: Tensor) -> int:
    return int(torch.diff(offsets, prepend=offsets.new_zeros(1)).max())


def _by_matmul(
    tokens: Tensor,
    weights: Tensor | None,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    activation: str,
    gated: bool,
    save: bool,
) -> tuple[Tensor, Tensor]:
    """Forward in bfloat16 by torch's matmul, one expert after the other."""
    act = _library("activate_bfloat16", "pp" + "ll" + "ii")
    rows = torch.ops.moeify.dispatch(tokens, order, slots)
    longest, width, d_ff = _longest(offsets), up.shape[1], down.shape[2]
    hidden = tokens.new_empty(rows.shape[0] if save else longest, width)
    active = tokens.new_empty(longest, d_ff)
    returned = tokens.new_empty(rows.shape[0], down.shape[1])
    number, end = FUSED.index(activation), 0
    for expert, start, end in _groups(offsets, order.shape[0]):
        size = end - start
        h = hidden[start:end] if save else hidden[:size]
        _affine(rows[start:end], up[expert], up_bias, expert, h)
        act(h.data_ptr(), active.data_ptr(), size, d_ff, number, gated)
        _affine(active[:size], down[expert], down_bias, expert, returned[start:end])
    if save:
        hidden[end:].zero_()
    out = torch.ops.moeify.combine(returned, weights, order, slots)
    return out, hidden if save else hidden.new_empty(0, width)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias[expert], x, weight.t(), out=out)


def _backward_by_matmul(
    grads: tuple[Tensor, ...],
    grad: Tensor,
    tokens: Tensor,
    weights: Tensor | None,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    hidden: Tensor,
    order: Tensor,
    slots: Tensor,
    offsets: Tensor,
    activation: str,
    gated: bool,
) -> tuple[Tensor, ...]:
    """Backward in bfloat16 by torch's matmul, one expert after the other."""
    slopes = _library("slopes_bfloat16", "ppppp" + "ll" + "ii")
    grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias = grads
    ops = torch.ops.moeify
    grad_rows = ops.dispatch(grad, order, slots)
    row_weights = None
    if weights is not None:
        row_weights = weights.flatten().index_select(0, order.clamp_min(0))
    params = grad_up.numel() > 0
    rows = ops.dispatch(tokens, order, slots) if params else grad_rows
    longest, width, d_ff = _longest(offsets), up.shape[1], down.shape[2]
    active, grad_hidden = tokens.new_empty(longest, d_ff), tokens.new_empty(longest, width)
    inner = floats(order.shape[0])
    back = tokens.new_empty(order.shape[0], tokens.shape[1]) if grad_tokens.numel() else None
    number, full = FUSED.index(activation), set()
    for expert, start, end in _groups(offsets, order.shape[0]):
        full.add(expert)
        size = end - start
        a, gh, go = active[:size], grad_hidden[:size], grad_rows[start:end]
        torch.mm(go, down[expert], out=a)
        slopes(
            hidden[start:end].data_ptr(),
            a.data_ptr(),
            gh.data_ptr(),
            None if row_weights is None else row_weights[start:end].data_ptr(),
            inner[start:end].data_ptr(),
            size,
            d_ff,
            number,
            gated,
        )
        if down_bias is not None:
            inner[start:end] += (go @ down_bias[expert]).float()
        if back is not None:
            torch.mm(gh, up[expert], out=back[start:end])
        if params:
            torch.mm(go.t(), a, out=grad_down[expert])
            torch.mm(gh.t(), rows[start:end], out=grad_up[expert])
            if grad_up_bias.numel():
                torch.sum(gh, dim=0, out=grad_up_bias[expert])
            if grad_down_bias.numel():
                share = go if row_weights is None else go * row_weights[start:end, None]
                grad_down_bias[expert] = share.sum(0)
    for each in (grad_up, grad_up_bias, grad_down, grad_down_bias):
        if each.numel():
            for expert in set(range(offsets.shape[0])) - full:
                each[expert].zero_()
    if back is not None:
        grad_tokens = ops.combine(back, None, order, slots)
    if grad_weights.numel():
        picked = inner.index_select(0, slots.flatten().clamp_min(0)).view(slots.shape)
        grad_weights = picked.masked_fill(slots < 0, 0)
    return grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias
