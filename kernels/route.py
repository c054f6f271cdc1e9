"""Routing in one call: choose, drop over capacity, weight the kept routes.

`normalized` weights are over the *kept* routes, so the order is fixed: the gate chooses, `assign`
drops, `combine_weights` turns the scores of the kept routes into combine weights.

Shapes: T tokens, D model width, E experts, K top-k, R = T * K rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moeify.kernels.assign import DROPS, assign
from moeify.kernels.combine_weights import COMBINES, combine_weights
from moeify.kernels.gate import BALANCES, LOGIT_NOISES, SCORES, gate

__all__ = [
    "BALANCES",
    "COMBINES",
    "DROPS",
    "LOGIT_NOISES",
    "SCORES",
    "Routing",
    "assign",
    "combine_weights",
    "gate",
    "route",
]


class Routing(NamedTuple):
    """What a router decided. The order of the fields is fixed: graphs read them by index.

    A is float64 for float64 tokens, else float32.
    """

    ids: Tensor  # [T, K] int32, the chosen experts in order of choice
    weights: Tensor  # [T, K] A, combine weights; 0 where dropped
    slots: Tensor  # [T, K] int32, row of each route in the packed buffer; -1 where dropped
    order: Tensor  # [R] int32, flat route `t * K + j` of each row; -1 where unused
    offsets: Tensor  # [E] int32, end of each expert's rows; the last is the number of kept routes
    counts: Tensor  # [E] int32, routes per expert before dropping
    aux_loss: Tensor  # [] A, balance loss without its coefficient
    z_loss: Tensor  # [] A, z-loss without its coefficient
    entropy: Tensor  # [] A, mean entropy of the scores over experts, in nats; no gradient
    dropped: Tensor  # [] int32, number of dropped routes
    logits: Tensor  # [T, E] A
    # Rows per expert at most; -1 where nothing can be dropped.
    capacity: int | torch.SymInt = -1


# Positions in a `Routing`, for graphs.
IDS, WEIGHTS, SLOTS, ORDER, OFFSETS, COUNTS = range(6)
AUX_LOSS, Z_LOSS, ENTROPY, DROPPED, LOGITS, CAPACITY = range(6, 12)


def route(
    tokens: Tensor,
    weight: Tensor,
    *,
    top_k: int,
    capacity: int | torch.SymInt,
    selection_bias: Tensor | None = None,
    input_noise: Tensor | None = None,
    logit_noise: Tensor | None = None,
    random_priority: Tensor | None = None,
    score: str = "softmax",
    combine: str = "probability",
    noise: str = "none",
    drop: str = "position",
    balance: str = "all",
) -> Routing:
    """Route tokens to experts, deterministically: everything random is passed in as a tensor.

    Args:
        tokens: [T, D], any float dtype.
        weight: [E, D], any float dtype.
        top_k: Experts per token, at most E.
        capacity: Rows per expert at most; T or more drops nothing.
        selection_bias: [E], added to the scores for the choice only.
        input_noise: [T, D], factor on the tokens.
        logit_noise: [T, E], added to the logits for the choice only.
        random_priority: [T], uniform priorities of the tokens; needed by `drop="random"`.
        score: "softmax" or "sigmoid".
        combine: "probability", "normalized", "straight_through" or "sum"; see `combine_weights`.
        noise: What `logit_noise` moves: "rsample" every choice, "gumbel" all but the first.
        drop: Which routes stay over capacity: "random", "position" (all first choices before any
            second) or "score".
        balance: "all" or "first"; see `gate`.

    Raises:
        ValueError: An unknown option, a `top_k` out of range, or shapes that do not fit.

    Example:
        >>> tokens, weight = torch.eye(4), torch.eye(4)
        >>> route(tokens, weight, top_k=1, capacity=4).ids.flatten().tolist()
        [0, 1, 2, 3]
    """
    if tokens.dim() != 2 or tokens.shape[1] != weight.shape[1]:
        raise ValueError(
            f"tokens: shape {tuple(tokens.shape)} does not fit a router weight of shape "
            f"{tuple(weight.shape)}; expected [tokens, {weight.shape[1]}]"
        )
    if not 1 <= top_k <= weight.shape[0]:
        raise ValueError(f"top_k: {top_k} must be between 1 and {weight.shape[0]} experts")
    if drop not in DROPS:
        raise ValueError(f"drop: {drop!r} is unknown; use one of {', '.join(DROPS)}")
    if drop == "random" and random_priority is None:
        raise ValueError("random_priority: drop='random' needs a priority per token")
    scores, ids, logits, counts, aux_loss, z_loss, entropy = torch.ops.moeify.gate(
        tokens,
        weight,
        selection_bias,
        input_noise,
        logit_noise,
        top_k,
        score,
        noise,
        balance,
        combine in ("straight_through", "sum"),
    )
    priority: Tensor | None = None
    if drop == "score":
        priority = scores.detach()
    elif drop == "random" and random_priority is not None:
        priority = random_priority[:, None].expand(ids.shape)
    slots, order, offsets = torch.ops.moeify.assign(ids, priority, weight.shape[0], capacity)
    weights = torch.ops.moeify.combine_weights(scores, slots, combine)
    dropped = ids.numel() - offsets[-1]
    return Routing(
        ids, weights, slots, order, offsets, counts, aux_loss, z_loss, entropy, dropped, logits
    )
