"""`moeify::grouped_linear`: one linear map per expert over the expert-major buffer.

The reference loops over experts and skips the empty ones. Offsets become Python integers inside
the op, where a compiler does not look. Gradients are written straight into their slice of the
stacked gradient: indexing a stacked parameter per expert would make a full-size gradient each time.

Shapes: R rows, K input width, N output width, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify import compat
from moeify.errors import DispatchError
from moeify.kernels.precision import without_autocast
from moeify.kernels.registry import define, differentiable, fake


def grouped_linear_reference(
    rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """Return `rows @ weight[e].T + bias[e]`, with e the expert each row belongs to.

    Args:
        rows: [R, K], any float dtype.
        weight: [E, N, K] in the dtype of `rows`, any strides.
        bias: [E, N] in the dtype of `rows`, or None.
        offsets: [E] int32, end of each expert's rows, not decreasing.

    Returns:
        [R, N] in the dtype of `rows`, accumulated as `torch.mm` does; zeros from row
        `offsets[-1]` on, bias or not.

    Raises:
        DispatchError: The offsets decrease, end beyond R, or are not one per expert.

    Source:
        MegaBlocks (Gale et al. 2022) section 4: expert computation without padding.
    """
    if offsets.shape[0] != weight.shape[0]:
        raise DispatchError(f"offsets: {offsets.shape[0]} ends for {weight.shape[0]} experts")
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    weights = weight.unbind(0)
    biases = bias.unbind(0) if bias is not None else None
    end = 0
    with without_autocast(rows):
        for expert, start, end in expert_groups(offsets, rows.shape[0]):
            place, matrix = out[start:end], weights[expert].t()
            if biases is None:
                torch.mm(rows[start:end], matrix, out=place)
            else:
                torch.addmm(biases[expert], rows[start:end], matrix, out=place)
    out[end:].zero_()
    return out


grouped_linear = define(
    "grouped_linear",
    "(Tensor rows, Tensor weight, Tensor? bias, Tensor offsets) -> Tensor",
    grouped_linear_reference,
    cuda="moeify.kernels.triton.grouped_linear:grouped_linear",
)


@fake("grouped_linear")
def _(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1])


def grouped_linear_backward_reference(
    grad: Tensor, rows: Tensor, offsets: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `grouped_linear` for its parameters.

    The gradient of the rows needs no separate op: it is
    `grouped_linear(grad, weight.transpose(1, 2), None, offsets)`.

    Args:
        grad: [R, N], any strides.
        rows: [R, K], the input of the forward.
        offsets: [E] int32.
        with_bias: Whether to compute the bias' gradient.

    Returns:
        [E, N, K] and [E, N] (or [0] without bias) in the dtype of `grad`, zeros for experts
        without rows.
    """
    experts, width = offsets.shape[0], grad.shape[1]
    grad = grad.contiguous()
    grad_weight = grad.new_zeros(experts, width, rows.shape[1])
    grad_bias = grad.new_zeros((experts, width) if with_bias else (0,))
    weights = grad_weight.unbind(0)
    with without_autocast(rows):
        for expert, start, end in expert_groups(offsets, rows.shape[0]):
            torch.mm(grad[start:end].t(), rows[start:end], out=weights[expert])
            if with_bias:
                torch.sum(grad[start:end], dim=0, out=grad_bias[expert])
    return grad_weight, grad_bias


grouped_linear_backward = define(
    "grouped_linear_backward",
    "(Tensor grad, Tensor rows, Tensor offsets, bool with_bias) -> (Tensor, Tensor)",
    grouped_linear_backward_reference,
    cuda="moeify.kernels.triton.grouped_linear:grouped_linear_backward",
)


@fake("grouped_linear_backward")
def _(grad: Tensor, rows: Tensor, offsets: Tensor, with_bias: bool) -> tuple[Tensor, Tensor]:
    experts, width = offsets.shape[0], grad.shape[1]
    return (
        grad.new_empty(experts, width, rows.shape[1]),
        grad.new_empty((experts, width) if with_bias else (0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weight, bias, offsets = inputs
    needs_rows, needs_weight, needs_bias, *_ = ctx.needs_input_grad
    ctx.with_bias = bias is not None
    ctx.save_for_backward(
        rows if needs_weight or needs_bias else None, weight if needs_rows else None, offsets
    )


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight, offsets = ctx.saved_tensors
    grad_rows = grad_weight = grad_bias = None
    if weight is not None:
        grad_rows = torch.ops.moeify.grouped_linear(grad, weight.transpose(1, 2), None, offsets)
    if rows is not None:
        grad_weight, grad_bias = torch.ops.moeify.grouped_linear_backward(
            grad, rows, offsets, ctx.with_bias
        )
    return grad_rows, grad_weight, grad_bias if ctx.with_bias else None, None


def grouped_linear_formula(
    rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor
) -> Tensor:
    """Return what `grouped_linear_reference` returns, by differentiable calls."""
    if offsets.shape[0] != weight.shape[0]:
        raise DispatchError(f"offsets: {offsets.shape[0]} ends for {weight.shape[0]} experts")
    weights = weight.unbind(0)
    biases = bias.unbind(0) if bias is not None else [None] * len(weights)
    unused = rows.new_zeros(rows.shape[0], weight.shape[1])
    with without_autocast(rows):
        ends = compat.known_values(offsets)
        if ends is None:
            total = unused
            for inside, own, matrix, vector in zip(
                *_masked(rows, offsets), weights, biases, strict=True
            ):
                total = total + torch.where(inside, F.linear(own, matrix, vector), 0)
            return total
        groups = list(_groups(ends, rows.shape[0]))
        parts = [F.linear(rows[a:b], weights[e], biases[e]) for e, a, b in groups]
    return torch.cat([*parts, unused[groups[-1][2] if groups else 0 :]])


def grouped_linear_backward_formula(
    grad: Tensor, rows: Tensor, offsets: Tensor, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Return what `grouped_linear_backward_reference` returns, by differentiable calls."""
    experts = offsets.shape[0]
    with without_autocast(rows):
        ends = compat.known_values(offsets)
        if ends is None:
            grads, inputs = _masked(grad, offsets)[1], _masked(rows, offsets)[1]
        else:
            grads, inputs = [grad[:0]] * experts, [rows[:0]] * experts
            for expert, start, end in _groups(ends, rows.shape[0]):
                grads[expert], inputs[expert] = grad[start:end], rows[start:end]
        grad_weight = torch.stack([g.t() @ x for g, x in zip(grads, inputs, strict=True)])
        if not with_bias:
            return grad_weight, grad.new_zeros(0)
        return grad_weight, torch.stack([g.sum(0) for g in grads])


def _masked(rows: Tensor, offsets: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return for each expert which rows [R, 1] are its own, and the rows with zeros elsewhere.

    For offsets whose values are not known. It takes E times the work.
    """
    place = torch.arange(rows.shape[0], device=rows.device)[:, None]
    starts = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    inside = [(place >= starts[e]) & (place < offsets[e]) for e in range(offsets.shape[0])]
    return inside, [torch.where(own, rows, 0) for own in inside]


differentiable(
    "grouped_linear", grouped_linear_formula, backward=_backward, setup_context=_setup_context
)
differentiable("grouped_linear_backward", grouped_linear_backward_formula)


def expert_groups(offsets: Tensor, rows: int) -> Iterator[tuple[int, int, int]]:
    """Yield (expert, start, end) of every expert that has rows.

    Raises:
        DispatchError: The offsets decrease, or end beyond the rows.
    """
    return _groups(offsets.tolist(), rows)


def _groups(ends: list[int], rows: int) -> Iterator[tuple[int, int, int]]:
    start = 0
    for expert, end in enumerate(ends):
        if not start <= end <= rows:
            raise DispatchError(
                f"offsets: expert {expert} ends at row {end}, after a start at {start} and with "
                f"{rows} rows; offsets must not decrease and not pass the last row"
            )
        if end > start:
            yield expert, start, end
        start = end
