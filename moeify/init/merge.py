"""Merge experts into one MLP: the reverse of `strategies.init_experts`, tensor by tensor.

Shapes: D model width, F expert width, E experts, G slices per copy; `wide` is F, or 2F if gated.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WIDE = 1 << 24
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors hold the same bits, NaN included; on `meta` compare shapes only."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:
        return True
    bits = _BITS[a.element_size()]
    return torch.equal(a.detach().view(bits), b.detach().view(bits))


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in float32 if its dtype is narrower."""
    return tensor.float() if tensor.element_size() < 4 else tensor


def merged(stacked: Tensor) -> tuple[Tensor, bool]:
    """Return the mean of stacked tensors [E, ...], and whether all are equal, bit for bit."""
    first, *others = stacked.detach().unbind(0)
    if all(same_bits(first, other) for other in others):
        return first, True
    rows = stacked.detach()
    if rows.dim() < 3 or rows.is_meta:
        return widened(rows).mean(0).to(rows.dtype), False
    step = max(1, _WIDE * rows.shape[1] // max(1, rows.numel()))  # widening all takes memory
    parts = [widened(part).mean(0).to(rows.dtype) for part in torch.split(rows, step, 1)]
    return torch.cat(parts), False


def joined_rows(tensor: Tensor, slices: int, *, gated: bool) -> Tensor:
    """Join the slices of first projections or biases: [E, wide, ...] to [E / G, wide * G, ...]."""
    halves = 2 if gated else 1
    experts, wide, *rest = tensor.shape
    parts = tensor.view(experts // slices, slices, halves, wide // halves, *rest)
    return parts.transpose(1, 2).reshape(experts // slices, wide * slices, *rest)


def joined_columns(down: Tensor, slices: int, *, scaled: bool = True) -> Tensor:
    """Join the slices of last projections, [E, D, F] to [E / G, D, F * G].

    `scaled` undoes the factor G that granular slices have.
    """
    experts, width, hidden = down.shape
    parts = down.view(experts // slices, slices, width, hidden).transpose(1, 2)
    joined = parts.reshape(experts // slices, width, slices * hidden)
    return joined / slices if scaled else joined
