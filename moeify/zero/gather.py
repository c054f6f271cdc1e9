"""Gathering a parameter from the pieces of its ranks, and what autograd keeps of it.

    whole      = all-gather(piece)                   forward; at stage 3 again in the backward pass
    piece.grad = reduce-scatter(factor * gradient)   once for each gather

Every parameter is gathered on its own; to bucket gathers and to overlap them with other work is
the compiler's job. At stage 3 nothing gathered lives until the backward pass: compiled, gathers are
tagged to be run again there; eager, autograd is given the piece to keep instead (`regathering`).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from moeify import compat
from moeify.distributed.collectives import failed, wait
from moeify.errors import MoeifyError

__all__ = ["Gathering", "gathered", "regathering"]

_MARK = "_moeify_gathered"
"""Where the memory of a gathered parameter says what it is."""


@dataclass(frozen=True, slots=True)
class Gathering:
    """How one parameter is put together.

    Attributes:
        name: The parameter's name, for messages.
        ranks: Number of pieces.
        dim: Dimension that is cut; None if every rank holds it whole.
        size: Length of that dimension when it is whole.
        group: Name of the group that gathers.
        reducing: Name of the group that reduces gradients: a group of its own, as gradients travel
            while gathers of the backward pass do.
        factor: What a gradient is multiplied by before it is summed over the ranks.
        summed: Name of the tensor group that sums the gradient first; "" if none does.
        dtype: What it is gathered and computed in; None keeps the piece's.
        reduce: What gradients are reduced in; None keeps theirs.
        again: Whether the backward pass gathers again (stage 3).
        rest: (mesh, placements, shape) of the DTensor that it is when it has been gathered, a slice
            of a dense layer; None for a plain tensor.
    """

    name: str
    ranks: int
    dim: int | None
    size: int
    group: str
    reducing: str
    factor: float
    summed: str = ""
    dtype: torch.dtype | None = None
    reduce: torch.dtype | None = None
    again: bool = False
    rest: tuple[Any, tuple[Any, ...], torch.Size] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Gathering:
        return self


def gathered(parameter: Any, how: Gathering) -> Any:
    """Return a parameter of which this rank holds a piece, whole, with its gradient.

    Args:
        parameter: The piece, a DTensor.
        how: How it is put together.

    Returns:
        A plain tensor, or a DTensor over the tensor ranks if it is a slice (`Gathering.rest`).

    Raises:
        DispatchError: A peer died or went another way.
    """
    piece: Tensor = parameter.to_local()
    compiled = torch.compiler.is_compiling()
    if compiled and how.again and how.dim is not None:
        whole = checkpoint(_gather, piece, how, use_reentrant=False, context_fn=_gathers_again)
    else:
        whole = _gather(piece, how)
    if how.again and how.dim is not None and not compiled:
        mark = _Again(parameter, piece.detach(), how)
        setattr(whole.untyped_storage(), _MARK, mark)  # lives as long as the memory itself
    if how.rest is None:
        return whole
    from torch.distributed.tensor import DTensor

    mesh, placements, shape = how.rest
    return DTensor.from_local(
        whole, mesh, placements, run_check=False, shape=shape, stride=_stride(shape)
    )


def _gather(piece: Tensor, how: Gathering) -> Tensor:
    run: Callable[..., Tensor] = _Gather.apply
    return run(
        piece,
        how.name,
        how.ranks,
        how.dim,
        how.size,
        how.group,
        how.reducing,
        how.factor,
        how.summed,
        how.dtype,
        how.reduce,
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        piece: Tensor,
        name: str,
        ranks: int,
        dim: int | None,
        size: int,
        group: str,
        reducing: str,
        factor: float,
        summed: str,
        dtype: torch.dtype | None,
        reduce: torch.dtype | None,
    ) -> Tensor:
        ctx.way = name, ranks, dim, reducing, factor, summed, reduce
        ctx.like = piece.dtype, 0 if dim is None else piece.shape[dim]
        return _whole(piece, name, ranks, dim, size, group, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        name, ranks, dim, reducing, factor, summed, reduce = ctx.way
        dtype, length = ctx.like
        where = f"gradient of {name}"
        grad = (grad if reduce is None else grad.to(reduce)) * factor
        if summed:
            grad = _all_reduce(grad, summed, where)
        if ranks > 1:
            if dim is None:
                grad = _all_reduce(grad, reducing, where)
            else:
                grad = _reduce_scatter(grad, ranks, dim, length, reducing, where)
        return (grad.to(dtype), *[None] * 10)


def _whole(
    piece: Tensor,
    name: str,
    ranks: int,
    dim: int | None,
    size: int,
    group: str,
    dtype: torch.dtype | None,
) -> Tensor:
    """Return the whole of a piece; a view of it if no other rank has more."""
    if dtype is not None:
        piece = piece.to(dtype)
    if ranks == 1 or dim is None:
        return piece.view_as(piece)
    rows = _padded(piece.movedim(dim, 0), -(-size // ranks))
    op = torch.ops._c10d_functional.all_gather_into_tensor
    together = _done(lambda: op(rows, ranks, group), name)
    if dim == 0 and together.shape[0] == size:
        return together
    # A view would do, but compiled by torch 2.11 its gradient is lost.
    return together.narrow(0, 0, size).movedim(0, dim).clone(memory_format=torch.contiguous_format)


def _reduce_scatter(
    grad: Tensor, ranks: int, dim: int, length: int, group: str, where: str
) -> Tensor:
    rows = grad.movedim(dim, 0)
    rows = _padded(rows, -(-rows.shape[0] // ranks) * ranks)
    op = torch.ops._c10d_functional.reduce_scatter_tensor
    mine = _done(lambda: op(rows, "sum", ranks, group), where)
    return mine.narrow(0, 0, length).movedim(0, dim).contiguous()


def _all_reduce(grad: Tensor, group: str, where: str) -> Tensor:
    op = torch.ops._c10d_functional.all_reduce
    rows = grad.contiguous()
    return _done(lambda: op(rows, "sum", group), where)


def _padded(rows: Tensor, length: int) -> Tensor:
    """Return rows [R, ...] and zeros up to `length`: ranks send equally much."""
    if rows.shape[0] < length:
        rows = torch.cat([rows, rows.new_zeros(length - rows.shape[0], *rows.shape[1:])])
    return rows.contiguous()


def _done(start: Callable[[], Tensor], where: str) -> Tensor:
    if torch.compiler.is_compiling():
        return wait(start(), where)
    try:
        sent = start()
    except RuntimeError as error:
        raise failed(where, error) from error
    return wait(sent, where)


def _stride(shape: torch.Size) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


def _gathers_again() -> Any:
    """Tell a compiler that the backward pass computes all of a gather again."""
    contexts: Callable[..., Any] = create_selective_checkpoint_contexts
    return contexts(_policy)


class _Again:
    """What autograd keeps of a gathered parameter: the piece, and how to gather it once more."""

    def __init__(self, parameter: Tensor, piece: Tensor, how: Gathering) -> None:
        self.parameter, self.piece, self.how = parameter, piece, how
        self.version = compat.version(parameter)  # the DTensor's: its local tensor counts nothing
        self._whole: weakref.ref[Tensor] | None = None

    def __call__(self) -> Tensor:
        """Gather; what another view of it still holds is used again."""
        whole = None if self._whole is None else self._whole()
        if whole is None:
            how = self.how
            if compat.version(self.parameter) != self.version:
                raise MoeifyError(
                    f"{how.name} was changed between its forward and its backward pass, so its "
                    "gradient would be wrong; step the optimizer after the backward pass"
                )
            whole = _whole(self.piece, how.name, how.ranks, how.dim, how.size, how.group, how.dtype)
            self._whole = weakref.ref(whole)
        return whole


def regathering() -> Any:
    """Return a context in which autograd keeps pieces of what `gathered` returned at stage 3.

    Inside of activation checkpointing that region's own rules hold: it keeps nothing at all.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Any:
    local, rebuild = tensor, None
    if hasattr(tensor, "to_local"):
        sliced: Any = tensor.detach()
        local = sliced.to_local()
        rebuild = partial(
            type(sliced).from_local,
            device_mesh=sliced.device_mesh,
            placements=sliced.placements,
            run_check=False,
            shape=sliced.shape,
            stride=sliced.stride(),
        )
    again = getattr(compat.storage_of(local), _MARK, None)
    if again is None or local.dtype != (again.how.dtype or again.piece.dtype):
        return tensor
    return again, (local.size(), local.stride(), local.storage_offset()), rebuild


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    again, (size, stride, offset), rebuild = kept
    with torch.no_grad():
        whole = again()
        local: Tensor = whole.as_strided(size, stride, offset)
        return local if rebuild is None else rebuild(local)
