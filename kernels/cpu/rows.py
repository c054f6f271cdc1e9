"""`assign`, `combine_weights`, `dispatch` and `combine` in C++ on the CPU.

Integers equal the references' exactly; sums are in float32. Each function has the arguments and
results of its reference and returns NotImplemented for what it does not serve.

Shapes: T tokens, D model width, E experts, K top-k, R rows.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from moeify.kernels.combine_weights import COMBINES
from moeify.kernels.cpu.compile import address, function, integers
from moeify.kernels.operands import contiguous
from moeify.kernels.registry import never_traced

ROWS = (torch.float32, torch.bfloat16)

ARGUMENTS = {
    "assign": "pp" + "llllll" + "ppp",
    "combine_weights": "pp" + "lll" + "p",
    "combine_weights_backward": "ppp" + "lll" + "p",
    "dispatch": "pp" + "llll" + "p",
    "combine": "ppp" + "lll" + "p",
    "combine_backward": "ppppp" + "llll" + "pp",
}
"""Types of the functions of rows.cpp, as `compile.function` reads them."""


@never_traced
def assign(ids: Tensor, priority: Tensor | None, experts: int, capacity: int) -> Any:
    """Serve int32 ids with priorities of at most 32 bits."""
    kernel = _kernel("assign")
    if kernel is None or not ids.is_cpu or ids.dtype != torch.int32:
        return NotImplemented
    if priority is not None and (priority.shape != ids.shape or priority.dtype == torch.float64):
        return NotImplemented
    tokens, top_k = ids.shape
    ids = ids.contiguous()
    strides: tuple[int, ...] = (0, 0)
    if priority is not None:
        priority = priority.float()
        strides = priority.stride()
    slots, order = torch.empty_like(ids), integers(tokens * top_k)
    offsets = integers(experts)
    kernel(
        ids.data_ptr(),
        address(priority),
        *strides,
        tokens,
        top_k,
        experts,
        max(capacity, 0),
        *(address(t) for t in (slots, order, offsets)),
    )
    return slots, order, offsets


@never_traced
def combine_weights(scores: Tensor, slots: Tensor, combine: str) -> Any:
    """Serve float32 scores."""
    kernel = _kernel("combine_weights")
    if kernel is None or not _serves(scores, slots) or combine not in COMBINES:
        return NotImplemented
    scores, slots = contiguous(scores, slots)
    weights = torch.empty_like(scores)
    kernel(
        scores.data_ptr(), slots.data_ptr(), *slots.shape, COMBINES.index(combine),
        weights.data_ptr(),
    )  # fmt: skip
    return weights


@never_traced
def combine_weights_backward(grad: Tensor, scores: Tensor, slots: Tensor, combine: str) -> Any:
    """Serve float32 gradients and scores."""
    kernel = _kernel("combine_weights_backward")
    if (
        kernel is None
        or not _serves(scores, slots)
        or grad.dtype != torch.float32
        or combine not in COMBINES
    ):
        return NotImplemented
    grad, scores, slots = contiguous(grad, scores, slots)
    grad_scores = torch.empty_like(scores)
    kernel(
        grad.data_ptr(), scores.data_ptr(), slots.data_ptr(), *slots.shape,
        COMBINES.index(combine), grad_scores.data_ptr(),
    )  # fmt: skip
    return grad_scores


@never_traced
def dispatch(tokens: Tensor, order: Tensor, slots: Tensor) -> Any:
    """Serve any dtype."""
    kernel = _kernel("dispatch")
    if kernel is None or not tokens.is_cpu or order.dtype != torch.int32:
        return NotImplemented
    if tokens.stride(1) != 1:
        tokens = tokens.contiguous()
    order = order.contiguous()
    size, width = tokens.element_size(), tokens.shape[1]
    rows = tokens.new_empty(order.shape[0], width)
    kernel(
        tokens.data_ptr(), order.data_ptr(), order.shape[0], slots.shape[1],
        width * size, tokens.stride(0) * size, rows.data_ptr(),
    )  # fmt: skip
    return rows


@never_traced
def combine(hidden: Tensor, weights: Tensor | None, order: Tensor, slots: Tensor) -> Any:
    """Serve float32 and bfloat16 rows."""
    if not hidden.is_cpu or hidden.dtype not in ROWS:
        return NotImplemented
    kernel = _kernel("combine", hidden.dtype)
    if kernel is None:
        return NotImplemented
    hidden, slots = contiguous(hidden, slots)
    if weights is not None:
        weights = weights.float().contiguous()
    (tokens, top_k), width = slots.shape, hidden.shape[1]
    out = hidden.new_empty(tokens, width)
    kernel(
        hidden.data_ptr(), address(weights), slots.data_ptr(),
        tokens, top_k, width, out.data_ptr(),
    )  # fmt: skip
    return out


@never_traced
def combine_backward(
    grad: Tensor, hidden: Tensor, weights: Tensor, order: Tensor, slots: Tensor
) -> Any:
    """Serve float32 and bfloat16 rows with a gradient of the same dtype."""
    if not hidden.is_cpu or hidden.dtype not in ROWS or grad.dtype != hidden.dtype:
        return NotImplemented
    kernel = _kernel("combine_backward", hidden.dtype)
    if kernel is None:
        return NotImplemented
    grad, hidden, order, slots = contiguous(grad, hidden, order, slots)
    wide = weights.float().contiguous()
    grad_hidden, grad_weights = torch.empty_like(hidden), torch.empty_like(wide)
    kernel(
        grad.data_ptr(), hidden.data_ptr(), wide.data_ptr(), order.data_ptr(), slots.data_ptr(),
        *slots.shape, hidden.shape[1], order.shape[0], grad_hidden.data_ptr(),
        grad_weights.data_ptr(),
    )  # fmt: skip
    return grad_hidden, grad_weights.to(weights.dtype)


@functools.cache
def _kernel(symbol: str, dtype: torch.dtype | None = None) -> Any:
    """Return a function of rows.cpp, for rows of `dtype` where there are several."""
    suffix = "" if dtype is None else {torch.float32: "_f32", torch.bfloat16: "_bf16"}[dtype]
    return function("rows", symbol + suffix, ARGUMENTS[symbol])


def _serves(scores: Tensor, slots: Tensor) -> bool:
    return (
        scores.is_cpu
        and scores.dtype == torch.float32
        and slots.dtype == torch.int32
        and scores.shape == slots.shape
    )
