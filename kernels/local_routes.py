"""`moeify::local_routes`: the routes of all ranks that lead to this rank's experts.

Shapes: S tokens of all ranks, K top-k, L local experts, R = S * K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.kernels.assign import rows_by_expert
from moeify.kernels.registry import define, fake


def local_routes_reference(ids: Tensor, first: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give the routes to experts `first`, ..., `first + L - 1` a row each, by expert.

    Args:
        ids: [S, K] int32, expert of each route, -1 where it was dropped.
        first: First local expert.
        experts: L.

    Returns:
        slots [S, K] int32, the row of each route, -1 where it leads elsewhere; order [R] int32, the
        flat route in each row, -1 where unused; offsets [L] int32, end of each expert's rows.
    """
    flat = ids.flatten().long() - first
    flat = torch.where((flat >= 0) & (flat < experts) & (ids.flatten() >= 0), flat, experts)
    slots, order, offsets = rows_by_expert(flat, experts)
    return slots.view(ids.shape), order, offsets


local_routes = define(
    "local_routes",
    "(Tensor ids, int first, int experts) -> (Tensor, Tensor, Tensor)",
    local_routes_reference,
)


@fake("local_routes")
def _(ids: Tensor, first: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        ids.new_empty(ids.shape),
        ids.new_empty(ids.shape[0] * ids.shape[1]),
        ids.new_empty(experts),
    )
