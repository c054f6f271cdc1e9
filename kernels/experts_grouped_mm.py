"""The experts by torch's grouped matmul, with our gather, activation and combine around it.

Torch's kernel leaves rows past the last offset uninitialised, wants strides of whole 16 bytes and
has no float64; what it does not take is left to others.

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R = T * K rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.kernels.elementwise import activate, activate_backward
from moeify.kernels.precision import without_autocast


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
    """Run `experts.experts_reference`; see there for arguments and results."""
    if not _serves(tokens, up, down):
        return NotImplemented
    up, down = up.contiguous(), down.contiguous()
    unused = (order < 0)[:, None]
    with without_autocast(tokens):
        rows = torch.ops.moeify.dispatch(tokens, order, slots)
        hidden = _grouped(rows, up.transpose(1, 2), offsets, unused)
        owner = _owner(offsets, rows) if up_bias is not None or down_bias is not None else None
        if up_bias is not None and owner is not None:
            hidden += up_bias.index_select(0, owner).masked_fill(unused, 0)
        activated = activate(hidden, activation, gated)
        returned = _grouped(activated, down.transpose(1, 2), offsets, unused)
        if down_bias is not None and owner is not None:
            returned += down_bias.index_select(0, owner)
        out = torch.ops.moeify.combine(returned, weights, order, slots)
    return out, hidden if save else hidden.new_empty(0, hidden.shape[1])


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
    if not _serves(tokens, up, down):
        return NotImplemented
    ops, dtype = torch.ops.moeify, tokens.dtype
    up, down = up.contiguous(), down.contiguous()
    unused = (order < 0)[:, None]
    with without_autocast(tokens):
        grad_rows = ops.dispatch(grad.to(dtype), order, slots)
        activated = activate(hidden, activation, gated)
        grad_activated = _grouped(grad_rows, down, offsets, unused)
        owner = _owner(offsets, grad_rows)
        grad_weights = tokens.new_empty(0)
        if weights is not None:
            scale = weights.flatten().index_select(0, order.clamp_min(0)).to(torch.float32)
            scale = scale[:, None].masked_fill(unused, 0)
            if needs_weights:
                inner = (grad_activated.float() * activated.float()).sum(1)
                if down_bias is not None:
                    bias_rows = down_bias.index_select(0, owner).float()
                    inner += (grad_rows.float() * bias_rows).sum(1)
                picked = inner.index_select(0, slots.flatten().clamp_min(0)).view(slots.shape)
                grad_weights = picked.masked_fill(slots < 0, 0).to(weights.dtype)
            grad_activated = (grad_activated.float() * scale).to(dtype)
            grad_rows = (grad_rows.float() * scale).to(dtype)
        grad_hidden = activate_backward(grad_activated, hidden, activation, gated)
        grad_tokens, grad_up, grad_up_bias, grad_down, grad_down_bias = (
            tokens.new_empty(0)
            for _ in range(5)  # outputs of an op may not be one tensor
        )
        if needs_params:
            rows = ops.dispatch(tokens, order, slots)
            grad_down = _outer(grad_rows, activated, offsets)
            grad_up = _outer(grad_hidden, rows, offsets)
            if up_has_bias:
                grad_up_bias = _column_sums(grad_hidden, offsets)
            if down_bias is not None:
                grad_down_bias = _column_sums(grad_rows, offsets)
        if needs_tokens:
            back = _grouped(grad_hidden, up, offsets, unused)
            grad_tokens = ops.combine(back, None, order, slots)
    return grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias


def _serves(tokens: Tensor, up: Tensor, down: Tensor) -> bool:
    size = tokens.dtype.itemsize
    widths = (tokens.shape[1], up.shape[1], *down.shape[1:])
    aligned = all(width * size % 16 == 0 for width in widths)
    floats = (torch.float32, torch.bfloat16, torch.float16)
    return aligned and tokens.dtype in floats and tokens.dtype == up.dtype and tokens.shape[0] > 0


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
