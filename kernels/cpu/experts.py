"""The fused experts on a CPU: C++ for float32, and for bfloat16 where experts have few rows.

bfloat16 with more rows goes expert by expert through torch's matmul, which reaches the processor's
own bfloat16 units (AMX, AVX512-BF16), into buffers that are used again for the next expert; the
elementwise work between the matmuls is one C++ call each.

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R = T * K rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.errors import DispatchError
from moeify.kernels import experts_grouped_mm
from moeify.kernels.combine import route_values, row_weights
from moeify.kernels.cpu.compile import address, floats, function, library
from moeify.kernels.elementwise import FUSED
from moeify.kernels.experts import BackwardCall, ExpertsCall
from moeify.kernels.grouped_linear import expert_groups
from moeify.kernels.operands import contiguous
from moeify.kernels.registry import never_traced

FEW = 3
"""Mean rows per expert up to which bfloat16 is bound by reading weights, and C++ is ahead."""

_PANEL = 64
"""Upper bound of the rows in one of the C++ panels, whatever the vector width."""

_ROWS = 256
"""Rows of one expert that the backward takes at a time."""


@never_traced
def experts(*args: Any) -> Any:
    """Do what `experts_reference` does, in float32 and bfloat16, where there is a C++ compiler."""
    call = ExpertsCall(*args)
    if call.kernel == "grouped_mm":
        return experts_grouped_mm.experts(*args)
    if not _serves(call, call.up_bias):
        return NotImplemented
    call = ExpertsCall(*contiguous(*call))
    if call.slots.numel() == 0:
        out = call.tokens.new_empty(call.tokens.shape[0], call.down.shape[1])
        return out, call.tokens.new_empty(0, call.up.shape[1])
    routes, number = call.slots.numel(), call.down.shape[0]
    bfloat16 = call.tokens.dtype == torch.bfloat16
    if bfloat16 and (call.save or routes > FEW * min(number, routes)):
        return _by_matmul(call)
    return _by_panels(call)


@never_traced
def experts_backward(*args: Any) -> Any:
    """Do what `experts_backward_reference` does, for what `experts` serves."""
    call = BackwardCall(*args)
    if call.kernel == "grouped_mm":
        return experts_grouped_mm.experts_backward(*args)
    if not _serves(call, None):
        return NotImplemented
    call = BackwardCall(*contiguous(call.grad.to(call.tokens.dtype), *call[1:]))
    grads = call.new_gradients()
    if call.slots.numel() == 0:
        for grad in grads:
            grad.zero_()
        return grads
    if call.tokens.dtype == torch.bfloat16:
        return _backward_by_matmul(call, grads)
    _backward_by_panels(call, grads)
    return grads


def _serves(call: ExpertsCall | BackwardCall, up_bias: Tensor | None) -> bool:
    tokens, weights = call.tokens, call.weights
    dtype = tokens.dtype
    if call.kernel == "reference" or tokens.device.type != "cpu":
        return False
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    params = (call.up, up_bias, call.down, call.down_bias)
    if any(param is not None and param.dtype != dtype for param in params):
        return False
    if weights is not None and weights.dtype != torch.float32:
        return False
    return library("experts") is not None and library("experts_backward") is not None


def _by_panels(call: ExpertsCall) -> tuple[Tensor, Tensor]:
    """Run the forward in C++."""
    (count, d_in), top_k = call.tokens.shape, call.slots.shape[1]
    number, d_out, d_ff = call.down.shape
    rows = count * top_k
    out = call.tokens.new_empty(count, d_out)
    hidden = call.tokens.new_empty(rows if call.save else 0, call.up.shape[1])
    symbol = "experts_float" if call.tokens.dtype == torch.float32 else "experts_bfloat16"
    room = min(rows + _PANEL, 4 * _PANEL)
    scratch = floats(room * (d_in + d_ff) + (rows * d_out if top_k > 1 else 0))
    start = scratch.data_ptr()
    sound = function("experts", symbol, "p" * 14 + "l" * 6 + "ii")(
        *(address(tensor) for tensor in call[:9]),
        out.data_ptr(),
        hidden.data_ptr() if call.save else None,
        start + 4 * room * (d_in + d_ff),
        start,
        start + 4 * room * d_in,
        count,
        d_in,
        d_ff,
        d_out,
        number,
        top_k,
        FUSED.index(call.activation),
        call.gated,
    )
    if not sound:
        raise DispatchError(
            "offsets, order or slots do not fit: offsets must not decrease and not pass the last "
            "row, order and slots must name routes and rows that exist"
        )
    return out, hidden


def _backward_by_panels(call: BackwardCall, grads: tuple[Tensor, ...]) -> None:
    """Run the backward in C++, into `grads`."""
    (count, d_in), top_k, width = call.tokens.shape, call.slots.shape[1], call.up.shape[1]
    number, d_out, d_ff = call.down.shape
    rows = count * top_k
    chunk = min(_ROWS, rows)
    padded = 2 * d_in + d_out + d_ff + width + 4 * 16 + 48
    longest = max(d_out, width, chunk)
    grad_rows = floats(rows * d_in if call.needs_tokens and top_k > 1 else 0)
    inner = floats(rows)
    scratch = floats(chunk * padded)
    blocks = floats(torch.get_num_threads() * longest * 48)
    function("experts_backward", "experts_backward", "p" * 20 + "l" * 8 + "ii")(
        *(address(tensor) for tensor in call[:10]),
        *(address(grad) if grad.numel() else None for grad in grads),
        *(address(buffer) for buffer in (grad_rows, inner, scratch, blocks)),
        count,
        d_in,
        d_ff,
        d_out,
        number,
        top_k,
        chunk,
        longest,
        FUSED.index(call.activation),
        call.gated,
    )


def _by_matmul(call: ExpertsCall) -> tuple[Tensor, Tensor]:
    """Run the forward in bfloat16 by torch's matmul, one expert after the other."""
    activate = function("experts_backward", "activate_bfloat16", "pp" + "ll" + "ii")
    rows = torch.ops.moeify.dispatch(call.tokens, call.order, call.slots)
    longest, width, d_ff = _longest(call.offsets), call.up.shape[1], call.down.shape[2]
    hidden = call.tokens.new_empty(rows.shape[0] if call.save else longest, width)
    active = call.tokens.new_empty(longest, d_ff)
    outputs = call.tokens.new_empty(rows.shape[0], call.down.shape[1])
    number, end = FUSED.index(call.activation), 0
    for expert, start, end in expert_groups(call.offsets, call.order.shape[0]):
        size = end - start
        h = hidden[start:end] if call.save else hidden[:size]
        _affine(rows[start:end], call.up[expert], call.up_bias, expert, h)
        activate(h.data_ptr(), active.data_ptr(), size, d_ff, number, call.gated)
        _affine(active[:size], call.down[expert], call.down_bias, expert, outputs[start:end])
    if call.save:
        hidden[end:].zero_()
    out = torch.ops.moeify.combine(outputs, call.weights, call.order, call.slots)
    return out, hidden if call.save else hidden.new_empty(0, width)


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias[expert], x, weight.t(), out=out)


def _backward_by_matmul(call: BackwardCall, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Run the backward in bfloat16 by torch's matmul, one expert after the other."""
    slopes = function("experts_backward", "slopes_bfloat16", "ppppp" + "ll" + "ii")
    grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias = grads
    ops, tokens, order, slots = torch.ops.moeify, call.tokens, call.order, call.slots
    grad_rows = ops.dispatch(call.grad, order, slots)
    scale = None if call.weights is None else row_weights(call.weights, order, torch.float32)
    params = grad_up.numel() > 0
    rows = ops.dispatch(tokens, order, slots) if params else grad_rows
    longest, width, d_ff = _longest(call.offsets), call.up.shape[1], call.down.shape[2]
    active, grad_hidden = tokens.new_empty(longest, d_ff), tokens.new_empty(longest, width)
    inner = floats(order.shape[0])
    grad_inputs = tokens.new_empty(order.shape[0], tokens.shape[1]) if grad_tokens.numel() else None
    number, busy = FUSED.index(call.activation), set()
    for expert, start, end in expert_groups(call.offsets, order.shape[0]):
        busy.add(expert)
        size = end - start
        a, gh, go = active[:size], grad_hidden[:size], grad_rows[start:end]
        torch.mm(go, call.down[expert], out=a)
        slopes(
            *(address(t) for t in (call.hidden[start:end], a, gh)),
            None if scale is None else scale[start:end].data_ptr(),
            inner[start:end].data_ptr(),
            size,
            d_ff,
            number,
            call.gated,
        )
        if call.down_bias is not None:
            inner[start:end] += (go @ call.down_bias[expert]).float()
        if grad_inputs is not None:
            torch.mm(gh, call.up[expert], out=grad_inputs[start:end])
        if params:
            torch.mm(go.t(), a, out=grad_down[expert])
            torch.mm(gh.t(), rows[start:end], out=grad_up[expert])
            if grad_up_bias.numel():
                torch.sum(gh, dim=0, out=grad_up_bias[expert])
            if grad_down_bias.numel():
                share = go if scale is None else go * scale[start:end, None]
                grad_down_bias[expert] = share.sum(0)
    for grad in grads[2:]:
        if grad.numel():
            for expert in set(range(call.offsets.shape[0])) - busy:
                grad[expert].zero_()
    if grad_inputs is not None:
        grad_tokens = ops.combine(grad_inputs, None, order, slots)
    if grad_weights.numel():
        grad_weights = route_values(inner, slots)
    return grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias


def _longest(offsets: Tensor) -> int:
    return int(torch.diff(offsets, prepend=offsets.new_zeros(1)).max())
