"""A tensor distributed over several ranks, as rectangles of the whole.

Every layout of a DTensor is, along each dimension, a few runs of neighbouring indices; what a rank
holds is their product. It is computed here because torch's own offsets support one run only, and
are silently wrong where a dimension is cut twice (FSDP2 over slices) or in halves (gate and up).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moeify.distributed.dtensor import is_sharded
from moeify.errors import CheckpointError

__all__ = ["Piece", "Pieces", "runs_of"]

Run = tuple[int, int]  # first index and length


@dataclass(frozen=True, slots=True)
class Piece:
    """One rectangle of a tensor."""

    at: tuple[int, ...]  # where it begins in the whole tensor
    view: Tensor  # of what the rank holds

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """The same for torch.distributed.checkpoint."""
        return ChunkStorageMetadata(torch.Size(self.at), self.view.shape)


@dataclass(frozen=True, slots=True)
class Pieces:
    """What a rank holds of a tensor."""

    shape: torch.Size  # of the whole tensor
    dtype: torch.dtype
    parts: tuple[Piece, ...]  # none of them empty

    @classmethod
    def of(cls, tensor: Tensor, name: str) -> Pieces:
        """Describe a tensor or DTensor, without copying it."""
        live: Any = tensor.detach()
        shape = torch.Size(live.shape)
        if live.is_sparse or live.is_quantized or live.layout != torch.strided:
            raise CheckpointError(f"{name}: is sparse or quantised, which cannot be saved")
        local = live.to_local() if is_sharded(live) else live
        if local.is_meta:
            raise CheckpointError(f"{name}: is on meta and has no values; materialise it")
        if not is_sharded(live):
            whole = (Piece((0,) * live.ndim, live),) if live.numel() else ()
            return cls(shape, live.dtype, whole)
        place = live.device_mesh.get_coordinate()
        if place is None or not local.numel():
            return cls(shape, live.dtype, ())
        cuts = list(zip(live.placements, live.device_mesh.shape, place, strict=True))
        runs = [runs_of(size, dim, cuts, name) for dim, size in enumerate(shape)]
        held = tuple(sum(length for _, length in row) for row in runs)
        if held != tuple(local.shape):
            raise CheckpointError(
                f"{name}: its placements {live.placements} say {held} on this rank, but it holds "
                f"{tuple(local.shape)}: moeify does not support this layout"
            )
        parts = []
        for rectangle in product(*(_placed(row) for row in runs)):
            view = local
            for dim, (_, length, start) in enumerate(rectangle):
                view = view.narrow(dim, start, length)
            parts.append(Piece(tuple(first for first, _, _ in rectangle), view))
        return cls(shape, live.dtype, tuple(parts))

    @property
    def chunks(self) -> list[ChunkStorageMetadata]:
        """The rectangles for torch.distributed.checkpoint."""
        return [part.chunk for part in self.parts]

    def write_items(self, key: str) -> list[WriteItem]:
        """Return what torch.distributed.checkpoint plans a save with."""
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(key, part.at),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(part.chunk, properties, self.shape),
            )
            for part in self.parts
        ]

    def at(self, offset: Sequence[int] | None) -> Tensor:
        """Return the rectangle that begins at an offset."""
        for part in self.parts:
            if part.at == tuple(offset or ()):
                return part.view
        raise KeyError(offset)

    def copied(self) -> Pieces:
        """Return the same values copied to the CPU."""
        parts = tuple(
            Piece(part.at, torch.empty_like(part.view, device="cpu").copy_(part.view))
            for part in self.parts
        )
        return Pieces(self.shape, self.dtype, parts)


def runs_of(size: int, dim: int, cuts: Sequence[tuple[Any, int, int]], name: str) -> list[Run]:
    """Return which indices along one dimension of `size` a rank holds.

    `cuts` are placement, ranks and this rank's coordinate along each dimension of the mesh.
    """
    here = []
    for placement, ranks, place in cuts:
        if placement.is_partial():
            raise CheckpointError(f"{name}: is a partial sum, which its ranks have not reduced")
        cut = getattr(placement, "dim", None)
        if cut is None and not placement.is_replicate():
            raise CheckpointError(
                f"{name}: {placement!r} is a placement that moeify does not support"
            )
        if cut == dim:
            here.append((_factor(placement), ranks, place))
    runs: list[Run] = [(0, size)] if size else []
    for factor, ranks, place in _in_order(here, name):
        if factor == 1:
            runs = _chunk(runs, ranks, place)
        else:
            runs = _joined(
                run
                for block in range(factor)
                for run in _chunk(_chunk(runs, factor, block), ranks, place)
            )
    return runs


def _factor(placement: Any) -> int:
    return int(getattr(placement, "split_factor", 1))


def _in_order(cuts: list[tuple[int, int, int]], name: str) -> list[tuple[int, int, int]]:
    """Return cuts of one dimension in the order in which they were made.

    From left to right over the mesh, except for FSDP2, which comes first in the mesh and cuts last:
    its placement has the number of the others' shards as `split_factor`. A strided cut with no
    other after it is of halves; whatever is before that one is FSDP2, too.
    """
    if len(cuts) < 2:
        return cuts
    first, rest = cuts[0], cuts[1:]
    halves = rest[-1][0] > 1
    if first[0] == 1 and not halves:
        return [first, *_in_order(rest, name)]
    shards = 1
    for _, ranks, _ in rest:
        shards *= ranks
    if not halves and first[0] != shards:
        raise CheckpointError(
            f"{name}: is cut with the stride {first[0]} over {shards} shards: moeify does not "
            "support this layout"
        )
    return [*_in_order(rest, name), (1, first[1], first[2])]


def _chunk(runs: Sequence[Run], count: int, index: int) -> list[Run]:
    """Return one chunk of the runs, as `torch.chunk` cuts it."""
    total = sum(length for _, length in runs)
    each = -(-total // count)
    begin, end = min(index * each, total), min((index + 1) * each, total)
    found, passed = [], 0
    for first, length in runs:
        low, high = max(begin, passed), min(end, passed + length)
        if low < high:
            found.append((first + low - passed, high - low))
        passed += length
    return found


def _joined(runs: Any) -> list[Run]:
    """Join neighbouring runs."""
    found: list[Run] = []
    for first, length in runs:
        if found and found[-1][0] + found[-1][1] == first:
            found[-1] = found[-1][0], found[-1][1] + length
        else:
            found.append((first, length))
    return found


def _placed(runs: Sequence[Run]) -> list[tuple[int, int, int]]:
    """Return runs with the offset of each in the local tensor."""
    found, passed = [], 0
    for first, length in runs:
        found.append((first, length, passed))
        passed += length
    return found
