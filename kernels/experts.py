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

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeify.kernels.combine import combine_reference, route_values, row_weights
from moeify.kernels.dispatch import dispatch_reference
from moeify.kernels.elementwise import (
    activate,
    activate_backward,
    activate_backward_formula,
)
from moeify.kernels.grouped_linear import (
    grouped_linear_backward_formula,
    grouped_linear_backward_reference,
    grouped_linear_formula,
    grouped_linear_reference,
)
from moeify.kernels.precision import accumulation_dtype, without_autocast
from moeify.kernels.registry import define, differentiable, fake

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
Linear = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]
LinearBackward = Callable[[Tensor, Tensor, Tensor, bool], tuple[Tensor, Tensor]]
ActivationBackward = Callable[[Tensor, Tensor, str, bool], Tensor]


class ExpertsCall(NamedTuple):
    """The arguments of `experts_reference`, as implementations hand them to each other."""

    tokens: Tensor
    weights: Tensor | None
    up: Tensor
    up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    order: Tensor
    slots: Tensor
    offsets: Tensor
    activation: str
    gated: bool
    save: bool
    kernel: str


class BackwardCall(NamedTuple):
    """The arguments of `experts_backward_reference`, as implementations hand them to each other."""

    grad: Tensor
    tokens: Tensor
    weights: Tensor | None
    up: Tensor
    down: Tensor
    down_bias: Tensor | None
    hidden: Tensor
    order: Tensor
    slots: Tensor
    offsets: Tensor
    activation: str
    gated: bool
    up_has_bias: bool
    needs_tokens: bool
    needs_weights: bool
    needs_params: bool
    kernel: str

    def new_gradients(self) -> Gradients:
        """Return the six gradients, uninitialised; [0] where not needed or not there."""

        def new(like: Tensor | None, dims: int | None, needed: bool) -> Tensor:
            if like is None or not needed:
                return self.tokens.new_empty(0)
            return like.new_empty(like.shape[:dims])

        params = self.needs_params
        return (
            new(self.tokens, None, self.needs_tokens),
            new(self.weights, None, self.needs_weights),
            new(self.up, None, params),
            new(self.up, 2, params and self.up_has_bias),
            new(self.down, None, params),
            new(self.down, 2, params and self.down_bias is not None),
        )


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
        kernel: Which implementation to use: "auto" or a name of `choose.KERNELS`.

    Returns:
        out [T, O] in the dtype of `tokens`, zeros where every route was dropped; hidden [R, H],
        the first projection with its bias before the activation, zeros in unused rows, or [0, H]
        without `save`.

    Source:
        Fusing gather, activation and combine into the grouped matmuls: ScatterMoE (Tan et al.
        2024) section 3; the router gradient without the experts' outputs: SonicMoE (Guo et al.
        2025) section 3.
    """
    call = ExpertsCall(
        tokens, weights, up, up_bias, down, down_bias, order, slots, offsets, activation, gated,
        save, kernel,
    )  # fmt: skip
    return _forward_with(grouped_linear_reference, call)


def _formula(*args: Any) -> tuple[Tensor, Tensor]:
    return _forward_with(grouped_linear_formula, ExpertsCall(*args))


def _forward_with(linear: Linear, call: ExpertsCall) -> tuple[Tensor, Tensor]:
    with without_autocast(call.tokens):
        rows = dispatch_reference(call.tokens, call.order, call.slots)
        hidden = linear(rows, call.up, call.up_bias, call.offsets)
        activated = activate(hidden, call.activation, call.gated)
        rows = linear(activated, call.down, call.down_bias, call.offsets)
        out = combine_reference(rows, call.weights, call.order, call.slots)
    return out, hidden if call.save else hidden.new_empty(0, hidden.shape[1])


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
) -> Gradients:
    """Return the gradients of `experts`.

    `grad` [T, O] is the gradient of the output, any strides; `hidden` [R, H] what the forward
    saved; `needs_params` asks for the gradients of projections and biases. All else is as in the
    forward.

    Returns:
        Gradients of tokens [T, D], weights [T, K] in the dtype of `weights`, up [E, H, D],
        up_bias [E, H], down [E, O, F], down_bias [E, O]; [0] where not needed or not there.
        Experts without rows and dropped routes get zeros.
    """
    call = BackwardCall(
        grad, tokens, weights, up, down, down_bias, hidden, order, slots, offsets, activation,
        gated, up_has_bias, needs_tokens, needs_weights, needs_params, kernel,
    )  # fmt: skip
    return _backward_with(
        grouped_linear_reference, grouped_linear_backward_reference, activate_backward, call
    )


def _backward_formula(*args: Any) -> Gradients:
    return _backward_with(
        grouped_linear_formula,
        grouped_linear_backward_formula,
        activate_backward_formula,
        BackwardCall(*args),
    )


def _backward_with(
    linear: Linear,
    linear_backward: LinearBackward,
    activation_backward: ActivationBackward,
    call: BackwardCall,
) -> Gradients:
    (
        grad, tokens, weights, up, down, down_bias, hidden, order, slots, offsets, activation,
        gated, up_has_bias, needs_tokens, needs_weights, needs_params, _,
    ) = call  # fmt: skip
    accumulate = accumulation_dtype(tokens.dtype)
    with without_autocast(tokens):
        grad_rows = dispatch_reference(grad.to(tokens.dtype), order, slots)  # not weighted yet
        activated = activate(hidden, activation, gated)
        grad_activated = linear(grad_rows, down.transpose(1, 2), None, offsets)
        grad_weights = tokens.new_empty(0)
        if weights is not None and needs_weights:
            inner = (grad_activated.to(accumulate) * activated.to(accumulate)).sum(1)
            if down_bias is not None:
                ones = tokens.new_ones(order.shape[0], 1)
                bias_rows = linear(ones, down_bias[:, :, None], None, offsets)
                inner = inner + (grad_rows.to(accumulate) * bias_rows.to(accumulate)).sum(1)
            grad_weights = route_values(inner, slots).to(weights.dtype)
        if weights is not None:
            scale = row_weights(weights, order, accumulate)[:, None]
            grad_activated = (grad_activated.to(accumulate) * scale).to(tokens.dtype)
            grad_rows = (grad_rows.to(accumulate) * scale).to(tokens.dtype)
        grad_hidden = activation_backward(grad_activated, hidden, activation, gated)
        grad_tokens, grad_up, grad_up_bias, grad_down, grad_down_bias = (
            tokens.new_empty(0)
            for _ in range(5)  # outputs of an op may not be one tensor
        )
        if needs_params:
            grad_down, grad_down_bias = linear_backward(
                grad_rows, activated, offsets, down_bias is not None
            )
            rows = dispatch_reference(tokens, order, slots)
            grad_up, grad_up_bias = linear_backward(grad_hidden, rows, offsets, up_has_bias)
        if needs_tokens:
            grad_inputs = linear(grad_hidden, up.transpose(1, 2), None, offsets)
            grad_tokens = combine_reference(grad_inputs, None, order, slots)
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
def _(*args: Any) -> tuple[Tensor, Tensor]:
    call = ExpertsCall(*args)
    rows = call.order.shape[0] if call.save else 0
    out = call.tokens.new_empty(call.tokens.shape[0], call.down.shape[1])
    return out, call.tokens.new_empty(rows, call.up.shape[1])


@fake("experts_backward")
def _(*args: Any) -> Gradients:
    return BackwardCall(*args).new_gradients()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tokens, weights, up, up_bias, down, down_bias, order, slots, offsets, *options = inputs
    ctx.activation, ctx.gated, ctx.save, ctx.kernel = options
    ctx.up_has_bias = up_bias is not None
    hidden = output[1]  # differentiable: what a second derivative goes through
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(tokens, weights, up, down, down_bias, hidden, order, slots, offsets)


def _backward(
    ctx: Any, grad: Tensor | None, grad_hidden: Tensor | None
) -> tuple[Tensor | None, ...]:
    if not ctx.save:
        raise RuntimeError("moeify::experts ran without gradients; call it with save=True")
    needs = ctx.needs_input_grad[:6]
    saved = ctx.saved_tensors  # once: activation checkpointing recomputes them here
    kept: list[Tensor | None] = [None] * 6
    if grad is not None:
        grads = torch.ops.moeify.experts_backward(
            grad,
            *saved,
            ctx.activation,
            ctx.gated,
            ctx.up_has_bias,
            needs[0],
            needs[1],
            any(needs[2:]),
            ctx.kernel,
        )
        kept = [g if needed else None for g, needed in zip(grads, needs, strict=True)]
    if grad_hidden is not None:  # only the derivative of a backward pass has one
        _add_backward_of_hidden(kept, ctx, saved, grad_hidden)
    return (*kept, *(None,) * 7)


def _add_backward_of_hidden(
    grads: list[Tensor | None], ctx: Any, saved: tuple[Tensor, ...], grad: Tensor
) -> None:
    """Add the gradients of the inputs of the first projection, given that of its output."""
    tokens, _, up, _, _, _, order, slots, offsets = saved
    ops = torch.ops.moeify

    def add(place: int, more: Tensor) -> None:
        former = grads[place]
        grads[place] = more if former is None else former + more

    if ctx.needs_input_grad[0]:
        grad_rows = ops.grouped_linear(grad, up.transpose(1, 2), None, offsets)
        add(0, ops.combine(grad_rows, None, order, slots))
    if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
        rows = ops.dispatch(tokens, order, slots)
        grad_up, grad_bias = ops.grouped_linear_backward(grad, rows, offsets, ctx.up_has_bias)
        add(2, grad_up)
        if ctx.up_has_bias:
            add(3, grad_bias)


differentiable("experts", _formula, backward=_backward, setup_context=_setup_context)
differentiable("experts_backward", _backward_formula)
