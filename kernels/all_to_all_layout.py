"""`moeify::send_layout`, `moeify::receive_layout`: the rows on both sides of an all-to-all.

A sender lays its rows out by part, then by expert, that is, by destination rank; a receiver gets
one such block from each rank, and sorts the rows by expert. Both are index arithmetic without a
gradient; `dispatch` and `combine` move the rows.

*Even* layouts give each expert `capacity` rows whether they are used or not: every size is known
before the routing is, and nothing waits for the device. *Uneven* ones (capacity -1) have no gaps.

Shapes: T tokens, E experts, K top-k, P parts, S sources, W rows sent or received.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.kernels.registry import define, fake


def part_rows(routes: Any, experts: int, capacity: Any, parts: int) -> Any:
    """Return the rows of one part, an int or a SymInt.

    Even: a share of `capacity`, rounded up, for each expert. Uneven: the upper bound of
    `sum_e ceil(n_e / P)` with `sum_e n_e <= routes`.
    """
    if isinstance(capacity, torch.SymInt) or capacity >= 0:
        return experts * part_capacity(capacity, parts)
    if parts == 1:
        return routes
    most = (routes + experts * (parts - 1)) // parts
    smaller: Any = torch.sym_min(most, routes)  # type: ignore[no-untyped-call]
    return smaller


def part_capacity(capacity: Any, parts: int) -> Any:
    """Return the rows of each expert in one part of an even layout; -1 for an uneven one."""
    if not isinstance(capacity, torch.SymInt) and capacity < 0:
        return -1
    return (capacity + parts - 1) // parts


def send_layout_reference(
    slots: Tensor, offsets: Tensor, capacity: int, parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the permutation that lays the rows of a routing out for sending.

    The n-th row of an expert goes to part `n % P`, so that every part holds an equal share of
    every expert.

    Args:
        slots: [T, K] int32, row of each route in the packed buffer, -1 where dropped.
        offsets: [E] int32, end of each expert's rows there.
        capacity: Rows per expert in an even layout, at least as many as any expert has; or -1.
        parts: P, the number of equal parts that the rows are divided into.

    Returns:
        order [W] int32, the flat route in each row, -1 where unused; slots [T, K] int32, the new
        row of each route; counts [P, E] int64, used rows. Part p has the rows from `p * W / P`
        on, by expert.
    """
    experts = offsets.shape[0]
    each = part_rows(slots.numel(), experts, capacity, parts)
    rows, device = each * parts, slots.device
    ends = offsets.long()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    part = torch.arange(parts, device=device)[:, None]
    counts = (ends - starts - part + parts - 1).div(parts, rounding_mode="floor")
    if capacity < 0:
        begin = part * each + counts.cumsum(1) - counts
    else:
        block = torch.arange(parts * experts, device=device).view(parts, experts)
        begin = block * part_capacity(capacity, parts)
    flat = slots.flatten().long()
    used = flat >= 0
    expert = torch.searchsorted(ends, flat, right=True).clamp_max(experts - 1)
    place = flat - starts[expert]
    row = begin[place % parts, expert] + place.div(parts, rounding_mode="floor")
    order = torch.full((rows + 1,), -1, dtype=torch.int32, device=device)
    routes = torch.arange(flat.shape[0], device=device, dtype=torch.int32)
    order.scatter_(0, torch.where(used, row, rows), routes)
    order[rows:] = -1
    return order[:rows].clone(), torch.where(used, row, -1).view(slots.shape).int(), counts


send_layout = define(
    "send_layout",
    "(Tensor slots, Tensor offsets, SymInt capacity, int parts) -> (Tensor, Tensor, Tensor)",
    send_layout_reference,
)


@fake("send_layout")
def _(slots: Tensor, offsets: Tensor, capacity: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    experts = offsets.shape[0]
    rows = part_rows(slots.shape[0] * slots.shape[1], experts, capacity, parts) * parts
    return (
        slots.new_empty(rows),
        slots.new_empty(slots.shape),
        slots.new_empty(parts, experts, dtype=torch.int64),
    )


def receive_layout_reference(
    counts: Tensor, rows: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the permutation that sorts received rows, by source and then by expert, by expert.

    Within an expert they stay in the order of their sources. With A x B counts of segments instead
    of sources x experts this is the transposition of any such layout.

    Args:
        counts: [S, E] int64, used rows from each source for each expert.
        rows: Received rows W.
        capacity: Rows of each segment in an even layout; -1 if there are no gaps.

    Returns:
        order [W] int32, the received row in each sorted one, -1 where unused; slots [W, 1] int32,
        its inverse; offsets [E] int32, end of each expert's sorted rows.
    """
    flat, device = counts.flatten(), counts.device
    row = torch.arange(rows, device=device)
    if capacity < 0:
        ends = flat.cumsum(0)
        begin = ends - flat
        segment = torch.searchsorted(ends, row, right=True).clamp_max(flat.shape[0] - 1)
    else:
        begin = torch.arange(flat.shape[0], device=device) * capacity
        segment = row.div(max(capacity, 1), rounding_mode="floor")
    place = row - begin[segment]
    used = place < flat[segment]
    total = counts.sum(0)
    ends = total.cumsum(0)
    target = (ends - total + counts.cumsum(0) - counts).flatten()
    slot = target[segment] + place
    order = torch.full((rows + 1,), -1, dtype=torch.int32, device=device)
    order.scatter_(0, torch.where(used, slot, rows), row.int())
    return order[:rows].clone(), torch.where(used, slot, -1).int()[:, None], ends.int()


receive_layout = define(
    "receive_layout",
    "(Tensor counts, SymInt rows, SymInt capacity) -> (Tensor, Tensor, Tensor)",
    receive_layout_reference,
)


@fake("receive_layout")
def _(counts: Tensor, rows: int, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    return (
        counts.new_empty(rows, dtype=torch.int32),
        counts.new_empty(rows, 1, dtype=torch.int32),
        counts.new_empty(counts.shape[1], dtype=torch.int32),
    )
