"""`moeify::assign` in Triton: a counting sort of the routes by expert, in blocks.

Three kernels make one pass: count each block's routes per expert, scan the counts over the blocks,
then rank each block's routes by comparing all pairs. Dropless that is all. With a capacity a first
pass ranks the routes in order of priority and sends those beyond it to an extra expert after all
others, so that the second pass places them on the unused rows. Up to 1024 routes one program does
everything.

Shapes: T tokens, E experts, K top-k, R = T * K rows, B blocks of routes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels.triton.arithmetic import ordered

MAX_EXPERTS = 1023
SMALL = 1024
"""Routes that one program assigns."""
BLOCK_R = 128
"""Routes per program, where there are more."""

_FLOAT_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _urgency(priority, route, inside, tokens, TOP_K: tl.constexpr):
    """Return keys that rise from the route kept first to the one dropped first, all distinct."""
    position = route % TOP_K * tokens + route // TOP_K
    if priority is None:
        return position
    else:
        value = tl.load(priority + route, mask=inside, other=0.0)
        finite = tl.minimum(tl.maximum(value, -_FLOAT_MAX), _FLOAT_MAX)
        falling = -ordered(tl.where(value != value, float("-inf"), finite)).to(tl.int64)
        return falling * 2**31 + position


@triton.jit
def _count(pairs):
    return tl.sum(pairs.to(tl.int32), axis=1)


@triton.jit(do_not_specialize=["tokens", "routes", "capacity"])
def assign_small_kernel(
    ids,
    priority,
    slots,
    order,
    offsets,
    tokens,
    routes,
    experts,
    capacity,
    TOP_K: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BINS: tl.constexpr,
):
    """Assign at most BLOCK_R routes in one program, by comparing all pairs, BLOCK_C at a time."""
    route, bins = tl.arange(0, BLOCK_R), tl.arange(0, BINS)
    inside = route < routes
    expert = tl.load(ids + route, mask=inside, other=-1)
    key = expert * BLOCK_R + route
    if CAPPED:
        urgency = _urgency(priority, route, inside, tokens, TOP_K)
    rank, kept_before, dropped_before, kept_count = route * 0, route * 0, route * 0, 0
    start = 0
    while start < routes:
        other = start + tl.arange(0, BLOCK_C)
        other_inside = other < routes
        other_expert = tl.load(ids + other, mask=other_inside, other=-2)
        before = (other_expert * BLOCK_R + other)[None, :] < key[:, None]
        kept = other_inside
        if CAPPED:
            other_urgency = _urgency(priority, other, other_inside, tokens, TOP_K)
            same = other_expert[None, :] == expert[:, None]
            rank += _count(same & (other_urgency[None, :] < urgency[:, None]))
            ahead = same & (urgency[:, None] < other_urgency[None, :])
            kept = other_inside & (tl.sum(ahead.to(tl.int32), axis=0) < capacity)
            dropped_before += _count(before & (other_inside & ~kept)[None, :])
            kept_count += tl.sum(kept.to(tl.int32), axis=0)
        kept_before += _count(before & kept[None, :])
        start += BLOCK_C
    row = kept_before
    kept = inside
    if CAPPED:
        kept = inside & (rank < capacity)
        row = tl.where(kept, kept_before, kept_count + dropped_before)
    tl.store(slots + route, tl.where(kept, row, -1), mask=inside)
    tl.store(order + row, tl.where(kept, route, -1), mask=inside)
    counts = tl.histogram(expert, BINS, mask=kept)
    tl.store(offsets + bins, tl.cumsum(counts, axis=0), mask=bins < experts)


@triton.jit
def _route_at(position, inside, permutation, tokens, TOP_K: tl.constexpr, RANKED: tl.constexpr):
    """Return the route at a position: itself, or ranked, all first choices before any second."""
    if permutation is not None:
        position = tl.load(permutation + position, mask=inside, other=0).to(tl.int32)
    return position % tokens * TOP_K + position // tokens if RANKED else position


@triton.jit
def _rank(expert, index):
    """Return how many routes of the same expert a block holds before each."""
    same = expert[:, None] == expert[None, :]
    return _count(same & (index[None, :] < index[:, None]))


@triton.jit(do_not_specialize=["routes", "tokens"])
def count_kernel(
    ids,
    permutation,
    block_counts,
    routes,
    tokens,
    TOP_K: tl.constexpr,
    RANKED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BINS: tl.constexpr,
):
    """Count each expert's routes in each block; block_counts [B, BINS]."""
    position = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = position < routes
    route = _route_at(position, inside, permutation, tokens, TOP_K, RANKED)
    counts = tl.histogram(tl.load(ids + route, mask=inside, other=0), BINS, mask=inside)
    tl.store(block_counts + tl.program_id(0) * BINS + tl.arange(0, BINS), counts)


@triton.jit(do_not_specialize=["blocks"])
def scan_kernel(
    block_counts,
    before,
    totals,
    blocks,
    BINS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sum the counts over the blocks: before [B, BINS] each block, and in total [BINS]."""
    column = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.int32)
    start = 0
    while start < blocks:
        block = start + tl.arange(0, BLOCK_B)
        place = block[:, None] * BINS + column[None, :]
        counts = tl.load(block_counts + place, mask=(block < blocks)[:, None], other=0)
        sums = total[None, :] + tl.cumsum(counts, axis=0) - counts
        tl.store(before + place, sums, mask=(block < blocks)[:, None])
        total += tl.sum(counts, axis=0)
        start += BLOCK_B
    tl.store(totals + column, total)


@triton.jit(do_not_specialize=["routes", "tokens", "capacity"])
def drop_kernel(
    ids,
    permutation,
    before,
    kept,
    routes,
    tokens,
    experts,
    capacity,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BINS: tl.constexpr,
):
    """Copy ids to kept [R], with `experts` in place of those whose rank is over capacity."""
    index = tl.arange(0, BLOCK_R)
    position = tl.program_id(0) * BLOCK_R + index
    inside = position < routes
    route = _route_at(position, inside, permutation, tokens, TOP_K, True)
    expert = tl.load(ids + route, mask=inside, other=0)
    earlier = tl.load(before + tl.program_id(0) * BINS + expert, mask=inside, other=0)
    over = earlier + _rank(expert, index) >= capacity
    tl.store(kept + route, tl.where(over, experts, expert), mask=inside)


@triton.jit(do_not_specialize=["routes"])
def place_kernel(
    ids,
    before,
    totals,
    slots,
    order,
    offsets,
    routes,
    experts,
    BLOCK_R: tl.constexpr,
    BINS: tl.constexpr,
):
    """Give every route its row; the first program also stores the offsets."""
    index, bins = tl.arange(0, BLOCK_R), tl.arange(0, BINS)
    route = tl.program_id(0) * BLOCK_R + index
    inside = route < routes
    expert = tl.load(ids + route, mask=inside, other=0)
    counts = tl.load(totals + bins)
    ends = tl.cumsum(counts, axis=0)
    earlier = tl.load(before + tl.program_id(0) * BINS + expert, mask=inside, other=0)
    row = tl.gather(ends - counts, expert, axis=0) + earlier + _rank(expert, index)
    kept = expert < experts
    tl.store(slots + route, tl.where(kept, row, -1), mask=inside)
    tl.store(order + row, tl.where(kept, route, -1), mask=inside)
    if tl.program_id(0) == 0:
        tl.store(offsets + bins, ends, mask=bins < experts)


def assign(ids: Tensor, priority: Tensor | None, experts: int, capacity: int) -> Any:
    """Do what `assign_reference` does, for up to 1023 experts and float32 priorities."""
    tokens, top_k = ids.shape
    routes = tokens * top_k
    served = ids.dtype == torch.int32 and experts <= MAX_EXPERTS
    if not served or (priority is not None and priority.dtype != torch.float32):
        return NotImplemented
    slots, order, offsets = (ids.new_empty(n) for n in (ids.shape, routes, experts))
    if not routes:
        return slots, order, offsets.zero_()
    ids = ids.contiguous()
    capped = capacity < tokens
    if routes <= SMALL:
        assign_small_kernel[(1,)](
            ids,
            None if priority is None or not capped else priority.contiguous(),
            slots,
            order,
            offsets,
            tokens,
            routes,
            experts,
            capacity,
            TOP_K=top_k,
            CAPPED=capped,
            BINS=bin_count(experts),
            **small_sizes(routes, capped),
        )
        return slots, order, offsets
    if capped:
        ids = _dropped(ids, priority, experts, capacity)
    before, totals = count(ids, experts)
    place_kernel[(before.shape[0],)](
        ids,
        before,
        totals,
        slots,
        order,
        offsets,
        routes,
        experts,
        BLOCK_R=BLOCK_R,
        BINS=bin_count(experts),
        num_warps=8,
    )
    return slots, order, offsets


def count(
    ids: Tensor,
    experts: int,
    permutation: Tensor | None = None,
    choices: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the routes per expert in the blocks before each [B, BINS], and in total [BINS].

    `choices` ranks all first choices before any second and counts that many per token; without it
    all routes are counted in their order. `permutation` [R] is the order in which the blocks take
    the ranked routes.
    """
    tokens, top_k = ids.shape
    routes = tokens * (top_k if choices is None else choices)
    blocks, bins = triton.cdiv(routes, BLOCK_R), bin_count(experts)
    block_counts, before = ids.new_empty(blocks, bins), ids.new_empty(blocks, bins)
    totals = ids.new_empty(bins)
    if blocks:
        count_kernel[(blocks,)](
            ids,
            permutation,
            block_counts,
            routes,
            tokens,
            TOP_K=top_k,
            RANKED=choices is not None,
            BLOCK_R=BLOCK_R,
            BINS=bins,
        )
    scan_kernel[(bins // 16,)](
        block_counts, before, totals, blocks, BINS=bins, BLOCK_B=128, BLOCK_E=16
    )
    return before, totals


def _dropped(ids: Tensor, priority: Tensor | None, experts: int, capacity: int) -> Tensor:
    """Return ids with E in place of the routes over capacity."""
    tokens, top_k = ids.shape
    permutation = None
    if priority is not None:
        falling = priority.t().flatten().nan_to_num(nan=-torch.inf)
        permutation = falling.sort(descending=True, stable=True).indices
    before, _ = count(ids, experts, permutation, top_k)
    kept = torch.empty_like(ids)
    drop_kernel[(before.shape[0],)](
        ids,
        permutation,
        before,
        kept,
        ids.numel(),
        tokens,
        experts,
        capacity,
        TOP_K=top_k,
        BLOCK_R=BLOCK_R,
        BINS=bin_count(experts),
        num_warps=8,
    )
    return kept


def small_sizes(routes: int, capped: bool) -> dict[str, int]:
    """Return the blocks and warps of `assign_small_kernel`."""
    if routes <= 128:
        return {"BLOCK_R": 128, "BLOCK_C": 32, "num_warps": 4}
    return {"BLOCK_R": SMALL, "BLOCK_C": 8 if capped else 32, "num_warps": 16}


def bin_count(experts: int) -> int:
    """Return how many bins count the routes of each expert and the unused ones."""
    return max(16, int(triton.next_power_of_2(experts + 1)))
