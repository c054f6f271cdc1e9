"""`moeify::experts`: gather, grouped MLP and weighted combine in one op.

The whole sparse half of a MoE block between the routing and its output: rows are gathered in the
load of the first grouped matmul, the activation is its epilogue, and the combine weight that of the
second. What is kept for the backward is the input and the first matmul's output alone: the rows,
the activated values and the experts' outputs are never stored, for the gradient of a combine weight
is `<grad W_down, activated>` (SonicMoE).

Shapes: T tokens, D model width, O output width, F expert width, H = 2F if gated else F, E experts,
K top-k, R = T * K rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.kernels.combine import combine_reference
from moeify.kernels.dispatch import dispatch_reference
from moeify.kernels.elementwise import activate, activate_backward
from moeify.kernels.grouped_linear import (
    grouped_linear_backward_reference,
    grouped_linear_reference,
)
from moeify.kernels.precision import accumulation_dtype, without_autocast
from moeify.kernels.registry import define, fake


def experts_reference(
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
) -> tuple[Tensor, Tensor]:
    """Send every token through its experts and sum what they return, weighted.

    Args:
        tokens: [T, D], any float dtype.
        weights: [T, K] float32 or float64 combine weights, or None for ones.
        up: [E, H, D] in the dtype of `tokens`; if gated, the gate is the first half of H.
        up_bias: [E, H] or None.
        down: [E, O, F].
        down_bias: [E, O] or None.
        order: [R] int32, flat route `t * K + j` of each row, -1 where unused.
        slots: [T, K] int32, row of each route, -1 where dropped.
        offsets: [E] int32, end of each expert's rows.
        activation: A name of `elementwise.FUSED`.
        gated: Compute `act(gate) * up`.
        save: Return what the backward needs.
        kernel: Which implementation to use: "auto" or a name of `lowering.KERNELS`.

    Returns:
        out [T, O] in the dtype of `tokens`, zeros where every route was dropped; hidden [R, H],
        the first projection with its bias before the activation, zeros in unused rows, or [0, H]
        without `save`.

    Source:
        Fusing gather, activation and combine into the grouped matmuls: ScatterMoE (Tan et al.
        2024) section 3; the router gradient without the experts' outputs: SonicMoE (Guo et al.
        2025) section 3.
    """
    with without_autocast(tokens):
        rows = dispatch_reference(tokens, order, slots)
        hidden = grouped_linear_reference(rows, up, up_bias, offsets)
        activated = activate(hidden, activation, gated)
        rows = grouped_linear_reference(activated, down, down_bias, offsets)
        out = combine_reference(rows, weights, order, slots)
    return out, hidden if save else hidden.new_empty(0, hidden.shape[1])


def experts_backward_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `experts`.

    Args:
        grad: [T, O], gradient of the output, any strides.
        tokens: [T, D], as in the forward, like the next six.
        weights: [T, K] or None.
        up: [E, H, D].
        down: [E, O, F].
        down_bias: [E, O] or None.
        hidden: [R, H], what the forward saved.
        order: [R] int32.
        slots: [T, K] int32.
        offsets: [E] int32.
        activation: As in the forward.
        gated: As in the forward.
        up_has_bias: Whether the first projection has a bias.
        needs_tokens: Compute the gradient of the tokens.
        needs_weights: Compute the gradient of the combine weights.
        needs_params: Compute the gradients of projections and biases.
        kernel: As in the forward.

    Returns:
        Gradients of tokens [T, D], weights [T, K] in the dtype of `weights`, up [E, H, D],
        up_bias [E, H], down [E, O, F], down_bias [E, O]; [0] where not needed or not there.
        Experts without rows and dropped routes get zeros.
    """
    accumulate = accumulation_dtype(tokens.dtype)
    with without_autocast(tokens):
        grad_rows = dispatch_reference(grad.to(tokens.dtype), order, slots)  # not weighted yet
        activated = activate(hidden, activation, gated)
        grad_activated = grouped_linear_reference(grad_rows, down.transpose(1, 2), None, offsets)
        grad_weights = tokens.new_empty(0)
        row_weights = None
        if weights is not None:
            route = order.clamp_min(0)
            row_weights = weights.flatten().index_select(0, route).to(accumulate)[:, None]
            row_weights = row_weights.masked_fill((order < 0)[:, None], 0)
        if weights is not None and needs_weights:
            inner = (grad_activated.to(accumulate) * activated.to(accumulate)).sum(1)
            if down_bias is not None:
                ones = tokens.new_ones(order.shape[0], 1)
                bias_rows = grouped_linear_reference(ones, down_bias[:, :, None], None, offsets)
                inner = inner + (grad_rows.to(accumulate) * bias_rows.to(accumulate)).sum(1)
            flat = inner.index_select(0, slots.flatten().clamp_min(0))
            flat = flat.masked_fill(slots.flatten() < 0, 0)
            grad_weights = flat.view(slots.shape).to(weights.dtype)
        if row_weights is not None:
            grad_activated = (grad_activated.to(accumulate) * row_weights).to(tokens.dtype)
            grad_rows = (grad_rows.to(accumulate) * row_weights).to(tokens.dtype)
        grad_hidden = activate_backward(grad_activated, hidden, activation, gated)
        grad_tokens, grad_up, grad_up_bias, grad_down, grad_down_bias = (
            tokens.new_empty(0)
            for _ in range(5)  # outputs of an op may not be one tensor
        )
        if needs_params:
            grad_down, grad_down_bias = grouped_linear_backward_reference(
                grad_rows, activated, offsets, down_bias is not None
            )
            rows = dispatch_reference(tokens, order, slots)
            grad_up, grad_up_bias = grouped_linear_backward_reference(
                grad_hidden, rows, offsets, up_has_bias
            )
        if needs_tokens:
            back = grouped_linear_reference(grad_hidden, up.transpose(1, 2), None, offsets)
            grad_tokens = combine_reference(back, None, order, slots)
    return grad_tokens, grad_weights, grad_up, grad_up_bias, grad_down, grad_down_bias


experts = define(
    "experts",
    "(Tensor tokens, Tensor? weights, Tensor up, Tensor? up_bias, Tensor down, "
    "Tensor? down_bias, Tensor order, Tensor slots, Tensor offsets, str activation, bool gated, "
    "bool save, str kernel) -> (Tensor, Tensor)",
    experts_reference,
    cpu="moeify.kernels.cpu.experts:experts",
    cuda="moeify.kernels.experts_cuda:experts",
)

experts_backward = define(
    "experts_backward",
    "(Tensor grad, Tensor tokens, Tensor? weights, Tensor up, Tensor down, "
    "Tensor? down_bias, Tensor hidden, Tensor order, Tensor slots, Tensor offsets, "
    "str activation, bool gated, bool up_has_bias, bool needs_tokens, bool needs_weights, "
    "bool needs_params, str kernel) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    experts_backward_reference,
    cpu="moeify.kernels.cpu.experts:experts_backward",
    cuda="moeify.kernels.experts_cuda:experts_backward",
)


@fake("experts")
def _(tokens: Tensor, weights: Tensor | None, up: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    _, down, _, order, *_, save, _ = rest
    rows = order.shape[0] if save else 0
    return tokens.new_empty(tokens.shape[0], down.shape[1]), tokens.new_empty(rows, up.shape[1])


@fake("experts_backward")
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        tokens.new_empty(tokens.shape) if needs_tokens else tokens.new_empty(0),
        weights.new_empty(weights.shape)
        if weights is not None and needs_weights
        else tokens.new_empty(0),
        up.new_empty(up.shape) if needs_params else tokens.new_empty(0),
        up.new_empty(up.shape[:2]) if needs_params and up_has_bias else tokens.new_empty(0),
        down.new_empty(down.shape) if needs_params else tokens.new_empty(0),
        down.new_empty(down.shape[:2])
        if needs_params and down_bias is not None
        else tokens.new_empty(0),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, weights, up, up_bias, down, down_bias, order, slots, offsets, *options = inputs
    ctx.activation, ctx.gated, ctx.save, ctx.kernel = options
    ctx.up_has_bias = up_bias is not None
    hidden = output[1]
    ctx.mark_non_differentiable(hidden)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, weights, up, down, down_bias, hidden, order, slots, offsets)


def _backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    if not ctx.save:
        raise RuntimeError("moeify::experts ran without gradients; call it with save=True")
    needs = ctx.needs_input_grad
    grads = torch.ops.moeify.experts_backward(
        grad,
        *ctx.saved_tensors,
        ctx.activation,
        ctx.gated,
        ctx.up_has_bias,
        needs[0],
        needs[1],
        any(needs[2:6]),
        ctx.kernel,
    )
    kept = [g if needed else None for g, needed in zip(grads, needs[:6], strict=True)]
    return (*kept, *(None,) * 7)


torch.library.register_autograd("moeify::experts", _backward, setup_context=_setup_context)
