"""The experts by torch's grouped matmul, with our gather, activation and combine around it.

Torch's kernel leaves rows past the last offset uninitialised, needs strides that are multiples of
16 bytes and has no float64; other calls are left to the reference.

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R = T * K rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.kernels.combine import route_values, row_weights
from moeify.kernels.elementwise import activate, activate_backward
from moeify.kernels.experts import BackwardCall, ExpertsCall
from moeify.kernels.operands import FLOATS
from moeify.kernels.precision import without_autocast


def experts(*args: Any) -> Any:
    """Do what `experts_reference` does for the sizes and dtypes that torch's kernel takes."""
    call = ExpertsCall(*args)
    tokens, up_bias, down_bias = call.tokens, call.up_bias, call.down_bias
    order, slots, offsets = call.order, call.slots, call.offsets
    if not _serves(tokens, call.up, call.down):
        return NotImplemented
    up, down = call.up.contiguous(), call.down.contiguous()
    unused = (order < 0)[:, None]
    with without_autocast(tokens):
        rows = torch.ops.moeify.dispatch(tokens, order, slots)
        hidden = _grouped(rows, up.transpose(1, 2), offsets, unused)
        owner = _owner(offsets, rows) if up_bias is not None or down_bias is not None else None
        if up_bias is not None and owner is not None:
            hidden += up_bias.index_select(0, owner).masked_fill(unused, 0)
        activated = activate(hidden, call.activation, call.gated)
        outputs = _grouped(activated, down.transpose(1, 2), offsets, unused)
        if down_bias is not None and owner is not None:
            outputs += down_bias.index_select(0, owner)
        out = torch.ops.moeify.combine(outputs, call.weights, order, slots)
    return out, hidden if call.save else hidden.new_empty(0, hidden.shape[1])


def experts_backward(*args: Any) -> Any:
    """Do what `experts_backward_reference` does for the same sizes and dtypes."""
    call = BackwardCall(*args)
    tokens, weights, down_bias = call.tokens, call.weights, call.down_bias
    order, slots, offsets = call.order, call.slots, call.offsets
    if not _serves(tokens, call.up, call.down):
        return NotImplemented
    ops, dtype = torch.ops.moeify, tokens.dtype
    up, down = call.up.contiguous(), call.down.contiguous()
    unused = (order < 0)[:, None]
    with without_autocast(tokens):
        grad_rows = ops.dispatch(call.grad.to(dtype), order, slots)
        activated = activate(call.hidden, call.activation, call.gated)
        grad_activated = _grouped(grad_rows, down, offsets, unused)
        grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias = (
            tokens.new_empty(0)
            for _ in range(6)  # outputs of an op may not be one tensor
        )
        if weights is not None and call.needs_weights:
            inner = (grad_activated.float() * activated.float()).sum(1)
            if down_bias is not None:
                bias_rows = down_bias.index_select(0, _owner(offsets, grad_rows)).float()
                inner += (grad_rows.float() * bias_rows).sum(1)
            grad_weights = route_values(inner, slots).to(weights.dtype)
        if weights is not None:
            scale = row_weights(weights, order, torch.float32)[:, None]
            grad_activated = (grad_activated.float() * scale).to(dtype)
            grad_rows = (grad_rows.float() * scale).to(dtype)
        grad_hidden = activate_backward(grad_activated, call.hidden, call.activation, call.gated)
        if call.needs_params:
            rows = ops.dispatch(tokens, order, slots)
            grad_down = _outer(grad_rows, activated, offsets)
            grad_up = _outer(grad_hidden, rows, offsets)
            if call.up_has_bias:
                grad_up_bias = _column_sums(grad_hidden, offsets)
            if down_bias is not None:
                grad_down_bias = _column_sums(grad_rows, offsets)
        if call.needs_tokens:
            grad_inputs = _grouped(grad_hidden, up, offsets, unused)
            grad_tokens = ops.combine(grad_inputs, None, order, slots)
    return grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias


def _serves(tokens: Tensor, up: Tensor, down: Tensor) -> bool:
    size = tokens.dtype.itemsize
    widths = (tokens.shape[1], up.shape[1], *down.shape[1:])
    aligned = all(width * size % 16 == 0 for width in widths)
    return aligned and tokens.dtype in FLOATS and tokens.dtype == up.dtype and tokens.shape[0] > 0


def _grouped(rows: Tensor, matrices: Tensor, offsets: Tensor, unused: Tensor) -> Tensor:
    """Return rows [R, A] times their expert's matrix [E, A, B]; zeros in unused rows."""
    return F.grouped_mm(rows, matrices, offs=offsets).masked_fill_(unused, 0)


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """Return [E, A, B]: each expert's rows of `left` [R, A] times those of `right` [R, B]."""
    return F.grouped_mm(left.t(), right, offs=offsets)


def _column_sums(rows: Tensor, offsets: Tensor) -> Tensor:
    """Return [E, A]: the sum of each expert's rows [R, A], in a fixed order."""
    _, sums = torch.ops.moeify.grouped_linear_backward(rows, rows[:, :1], offsets, True)
    total: Tensor = sums
    return total


def _owner(offsets: Tensor, rows: Tensor) -> Tensor:
    """Return [R]: the expert of each row; the last one for unused rows."""
    row = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, row, right=True).clamp_max(offsets.shape[0] - 1)
