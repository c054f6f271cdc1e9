"""Pieces of parameters for the optimizer of `stage1.py`: cutting, updating and gathering them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from moeify import compat
from moeify.distributed.collectives import run
from moeify.distributed.dtensor import from_local, local_of
from moeify.errors import MoeifyError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Cut", "Piece", "buckets", "gather", "local_part", "make_piece"]

BUCKET_BYTES = 25 << 20  # of whole parameters, gathered at a time


@dataclass(frozen=True, slots=True)
class Cut:
    """How what an optimizer keeps of one parameter is partitioned."""

    mesh: DeviceMesh  # one-dimensional: "dp" for dense parameters, "edp" for experts
    # Mesh of the pieces: `mesh` for a plain parameter; for a DTensor, `mesh` and then the
    # parameter's own mesh, such as ("edp", "ep").
    joint: DeviceMesh
    # Cut as `torch.chunk` does, not along a sharded dimension. None: every rank keeps all of it.
    dim: int | None

    def __deepcopy__(self, memo: Any) -> Cut:
        return self  # process groups cannot be copied


@dataclass(slots=True, eq=False)
class Piece:
    """What this rank keeps of one parameter."""

    parameter: Tensor  # the model's own
    cut: Cut | None  # None: all of it is kept
    start: int  # in the parameter's local part, along `cut.dim`
    length: int
    shard: Tensor  # the piece, as the optimizer sees it
    copied: bool  # whether it has memory of its own, not the parameter's
    version: int  # of the parameter when the two were last equal

    @property
    def gathered(self) -> bool:
        """Whether other ranks keep other pieces."""
        return self.cut is not None and self.cut.dim is not None and self.cut.mesh.size() > 1

    def of(self, local: Tensor) -> Tensor:
        """Return this piece of a local tensor, as a view."""
        if self.cut is None or self.cut.dim is None:
            return local
        return local.narrow(self.cut.dim, self.start, self.length)

    @property
    def room(self) -> int:
        """Elements of the largest piece of any rank."""
        assert self.cut is not None
        assert self.cut.dim is not None
        local = local_part(self.parameter)
        size = local.shape[self.cut.dim]
        return local.numel() // size * _each(size, self.cut) if size else 0

    def adopt(self) -> None:
        """Copy what was written into the parameter since the last step into the piece.

        Raises:
            MoeifyError: The parameter was moved to other memory, which the piece does not see.
        """
        local, shard = local_part(self.parameter), local_part(self.shard)
        part = self.of(local)
        if not self.copied:
            if part.numel() and (part.data_ptr(), part.dtype) != (shard.data_ptr(), shard.dtype):
                raise MoeifyError(
                    f"a parameter of shape {tuple(self.parameter.shape)} was moved or cast after "
                    "its optimizer was made; make the optimizer after model.to(...)"
                )
        elif compat.version(local) != self.version:
            shard.copy_(_merged(part.to(shard.device), shard))

    def gradient(self) -> Tensor | None:
        """Return this piece of the gradient, with the piece's layout, or None."""
        parameter, shard = self.parameter, self.shard
        grad = parameter.grad
        if grad is None:
            return None
        if grad.layout != torch.strided:
            raise MoeifyError(
                f"a parameter of shape {tuple(parameter.shape)} has a gradient of layout "
                f"{grad.layout}, which cannot be cut; use sparse=False"
            )
        if (
            isinstance(grad, DTensor)
            and isinstance(parameter, DTensor)
            and grad.placements != parameter.placements
        ):
            grad = grad.redistribute(placements=parameter.placements)
        like = local_part(shard)
        part = self.of(local_part(grad)).to(like.device, like.dtype)
        return compat.dtensor_like(part, shard) if isinstance(shard, DTensor) else part


@torch.no_grad()
def make_piece(
    parameter: Tensor,
    cut: Cut | None,
    value: Tensor | None,
    device: torch.device | None,
    dtype: torch.dtype | None,
) -> Piece:
    """Return this rank's piece of a parameter, a view unless device or dtype differ.

    A copy starts from `value`, if given, where that is what the parameter was cast from.

    Raises:
        MoeifyError: The cut, or the value, does not fit the parameter.
    """
    local = local_part(parameter)
    start, length = 0, 0
    if cut is not None and cut.dim is not None:
        size = local.shape[cut.dim]
        start = min(size, cut.mesh.get_local_rank() * _each(size, cut))
        length = min(size, start + _each(size, cut)) - start
    piece = Piece(parameter, cut, start, length, local, False, compat.version(local))
    own = piece.of(local)
    device, dtype = device or local.device, dtype or local.dtype
    piece.copied = device.type != local.device.type or dtype != local.dtype
    if piece.copied:
        if value is not None and value.shape != own.shape:
            raise MoeifyError(
                f"master weights of shape {tuple(value.shape)} were given for a piece of shape "
                f"{tuple(own.shape)}"
            )
        empty = torch.empty(own.shape, dtype=dtype, device=device)
        own = empty.copy_(own if value is None else _merged(own, value.detach()))
    piece.shard = _laid_out(own, parameter, cut).requires_grad_()
    return piece


def _merged(now: Tensor, exact: Tensor) -> Tensor:
    """Return values that were changed, and of the others the bits that a cast has lost."""
    exact = exact.to(now.device)
    return torch.where(now == exact.to(now.dtype), exact, now.to(exact.dtype))


def local_part(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, detached."""
    return local_of(tensor.detach())


def _each(size: int, cut: Cut) -> int:
    return -(-size // cut.mesh.size())


def _laid_out(value: Tensor, parameter: Tensor, cut: Cut | None) -> Tensor:
    """Return a piece as a DTensor; a plain parameter that is not cut stays plain."""
    whole = parameter if isinstance(parameter, DTensor) else None
    own: tuple[Placement, ...] = () if whole is None else tuple(whole.placements)
    placements = own
    if cut is not None:
        mesh = cut.joint
        sizes = () if whole is None else tuple(whole.device_mesh.shape)
        again = cut.dim is not None and any(getattr(p, "dim", None) == cut.dim for p in own)
        if tuple(mesh.shape) != (cut.mesh.size(), *sizes) or again:
            raise MoeifyError(
                f"a parameter of shape {tuple(parameter.shape)}, laid out as {own or 'whole'}, "
                f"cannot be cut along dimension {cut.dim} on a mesh of {tuple(mesh.shape)}: that "
                f"must be {(cut.mesh.size(), *sizes)}, and the dimension not sharded yet"
            )
        placements = (Replicate() if cut.dim is None else Shard(cut.dim), *own)
    elif whole is not None:
        mesh = whole.device_mesh
    else:
        return value
    empty = torch.empty(value.shape, dtype=value.dtype, device="meta")
    if own and compat.is_halves(own[-1]):
        dim = getattr(own[-1], "dim", 0)
        like = compat.sharded_halves(empty, mesh, placements, parameter.shape, dim)
    else:
        like = from_local(empty, mesh, placements, parameter.shape)
    return compat.dtensor_like(value, like)  # from_local would move it to the mesh's device


def buckets(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces that are gathered together, in the same order on all ranks."""
    filling: dict[Any, list[Piece]] = {}
    sizes: dict[Any, int] = {}
    for piece in pieces:
        if not piece.gathered:
            continue
        assert piece.cut is not None
        local = local_part(piece.parameter)
        key = piece.cut.mesh.get_group().group_name, local.dtype, local.device
        filling.setdefault(key, []).append(piece)
        size = piece.room * piece.cut.mesh.size() * local.dtype.itemsize
        sizes[key] = sizes.get(key, 0) + size
        if sizes[key] >= BUCKET_BYTES:
            del sizes[key]
            yield filling.pop(key)
    yield from filling.values()


def gather(pieces: list[Piece]) -> None:
    """Set the parameters of one bucket to the pieces of all ranks of its group."""
    assert pieces[0].cut is not None
    mesh = pieces[0].cut.mesh
    rooms = [piece.room for piece in pieces]
    first = local_part(pieces[0].parameter)
    sent = torch.empty(sum(rooms), dtype=first.dtype, device=first.device)
    for piece, slot in zip(pieces, torch.split(sent, rooms), strict=True):
        shard = local_part(piece.shard)
        slot[: shard.numel()].view(shard.shape).copy_(shard)
    group = mesh.get_group().group_name
    op = torch.ops._c10d_functional.all_gather_into_tensor
    where = f"gather of parameters from {mesh.size()} ranks after an optimizer step"
    # As bytes, which every backend supports.
    received = run(op, sent.view(torch.uint8), mesh.size(), group, where=where).view(first.dtype)
    slots = torch.split(received.view(mesh.size(), -1), rooms, dim=1)
    for piece, slot in zip(pieces, slots, strict=True):
        assert piece.cut is not None
        assert piece.cut.dim is not None
        _write(local_part(piece.parameter), piece.cut.dim, slot)


def _write(whole: Tensor, dim: int, rows: Tensor) -> None:
    """Write the pieces of all ranks, [ranks, elements of the largest], into a tensor."""
    ranks, size = rows.shape[0], whole.shape[dim]
    if size % ranks == 0:
        target = torch.unflatten(whole, dim, (ranks, size // ranks)).movedim(dim, 0)
        target.copy_(torch.unflatten(rows, 1, target.shape[1:]))
        return
    parts = torch.split(whole, -(-size // ranks), dim)
    for target, row in zip(parts, rows, strict=False):  # the last ranks may have nothing
        target.copy_(row[: target.numel()].view(target.shape))
