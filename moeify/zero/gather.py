"""Gather a parameter from the pieces of its ranks, and control what autograd keeps of it.

    whole      = all-gather(piece)                   forward; at stage 3 again in the backward pass
    piece.grad = reduce-scatter(factor * gradient)   once for each gather

Every parameter is gathered separately; bucketing gathers and overlapping them with other work is
the compiler's job. At stage 3 no gathered parameter lives until the backward pass: compiled,
gathers are tagged to run again there; eager, autograd keeps the piece instead (`regathering`).
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
from moeify.distributed.collectives import run, summed
from moeify.distributed.dtensor import from_local, is_sharded
from moeify.errors import DerivativeError, MoeifyError

__all__ = ["Gathering", "gathered", "regathering"]

_MARK = "_moeify_gathered"  # attribute of a gathered parameter's storage


@dataclass(frozen=True, slots=True)
class Gathering:
    """How one parameter is gathered."""

    name: str  # for messages
    ranks: int
    dim: int | None  # dimension that is cut; None if every rank holds it whole
    size: int  # of that dimension when it is whole
    group: str
    # Group that reduces gradients: another one, as both run at once in the backward pass.
    reducing: str
    factor: float  # what a gradient is multiplied by before it is summed over the ranks
    summed: str = ""  # tensor group that sums the gradient first
    dtype: torch.dtype | None = None  # of the gathered parameter; None keeps the piece's
    reduce: torch.dtype | None = None  # in which gradients are reduced; None keeps theirs
    again: bool = False  # the backward pass gathers again (stage 3)
    # (mesh, placements, shape) of a slice of a dense layer, a DTensor when it has been gathered.
    rest: tuple[Any, tuple[Any, ...], torch.Size] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Gathering:
        return self


def gathered(parameter: Any, how: Gathering) -> Any:
    """Return the whole of a parameter from this rank's piece, a DTensor; differentiable.

    A plain tensor, or a DTensor over the tensor ranks if it is a slice (`Gathering.rest`).
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
    return from_local(whole, *how.rest)


def _gather(piece: Tensor, how: Gathering) -> Tensor:
    apply: Callable[..., Tensor] = _Gather.apply
    return apply(
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
        slices: str,
        dtype: torch.dtype | None,
        reduce: torch.dtype | None,
    ) -> Tensor:
        ctx.call = name, ranks, dim, reducing, factor, slices, reduce
        ctx.like = piece.dtype, 0 if dim is None else piece.shape[dim]
        return _whole(piece, name, ranks, dim, size, group, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        name, ranks, dim, reducing, factor, slices, reduce = ctx.call
        dtype, length = ctx.like
        where = f"gradient of {name}"
        if grad.requires_grad and not torch.compiler.is_compiling():
            raise DerivativeError(
                f"{name}: the gradient of a partitioned parameter cannot be differentiated again; "
                "use a plan without `zero` for second derivatives"
            )
        grad = (grad if reduce is None else grad.to(reduce)) * factor
        if slices:
            grad = summed(grad, slices, where)
        if ranks > 1:
            if dim is None:
                grad = summed(grad, reducing, where)
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
    """Return the whole of a piece; a view of it if no other rank has another."""
    if dtype is not None:
        piece = piece.to(dtype)
    if ranks == 1 or dim is None:
        return piece.view_as(piece)
    rows = _padded(piece.movedim(dim, 0), -(-size // ranks))
    op = torch.ops._c10d_functional.all_gather_into_tensor
    whole = run(op, rows, ranks, group, where=name)
    if dim == 0 and whole.shape[0] == size:
        return whole
    # A view would do, but compiled by torch 2.11 its gradient is lost.
    return whole.narrow(0, 0, size).movedim(0, dim).clone(memory_format=torch.contiguous_format)


def _reduce_scatter(
    grad: Tensor, ranks: int, dim: int, length: int, group: str, where: str
) -> Tensor:
    rows = grad.movedim(dim, 0)
    rows = _padded(rows, -(-rows.shape[0] // ranks) * ranks)
    op = torch.ops._c10d_functional.reduce_scatter_tensor
    piece = run(op, rows, "sum", ranks, group, where=where)
    return piece.narrow(0, 0, length).movedim(0, dim).contiguous()


def _padded(rows: Tensor, length: int) -> Tensor:
    """Return rows [R, ...] padded with zeros to `length`, the same on all ranks."""
    if rows.shape[0] < length:
        rows = torch.cat([rows, rows.new_zeros(length - rows.shape[0], *rows.shape[1:])])
    return rows.contiguous()


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


def _gathers_again() -> Any:
    """Tell a compiler to recompute all of a gather in the backward pass."""
    contexts: Callable[..., Any] = create_selective_checkpoint_contexts
    return contexts(_policy)


class _Again:
    """What autograd keeps of a gathered parameter: the piece, and how to gather it again."""

    def __init__(self, parameter: Tensor, piece: Tensor, how: Gathering) -> None:
        self.parameter, self.piece, self.how = parameter, piece, how
        self.version = compat.version(parameter)  # the local tensor's does not count
        self._whole: weakref.ref[Tensor] | None = None

    def __call__(self) -> Tensor:
        """Gather, or return what another view of it still holds."""
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

    Inside activation checkpointing, which keeps nothing at all, it has no effect.
    """
    return torch.autograd.graph.saved_tensors_hooks(_pack, _unpack)


def _pack(tensor: Tensor) -> Any:
    local, rebuild = tensor, None
    if is_sharded(tensor):
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
