"""What the passes put into a block's graph to carry rows to the ranks of their experts and back.

Plain functions over functional collectives, each one node of the graph. A group is its name, a
string, so that graphs can be copied, pickled and compiled. A collective that fails names the layer
and what it was doing there; in compiled code, which cannot catch, torch's own error stays.

Shapes: T tokens, D model width, N ranks of a group, L experts of this rank, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moeify.errors import DispatchError
from moeify.kernels import check_counts as _check_counts  # noqa: F401  registers the op
from moeify.kernels import combine as _combine  # noqa: F401
from moeify.kernels import dispatch as _dispatch  # noqa: F401
from moeify.kernels.wire import part_capacity

__all__ = [
    "all_to_all",
    "copy_to_slices",
    "cut",
    "notice",
    "padded",
    "share",
    "splits",
    "sum_of_slices",
    "unshare",
    "wait",
]


def notice(counts: Tensor, capacity: int | torch.SymInt, ranks: int) -> Tensor:
    """Return what to announce to each rank before rows are sent.

    Args:
        counts: [N * L] int64, rows for each expert.
        capacity: Rows of each expert in an even layout, or -1.
        ranks: N.

    Returns:
        [N, L + 1] int64: rows for each of its experts; then the capacity, or the sum.
    """
    rows = counts.view(ranks, -1)
    even = isinstance(capacity, torch.SymInt) or capacity >= 0
    last = torch.full_like(rows[:, :1], capacity) if even else rows.sum(1, keepdim=True)
    return torch.cat([rows, last], 1)


def splits(
    sent: Tensor, counts: Tensor, capacity: int | torch.SymInt
) -> tuple[list[int], list[int]]:
    """Return how many rows go to each rank of the group, and how many come from each.

    In an uneven layout the host has to wait for the device here.

    Args:
        sent: [N, L + 1] int64, what was announced.
        counts: [N, L] int64, what `check_counts` returned.
        capacity: Rows of each expert in an even layout, or -1.
    """
    ranks, experts = counts.shape
    if isinstance(capacity, torch.SymInt) or capacity >= 0:
        each: Any = experts * capacity
        return [each] * ranks, [each] * ranks
    values = torch.cat([sent[:, :-1].sum(1), counts.sum(1)]).tolist()
    for value in values:
        torch._check(value >= 0)
    return values[:ranks], values[ranks:]


def pieces(rows: Tensor, count: int) -> tuple[Tensor, ...]:
    """Return `count` equal pieces of rows [count * R, D]."""
    return rows.view(count, -1, rows.shape[1]).unbind(0)


def turned(said: Tensor, outer: int, inner: int) -> Tensor:
    """Return blocks [outer * inner, ...] as [inner * outer, ...], transposed."""
    return said.view(outer, inner, -1).transpose(0, 1).reshape(outer * inner, -1)


def segments(said: Tensor, capacity: int | torch.SymInt, outer: int, inner: int) -> Tensor:
    """Return the rows of each of `outer` x `inner` neighbouring blocks, [outer, inner] int64.

    Args:
        said: [outer * inner, L + 1] int64, rows for each expert and their sum, or the capacity.
        capacity: Rows of each expert in an even layout, or -1.
        outer: Slow index of the blocks.
        inner: Fast one.
    """
    rows = said[:, :-1]
    if isinstance(capacity, torch.SymInt) or capacity >= 0:
        return torch.full_like(rows[:, 0], rows.shape[1] * capacity).view(outer, inner)
    return rows.sum(1).view(outer, inner)


def staged_splits(
    said: Tensor,
    middle: Tensor,
    counts: Tensor,
    capacity: int | torch.SymInt,
    nodes: int,
    places: int,
) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    """Return the splits of both stages of a hierarchical all-to-all.

    Args:
        said: [nodes * places, L + 1] int64, announced by this rank, by destination.
        middle: [places * nodes, L + 1] int64, heard on the node, by source and target node.
        counts: [nodes * places, L] int64, what `check_counts` returned, by source.
        capacity: Rows of each expert in an even layout, or -1.
        nodes: Nodes.
        places: Ranks on each.

    Returns:
        Rows to and from each rank of the node, to and from each node, and all rows that leave.
    """
    experts = counts.shape[1]
    if isinstance(capacity, torch.SymInt) or capacity >= 0:
        each: Any = experts * capacity
        near, far = [each * nodes] * places, [each * places] * nodes
        return near, near, far, far, near
    out = segments(said, capacity, nodes, places)
    held = segments(middle, capacity, places, nodes)
    parts = [out.sum(0), held.sum(1), held.sum(0), counts.sum(1).view(nodes, places).sum(1)]
    values = torch.cat(parts).tolist()
    for value in values:
        torch._check(value >= 0)
    ends = [places, 2 * places, 2 * places + nodes]
    first, second = values[: ends[0]], values[ends[0] : ends[1]]
    return first, second, values[ends[1] : ends[2]], values[ends[2] :], first


def cut(rows: Tensor, send: Sequence[int]) -> Tensor:
    """Return the rows that are sent: the first `sum(send)` of [R, D]."""
    total = sum(send)
    if not torch.compiler.is_compiling() and total == rows.shape[0]:
        return rows
    torch._check(total <= rows.shape[0])
    return rows.narrow(0, 0, total)


def padded(rows: Tensor, like: Tensor) -> Tensor:
    """Return rows [r, D] with zeros after them, as many as `like` [R, D] has; undoes `cut`."""
    missing = like.shape[0] - rows.shape[0]
    if not torch.compiler.is_compiling() and missing == 0:
        return rows
    torch._check(missing >= 0)
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])])


def all_to_all(
    rows: Tensor, receive: Sequence[int], send: Sequence[int], group: str, where: str
) -> Tensor:
    """Start an all-to-all; what it returns may be read after `wait`.

    Args:
        rows: [sum(send), ...], contiguous by destination.
        receive: Rows from each rank of the group.
        send: Rows to each rank of the group.
        group: Name of the group.
        where: Layer and purpose, for messages.

    Returns:
        [sum(receive), ...]. Differentiable: the gradient travels the other way.
    """
    if torch.compiler.is_compiling() or not rows.requires_grad:
        return _all_to_all(rows, receive, send, group, where)
    result: Tensor = _AllToAll.apply(rows, list(receive), list(send), group, where)
    return result


def wait(tensor: Tensor, where: str) -> Tensor:
    """Wait for a collective.

    Args:
        tensor: What it returned.
        where: Layer and purpose, for messages.

    Raises:
        DispatchError: It failed: a peer died, stalled or went another way.
    """
    op = torch.ops._c10d_functional.wait_tensor
    if torch.compiler.is_compiling():
        compiled: Tensor = op(tensor)
        return compiled
    try:
        done: Tensor = op(tensor)
    except RuntimeError as error:
        raise failed(where, error) from error
    return done


def failed(where: str, error: Exception) -> DispatchError:
    """Return the error for a collective that did not come to its end."""
    reason = str(error).split("\n", 1)[0]
    return DispatchError(
        f"{where}: rank {torch.distributed.get_rank()} could not exchange rows: {reason} (a peer "
        "died or stalled, or the ranks do not run the same plan; look for its own error)"
    )


def _all_to_all(
    rows: Tensor, receive: Sequence[int], send: Sequence[int], group: str, where: str
) -> Tensor:
    op = torch.ops._c10d_functional.all_to_all_single
    if torch.compiler.is_compiling():
        compiled: Tensor = op(rows.contiguous(), receive, send, group)
        return compiled
    try:
        started: Tensor = op(rows.contiguous(), receive, send, group)
    except RuntimeError as error:
        raise failed(where, error) from error
    return started


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, receive: list[int], send: list[int], group: str, where: str
    ) -> Tensor:
        ctx.way = receive, send, group, where
        return _all_to_all(rows, receive, send, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        receive, send, group, where = ctx.way
        where = f"gradient of {where}"
        back = wait(_all_to_all(grad, send, receive, group, where), where)
        return back, None, None, None, None


def share(rows: Tensor, index: int, ranks: int, group: str, where: str) -> Tensor:
    """Return one of N equal parts of rows that all ranks of the group hold; its gradient is whole.

    Args:
        rows: [N * R, D], the same on every rank of the group.
        index: Which part.
        ranks: N.
        group: Name of the group.
        where: Layer and purpose, for messages.

    Returns:
        [R, D].

    Source:
        Parallelism-coordinated communication: DeepSpeed-MoE (Rajbhandari et al. 2022) section 5.3.
    """
    result: Tensor = _Share.apply(rows, index, ranks, group, where)
    return result


def unshare(rows: Tensor, index: int, ranks: int, group: str, where: str) -> Tensor:
    """Return the parts of all ranks of the group, in their order; undoes `share`.

    Args:
        rows: [R, D], as many on every rank.
        index: Which part is this rank's own.
        ranks: N.
        group: Name of the group.
        where: Layer and purpose, for messages.

    Returns:
        [N * R, D], the same on every rank. Every rank goes on with the same, so the gradient of a
        rank's part is its part of the gradient.
    """
    result: Tensor = _Unshare.apply(rows, index, ranks, group, where)
    return result


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, index: int, ranks: int, group: str, where: str
    ) -> Tensor:
        ctx.way = ranks, group, where
        return _part(rows, index, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ranks, group, where = ctx.way
        return _gather(grad, ranks, group, f"gradient of {where}"), None, None, None, None


class _Unshare(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, rows: Tensor, index: int, ranks: int, group: str, where: str
    ) -> Tensor:
        ctx.way = index, ranks
        return _gather(rows, ranks, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return _part(grad, *ctx.way), None, None, None, None


def _part(rows: Tensor, index: int, ranks: int) -> Tensor:
    each = rows.shape[0] // ranks
    return rows.narrow(0, index * each, each).clone()


def _gather(rows: Tensor, ranks: int, group: str, where: str) -> Tensor:
    op = torch.ops._c10d_functional.all_gather_into_tensor
    return wait(op(rows.contiguous(), ranks, group), where)


def copy_to_slices(rows: Tensor, group: str, where: str) -> Tensor:
    """Return rows as they are; their gradient is the sum over the ranks of the group.

    Stands where rows that all ranks of the group hold go into sliced experts: each slice gives a
    part of the gradient (Megatron-LM, Shoeybi et al. 2019, section 3, function f).

    Args:
        rows: [R, D], the same on every rank.
        group: Name of the group.
        where: Layer and purpose, for messages.
    """
    result: Tensor = _CopyToSlices.apply(rows, group, where)
    return result


def sum_of_slices(rows: Tensor, group: str, where: str) -> Tensor:
    """Return the sum of rows over the ranks of the group; the gradient goes to each as it is.

    Stands where sliced experts return: function g of Megatron-LM.

    Args:
        rows: [R, D], the part that this rank's slice gives.
        group: Name of the group.
        where: Layer and purpose, for messages.
    """
    result: Tensor = _SumOfSlices.apply(rows, group, where)
    return result


class _CopyToSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, where: str) -> Tensor:  # type: ignore[override]
        ctx.way = group, where
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        group, where = ctx.way
        return summed(grad, group, f"gradient of {where}"), None, None


class _SumOfSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, where: str) -> Tensor:  # type: ignore[override]
        return summed(rows, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None, None


def summed(tensor: Tensor, group: str, where: str) -> Tensor:
    """Return the sum of a tensor over the ranks of a group; no gradient of its own."""
    op = torch.ops._c10d_functional.all_reduce
    return wait(op(tensor.contiguous(), "sum", group), where)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str, where: str) -> Tensor:  # type: ignore[override]
        ctx.way = group, where
        return summed(tensor, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        group, where = ctx.way
        return summed(grad, group, f"gradient of {where}"), None, None


def sum_over_ranks(tensor: Tensor, group: str, where: str) -> Tensor:
    """Return the sum over ranks that hold different data; the gradient is the sum of theirs."""
    result: Tensor = _SumOverRanks.apply(tensor, group, where)
    return result


def wire_capacity(capacity: int | torch.SymInt, parts: int) -> int | torch.SymInt:
    """Return the rows of each expert in one of P parts of an even layout; -1 for an uneven one."""
    found: int | torch.SymInt = part_capacity(capacity, parts)
    return found


def rows_of(rows: Tensor) -> int:
    """Return the number of rows of [R, ...]."""
    return rows.shape[0]
