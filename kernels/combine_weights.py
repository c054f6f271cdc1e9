"""`moeify::combine_weights`: combine weights from the scores of the chosen experts, after dropping.

Shapes: T tokens, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.kernels.gate import EPSILON
from moeify.kernels.registry import define, differentiable, fake

COMBINES = ("probability", "normalized", "straight_through", "sum")


def combine_weights_reference(scores: Tensor, slots: Tensor, combine: str) -> Tensor:
    """Return the combine weight of every route; exactly 0 for dropped routes.

    Args:
        scores: [T, K] float32 or float64, the scores of the chosen experts.
        slots: [T, K] int32, negative where the route was dropped.
        combine: "probability" is the score itself; "normalized" divides by the sum over the kept
            routes; "straight_through" has the value of "normalized" (exactly 1 for K = 1), "sum"
            that of exactly 1 for every kept route, and both the gradient of "probability", which
            `gate` passes on to the router alone.

    Returns:
        [T, K] weights in the dtype of `scores`.

    Source:
        "probability": Switch Transformers (Fedus et al. 2021) eq. 2. "normalized": GShard
        (Lepikhin et al. 2020) algorithm 1, after dropping as in DeepSpeed. "straight_through": the
        estimator of Bengio et al. 2013, so that upcycling with K = 1 keeps the dense output while
        the router trains. "sum": experts that are slices of one MLP (MoEfication, Zhang et al.
        2022) add up to it.
    """
    kept = scores.masked_fill(slots < 0, 0)
    if combine == "probability":
        return kept.clone()
    if combine == "sum" or (combine == "straight_through" and scores.shape[1] == 1):
        # A score that underflowed to 0 still counts as 1; NaN stays NaN.
        return torch.where(slots < 0, 0, 1 + (kept - kept))
    if combine in ("normalized", "straight_through"):
        return kept / (kept.sum(1, keepdim=True) + EPSILON)
    raise ValueError(f"combine: {combine!r} is unknown; use one of {', '.join(COMBINES)}")


combine_weights = define(
    "combine_weights",
    "(Tensor scores, Tensor slots, str combine) -> Tensor",
    combine_weights_reference,
    cpu="moeify.kernels.cpu.rows:combine_weights",
    cuda="moeify.kernels.triton.rows:combine_weights",
)


@fake("combine_weights")
def _(scores: Tensor, slots: Tensor, combine: str) -> Tensor:
    return scores.new_empty(scores.shape)


def combine_weights_backward_reference(
    grad: Tensor, scores: Tensor, slots: Tensor, combine: str
) -> Tensor:
    """Return the gradient of `combine_weights` for scores [T, K]; zero for dropped routes."""
    dropped = slots < 0
    if combine != "normalized":
        return grad.masked_fill(dropped, 0)
    kept = scores.masked_fill(dropped, 0)
    total = kept.sum(1, keepdim=True) + EPSILON
    inner = (grad * kept / total).sum(1, keepdim=True)
    return ((grad - inner) / total).masked_fill(dropped, 0)


combine_weights_backward = define(
    "combine_weights_backward",
    "(Tensor grad, Tensor scores, Tensor slots, str combine) -> Tensor",
    combine_weights_backward_reference,
    cpu="moeify.kernels.cpu.rows:combine_weights_backward",
    cuda="moeify.kernels.triton.rows:combine_weights_backward",
)


@fake("combine_weights_backward")
def _(grad: Tensor, scores: Tensor, slots: Tensor, combine: str) -> Tensor:
    return scores.new_empty(scores.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, slots, ctx.combine = inputs
    ctx.save_for_backward(scores, slots)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    scores, slots = ctx.saved_tensors
    return torch.ops.moeify.combine_weights_backward(grad, scores, slots, ctx.combine), None, None


def _formula(scores: Tensor, slots: Tensor, combine: str) -> Tensor:
    """Return the combine weights, with the gradient of the kept scores where it is a surrogate."""
    value = combine_weights_reference(scores, slots, combine)
    if combine in ("probability", "normalized"):
        return value
    kept = scores.masked_fill(slots < 0, 0)
    return value.detach() + (kept - kept.detach())


differentiable("combine_weights", _formula, backward=_backward, setup_context=_setup_context)
differentiable("combine_weights_backward", combine_weights_backward_reference)
