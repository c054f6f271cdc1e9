"""Sizes and layouts of an exchange of rows, as nodes of a block's graph.

What is announced to the other ranks, the splits that follow from it, and the rows that they cut.
A `capacity` is the rows of each expert in an even layout, or -1 in an uneven one.

Shapes: D model width, N ranks of a group, L experts of this rank, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from moeify.distributed import collectives
from moeify.errors import DispatchError
from moeify.kernels import check_counts as _check_counts  # noqa: F401  registers the op
from moeify.kernels import combine as _combine  # noqa: F401
from moeify.kernels import dispatch as _dispatch  # noqa: F401
from moeify.kernels.all_to_all_layout import part_capacity

__all__ = [
    "cut",
    "is_coordinated",
    "padded",
    "pieces",
    "rows_of",
    "segments",
    "send_capacity",
    "send_counts",
    "splits",
    "staged_splits",
    "transposed",
]

_check: Any = torch._check  # untyped in torch


def send_counts(counts: Tensor, capacity: int | torch.SymInt, ranks: int) -> Tensor:
    """Return what to announce to each rank before rows are sent, [N, L + 1] int64.

    Rows for each of its experts, then the capacity or the sum; `counts` is [N * L] int64.
    """
    rows = counts.view(ranks, -1)
    if _is_even(capacity):
        last = torch.full_like(rows[:, :1], cast(int, capacity))
    else:
        last = rows.sum(1, keepdim=True)
    return torch.cat([rows, last], 1)


def splits(
    announced: Tensor, counts: Tensor, capacity: int | torch.SymInt
) -> tuple[list[int], list[int]]:
    """Return how many rows go to each rank of the group, and how many come from each.

    From what `send_counts`, [N, L + 1] int64, and `check_counts`, [N, L] int64, returned.
    """
    ranks, experts = counts.shape
    if _is_even(capacity):
        each: Any = experts * capacity
        return [each] * ranks, [each] * ranks
    # The host waits for the device here.
    values = _to_host([announced[:, :-1].sum(1), counts.sum(1)])
    return values[:ranks], values[ranks:]


def pieces(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return `count` equal pieces of rows [count * R, D]."""
    return rows.view(count, -1, rows.shape[1]).unbind(0)


def transposed(counts: Tensor, outer: int, inner: int) -> Tensor:
    """Return blocks [outer * inner, ...] as [inner * outer, ...], transposed."""
    return counts.view(outer, inner, -1).transpose(0, 1).reshape(outer * inner, -1)


def segments(announced: Tensor, capacity: int | torch.SymInt, outer: int, inner: int) -> Tensor:
    """Return the rows of each of `outer` x `inner` neighbouring blocks, [outer, inner] int64.

    `announced` is [outer * inner, L + 1] int64, as `send_counts` returns it.
    """
    rows = announced[:, :-1]
    if _is_even(capacity):
        return torch.full_like(rows[:, 0], rows.shape[1] * cast(int, capacity)).view(outer, inner)
    return rows.sum(1).view(outer, inner)


def staged_splits(
    announced: Tensor,
    local_counts: Tensor,
    counts: Tensor,
    capacity: int | torch.SymInt,
    nodes: int,
    places: int,
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Return the splits of both stages of a hierarchical all-to-all.

    Args:
        announced: [nodes * places, L + 1] int64, what `send_counts` returned, by destination.
        local_counts: [places * nodes, L + 1] int64, received on the node, by source and target
            node.
        counts: [nodes * places, L] int64, what `check_counts` returned, by source.
        capacity: See above.
        nodes: How many there are.
        places: Ranks on each node.

    Returns:
        Rows to and from each rank of the node, to and from each node, and all rows that leave.
    """
    experts = counts.shape[1]
    if _is_even(capacity):
        each: Any = experts * capacity
        near, far = [each * nodes] * places, [each * places] * nodes
        return near, near, far, far, near
    out = segments(announced, capacity, nodes, places)
    held = segments(local_counts, capacity, places, nodes)
    from_nodes = counts.sum(1).view(nodes, places).sum(1)
    values = _to_host([out.sum(0), held.sum(1), held.sum(0), from_nodes])
    ends = [places, 2 * places, 2 * places + nodes]
    first, second = values[: ends[0]], values[ends[0] : ends[1]]
    return first, second, values[ends[1] : ends[2]], values[ends[2] :], first


def cut(rows: Tensor, send: Sequence[int]) -> Tensor:
    """Return the rows to send: the first `sum(send)` of [R, D]."""
    total = sum(send)
    if not torch.compiler.is_compiling():
        if total == rows.shape[0]:
            return rows
        if total > rows.shape[0]:
            raise DispatchError(f"{total} rows were announced, but there are {rows.shape[0]}")
    _check(total <= rows.shape[0])
    return rows.narrow(0, 0, total)


def padded(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows [r, D] with zeros after them, as many as `like` [R, D] has; undoes `cut`."""
    missing = like.shape[0] - rows.shape[0]
    if not torch.compiler.is_compiling() and missing == 0:
        return rows
    _check(missing >= 0)
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])


def send_capacity(capacity: int | torch.SymInt, parts: int) -> int | torch.SymInt:
    """Return the rows of each expert in one of P parts of an even layout; -1 for an uneven one."""
    found: int | torch.SymInt = part_capacity(capacity, parts)
    return found


def rows_of(rows: Tensor) -> int:
    """Return the number of rows of [R, ...]."""
    return rows.shape[0]


def is_coordinated(block: nn.Module) -> bool:
    """Tell whether the ranks of a tensor group share out the rows that this block sends."""
    assert isinstance(block, fx.GraphModule)
    return any(node.target is collectives.share for node in block.graph.nodes)


def _is_even(capacity: int | torch.SymInt) -> bool:
    return isinstance(capacity, torch.SymInt) or capacity >= 0


def _to_host(counts: list[Tensor]) -> list[int]:
    values: list[int] = torch.cat(counts).tolist()
    for value in values:
        _check(value >= 0)
    return values
