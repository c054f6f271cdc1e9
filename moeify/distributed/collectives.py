"""Collectives as nodes of a block's graph, differentiable, with errors that name layer and phase.

Functional collectives of torch. A group is its name, a string, so that graphs can be copied,
pickled and compiled. In compiled code, which cannot catch, torch's own error stays.

Shapes: D model width, N ranks of a group, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeify.errors import DispatchError

__all__ = [
    "all_to_all",
    "copy_to_slices",
    "from_first",
    "share",
    "sum_of_slices",
    "sum_over_ranks",
    "summed",
    "unshare",
    "wait",
]


def _run(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    apply: Callable[..., Tensor] = function.apply
    return apply(*args)


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
    result: Tensor = _run(_AllToAll, rows, list(receive), list(send), group, where)
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
    def forward(
        ctx: Any, rows: Tensor, receive: list[int], send: list[int], group: str, where: str
    ) -> Tensor:
        ctx.way = receive, send, group, where
        return _all_to_all(rows, receive, send, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
    result: Tensor = _run(_Share, rows, index, ranks, group, where)
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
    result: Tensor = _run(_Unshare, rows, index, ranks, group, where)
    return result


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: int, ranks: int, group: str, where: str) -> Tensor:
        ctx.way = ranks, group, where
        return _part(rows, index, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ranks, group, where = ctx.way
        return _gather(grad, ranks, group, f"gradient of {where}"), None, None, None, None


class _Unshare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: int, ranks: int, group: str, where: str) -> Tensor:
        ctx.way = index, ranks
        return _gather(rows, ranks, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
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
    result: Tensor = _run(_CopyToSlices, rows, group, where)
    return result


def sum_of_slices(rows: Tensor, group: str, where: str) -> Tensor:
    """Return the sum of rows over the ranks of the group; the gradient goes to each as it is.

    Stands where sliced experts return: function g of Megatron-LM.

    Args:
        rows: [R, D], the part that this rank's slice gives.
        group: Name of the group.
        where: Layer and purpose, for messages.
    """
    result: Tensor = _run(_SumOfSlices, rows, group, where)
    return result


class _CopyToSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, where: str) -> Tensor:
        ctx.way = group, where
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, where = ctx.way
        return summed(grad, group, f"gradient of {where}"), None, None


class _SumOfSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, where: str) -> Tensor:
        return summed(rows, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


def summed(tensor: Tensor, group: str, where: str) -> Tensor:
    """Return the sum of a tensor over the ranks of a group; no gradient of its own."""
    op = torch.ops._c10d_functional.all_reduce
    return wait(op(tensor.contiguous(), "sum", group), where)


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str, where: str) -> Tensor:
        ctx.way = group, where
        return summed(tensor, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, where = ctx.way
        return summed(grad, group, f"gradient of {where}"), None, None


def sum_over_ranks(tensor: Tensor, group: str, where: str) -> Tensor:
    """Return the sum over ranks that hold different data; the gradient is the sum of theirs."""
    result: Tensor = _run(_SumOverRanks, tensor, group, where)
    return result


def from_first(tensor: Tensor, group: str, where: str) -> Tensor:
    """Return the tensor of the first rank of the group; no gradient."""
    op = torch.ops._c10d_functional.broadcast
    return wait(op(tensor, 0, group), where)
