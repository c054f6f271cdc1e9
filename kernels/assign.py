"""`moeify::assign`: which chosen routes keep a place, and at which row of the packed buffer.

The buffer always has R = T * K rows. The kept rows of expert 0 come first, then those of expert 1
and so on; the rows after the last kept one are unused. Within an expert rows are in token order,
whatever the drop policy, so that the layout says nothing about the policy.

Shapes: T tokens, E experts, K top-k, R = T * K rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeify.kernels.registry import define, fake

DROPS = ("random", "position", "score")


def assign_reference(
    ids: Tensor, priority: Tensor | None, experts: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Give every route that fits its expert's capacity a row, and drop the others.

    Over capacity the routes of highest priority stay; equal priorities stay in order of position:
    all first choices before any second, then the lower token. The op has no gradient.

    Args:
        ids: [T, K] int32, the chosen experts, distinct within a token.
        priority: [T, K] float, or None for position alone; NaN is the lowest.
        experts: E.
        capacity: Rows per expert at most; T or more keeps everything.

    Returns:
        slots [T, K] int32, the row of each route, -1 where dropped; order [R] int32, the flat
        route `t * K + j` in each row, -1 where unused; offsets [E] int32, the end of each expert's
        rows.

    Source:
        Capacity and position order: GShard (Lepikhin et al. 2020) algorithm 1. Random priority:
        random token selection, DeepSpeed MoE. Score order: batch prioritized routing, V-MoE
        (Riquelme et al. 2021) section 4.1.
    """
    tokens, top_k = ids.shape
    flat = ids.flatten().long()
    if capacity < tokens:
        flat = torch.where(_kept(ids, priority, experts, capacity), flat, experts)
    slots, order, offsets = rows_by_expert(flat, experts)
    return slots.view(tokens, top_k), order, offsets


assign = define(
    "assign",
    "(Tensor ids, Tensor? priority, int experts, SymInt capacity) -> (Tensor, Tensor, Tensor)",
    assign_reference,
    cpu="moeify.kernels.cpu.rows:assign",
    cuda="moeify.kernels.triton.assign:assign",
)


@fake("assign")
def _(
    ids: Tensor, priority: Tensor | None, experts: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, top_k = ids.shape
    return (
        ids.new_empty(tokens, top_k),
        ids.new_empty(tokens * top_k),
        ids.new_empty(experts),
    )


def rows_by_expert(flat: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Give each route [R] int64 a row, sorted by expert; E marks routes that get none.

    Returns slots [R], order [R] and offsets [E], int32, as `assign` does.
    """
    expert, order = flat.sort(stable=True)
    unused = expert == experts
    rows = torch.arange(flat.shape[0], device=flat.device)
    slots = torch.empty_like(flat).scatter_(0, order, rows.masked_fill(unused, -1))
    ends = torch.arange(experts, device=flat.device)
    offsets = torch.searchsorted(expert, ends, right=True)
    return slots.int(), order.masked_fill(unused, -1).int(), offsets.int()


def _kept(ids: Tensor, priority: Tensor | None, experts: int, capacity: int) -> Tensor:
    """Return [R] bool: which flat routes are among the first `capacity` of their expert."""
    tokens, top_k = ids.shape
    routes = torch.arange(tokens * top_k, device=ids.device)
    ranked = routes.view(tokens, top_k).t().flatten()  # first choices before second ones
    if priority is not None:
        wide = priority.t().flatten().nan_to_num(nan=-torch.inf)
        ranked = ranked[wide.sort(descending=True, stable=True).indices]
    grouped, by_expert = ids.flatten().long()[ranked].sort(stable=True)
    starts = torch.searchsorted(grouped, torch.arange(experts, device=ids.device))
    rank = routes - starts[grouped]
    kept = torch.empty(tokens * top_k, dtype=torch.bool, device=ids.device)
    return kept.scatter_(0, ranked[by_expert], rank < capacity)
