"""Collectives as nodes of a block's graph, differentiable, with errors that name layer and phase.

Functional collectives of torch. A group is its name, a string, so that graphs can be copied,
pickled and compiled. In compiled code, which cannot catch exceptions, torch's own error stays.
Backward passes can be differentiated again; forward mode and the transforms of `torch.func`, which
torch would drop here, are refused.

The argument `where` of each is layer and purpose, for messages.

Shapes: D model width, N ranks of a group, R rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moeify import compat
from moeify.errors import DerivativeError, DispatchError

__all__ = [
    "all_to_all",
    "copy_to_slices",
    "from_first",
    "run",
    "share",
    "start",
    "sum_of_slices",
    "sum_over_ranks",
    "summed",
    "unshare",
    "wait",
]


def start(op: Any, *args: Any, where: str) -> Tensor:
    """Start a collective of `torch.ops._c10d_functional`; read its result after `wait`.

    Raises:
        DispatchError: A peer died, stalled or runs other collectives.
        DerivativeError: In forward mode or a transform of `torch.func`, which torch would drop.
    """
    if torch.compiler.is_compiling():
        compiled: Tensor = op(*args)
        return compiled
    _check_mode(args, where)
    try:
        started: Tensor = op(*args)
    except RuntimeError as error:
        reason = str(error).split("\n", 1)[0]
        raise DispatchError(
            f"{where}: rank {torch.distributed.get_rank()} could not exchange rows: {reason} (a "
            "peer died or stalled, or the ranks do not run the same plan; look for its own error)"
        ) from error
    return started


def wait(tensor: Tensor, where: str) -> Tensor:
    """Wait for a collective that `start` or `all_to_all` returned.

    Raises:
        DispatchError: A peer died, stalled or runs other collectives.
    """
    return start(torch.ops._c10d_functional.wait_tensor, tensor, where=where)


def run(op: Any, *args: Any, where: str) -> Tensor:
    """Start a collective and wait for it; raises what `start` and `wait` raise."""
    return wait(start(op, *args, where=where), where)


def all_to_all(
    rows: Tensor, receive: Sequence[int], send: Sequence[int], group: str, where: str
) -> Tensor:
    """Start a differentiable all-to-all; read its result, [sum(receive), ...], after `wait`.

    `receive` and `send` count the rows from and to each rank of the group; the rows, [sum(send),
    ...], are contiguous by destination.
    """
    if torch.compiler.is_compiling() or not rows.requires_grad:
        return _all_to_all(rows, receive, send, group, where)
    return _apply(_AllToAll, rows, list(receive), list(send), group, where)


def _check_mode(args: Sequence[Any], where: str) -> None:
    if compat.differentiated_by_formula(args):
        raise DerivativeError(
            f"{where}: forward-mode derivatives and transforms of torch.func do not pass between "
            "ranks; use torch.autograd.grad (create_graph=True for second derivatives), or a model "
            "converted without `parallel`"
        )


def _twice(grad: Tensor) -> bool:
    """Tell whether a backward pass is to be differentiated again."""
    return grad.requires_grad and not torch.compiler.is_compiling()


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    if not torch.compiler.is_compiling():
        *_, where = args
        _check_mode(args, where)
    apply: Callable[..., Tensor] = function.apply
    return apply(*args)


def _all_to_all(
    rows: Tensor, receive: Sequence[int], send: Sequence[int], group: str, where: str
) -> Tensor:
    op = torch.ops._c10d_functional.all_to_all_single
    return start(op, rows.contiguous(), receive, send, group, where=where)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, receive: list[int], send: list[int], group: str, where: str
    ) -> Tensor:
        ctx.call = receive, send, group, where
        return _all_to_all(rows, receive, send, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        receive, send, group, where = ctx.call
        where = f"gradient of {where}"
        back = wait(all_to_all(grad, send, receive, group, where), where)
        return back, None, None, None, None


def share(rows: Tensor, index: int, ranks: int, group: str, where: str) -> Tensor:
    """Return part `index`, [R, D], of rows [N * R, D] that are the same on all N ranks.

    The gradient is gathered from all ranks.

    Source:
        Parallelism-coordinated communication: DeepSpeed-MoE (Rajbhandari et al. 2022) section 5.3.
    """
    return _apply(_Share, rows, index, ranks, group, where)


def unshare(rows: Tensor, index: int, ranks: int, group: str, where: str) -> Tensor:
    """Return the parts [R, D] of all ranks, [N * R, D], of which `index` is this rank's own.

    Undoes `share`.
    """
    return _apply(_Unshare, rows, index, ranks, group, where)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: int, ranks: int, group: str, where: str) -> Tensor:
        ctx.call = index, ranks, group, where
        return _part(rows, index, ranks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        index, ranks, group, where = ctx.call
        where = f"gradient of {where}"
        if _twice(grad):
            return unshare(grad, index, ranks, group, where), None, None, None, None
        return _gather(grad, ranks, group, where), None, None, None, None


class _Unshare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: int, ranks: int, group: str, where: str) -> Tensor:
        ctx.call = index, ranks, group, where
        return _gather(rows, ranks, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Every rank goes on with the same rows, so their gradients are the same everywhere.
        index, ranks, group, where = ctx.call
        if _twice(grad):
            return share(grad, index, ranks, group, f"gradient of {where}"), *[None] * 4
        return _part(grad, index, ranks), None, None, None, None


def _part(rows: Tensor, index: int, ranks: int) -> Tensor:
    each = rows.shape[0] // ranks
    return rows.narrow(0, index * each, each).clone()


def _gather(rows: Tensor, ranks: int, group: str, where: str) -> Tensor:
    op = torch.ops._c10d_functional.all_gather_into_tensor
    return run(op, rows.contiguous(), ranks, group, where=where)


def copy_to_slices(rows: Tensor, group: str, where: str) -> Tensor:
    """Return rows as they are; their gradient is the sum over the ranks of the group.

    Stands where rows that all ranks of the group hold go into sliced experts: each slice gives a
    part of the gradient (Megatron-LM, Shoeybi et al. 2019, section 3, function f).
    """
    return _apply(_CopyToSlices, rows, group, where)


def sum_of_slices(rows: Tensor, group: str, where: str) -> Tensor:
    """Return the sum of rows over the ranks of the group; the gradient goes to each as it is.

    Stands where sliced experts return: function g of Megatron-LM.
    """
    return _apply(_SumOfSlices, rows, group, where)


def sum_over_ranks(tensor: Tensor, group: str, where: str) -> Tensor:
    """Return the sum over ranks that hold different data; the gradient is the sum of theirs."""
    return _apply(_SumOverRanks, tensor, group, where)


class _CopyToSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, where: str) -> Tensor:
        ctx.call = group, where
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, where = ctx.call
        where = f"gradient of {where}"
        add = sum_of_slices if _twice(grad) else summed
        return add(grad, group, where), None, None


class _SumOfSlices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: str, where: str) -> Tensor:
        ctx.call = group, where
        return summed(rows, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if _twice(grad):
            group, where = ctx.call
            grad = copy_to_slices(grad, group, f"gradient of {where}")
        return grad, None, None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str, where: str) -> Tensor:
        ctx.call = group, where
        return summed(tensor, group, where)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        group, where = ctx.call
        add = sum_over_ranks if _twice(grad) else summed
        return add(grad, group, f"gradient of {where}"), None, None


def summed(tensor: Tensor, group: str, where: str) -> Tensor:
    """Return the sum of a tensor over the ranks of a group; not differentiable."""
    op = torch.ops._c10d_functional.all_reduce
    return run(op, tensor.contiguous(), "sum", group, where=where)


def from_first(tensor: Tensor, group: str, where: str) -> Tensor:
    """Return the tensor of the first rank of the group; not differentiable."""
    return run(torch.ops._c10d_functional.broadcast, tensor, 0, group, where=where)
