"""Writes sharded checkpoints for torch.distributed.checkpoint: safetensors files and strict JSON.

Every rank writes its pieces into one file of a staged folder; the first rank adds the manifest and
renames the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    MetadataIndex,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    WriteItem,
)
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from moeify.checkpoint_files import CHUNK, _put, _sync
from moeify.checkpoint_shards import CODE_OF
from moeify.sharded_manifest import (
    NAME,
    DataFile,
    PieceRecord,
    ShardedManifest,
    encode,
)
from moeify.sharded_pieces import Pieces
from moeify.units import dtype_name

__all__ = ["PieceFile", "PieceWriter", "PiecesToSave", "put"]

Finish = Callable[[dict[str, list[PieceRecord]], list[DataFile]], ShardedManifest]


class PieceFile:
    """A new safetensors file with pieces, each hashed as it is written.

    Args:
        path: Must not exist.
        entries: Name, dtype and sizes of each piece, in the order in which they will be written.
    """

    def __init__(
        self, path: Path, entries: Sequence[tuple[str, torch.dtype, Sequence[int]]]
    ) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, dtype, size in entries:
            start, end = end, end + math.prod(size) * dtype.itemsize
            header[name] = {
                "dtype": CODE_OF[dtype_name(dtype)],
                "shape": list(size),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.name, self.size = path.name, 0
        self._stream = path.open("xb")
        try:
            self._append(len(text).to_bytes(8, "little") + text)
        except BaseException:
            self.abandon()
            raise

    def write(self, number: int, at: Sequence[int], values: Tensor) -> PieceRecord:
        """Append a piece.

        Args:
            number: Position of this file among all.
            at: Where the piece begins in its tensor.
            values: Any strides and device; copied to the CPU a part at a time.
        """
        begin, digest = self.size, hashlib.sha256()
        for part in _rows(values):
            data = part.resolve_conj().resolve_neg().to("cpu").contiguous()
            view = data.reshape(-1).view(torch.uint8).numpy().data
            for start in range(0, len(view), CHUNK):
                digest.update(view[start : start + CHUNK])
                self._append(view[start : start + CHUNK])
        return PieceRecord(
            file=number,
            begin=begin,
            bytes=self.size - begin,
            sha256=digest.hexdigest(),
            at=list(at),
            size=list(values.shape),
        )

    def _append(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self.size += len(data)

    def close(self) -> None:
        """Bring the file to the disk."""
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())

    def abandon(self) -> None:
        """Close it as it is."""
        with contextlib.suppress(OSError):
            self._stream.close()


def _rows(values: Tensor) -> Iterator[Tensor]:
    """Yield parts of a tensor, along its first dimension, of a moderate size."""
    size = values.numel() * values.element_size()
    if values.ndim == 0 or size <= CHUNK:
        yield values
        return
    step = max(1, values.shape[0] * CHUNK // size)
    for start in range(0, values.shape[0], step):
        yield values[start : start + step]


def put(staging: Path, path: Path, manifest: ShardedManifest) -> None:
    """Add the manifest to a staged folder and put it in its place, all or nothing."""
    with (staging / NAME).open("xb") as stream:
        stream.write(encode(manifest))
        stream.flush()
        os.fsync(stream.fileno())
    _sync(staging)
    _put(staging, path, exists=path.exists())
    with contextlib.suppress(OSError):
        _sync(path.parent)
    shutil.rmtree(staging, ignore_errors=True)  # the older one, after an exchange


class PiecesToSave(DefaultSavePlanner):
    """Plans a save of `Pieces`: equal ones are written once, by the rank with the least to do."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self.state_dict = state_dict
        self.is_coordinator = is_coordinator

    def create_local_plan(self) -> SavePlan:
        return SavePlan([i for key, p in self.state_dict.items() for i in p.write_items(key)])

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        held: Pieces = self.state_dict[write_item.index.fqn]
        return held.at(write_item.index.offset)


class PieceWriter(StorageWriter):
    """Writes one rank's pieces.

    Args:
        staging: The staged folder, which exists.
        path: Where it goes.
        rank: This rank.
        finish: Makes the manifest, on the first rank, from the pieces of every key and the files.
    """

    def __init__(self, staging: Path, path: Path, rank: int, finish: Finish | None) -> None:
        self.staging, self.path, self.rank, self._finish = staging, path, rank, finish

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's file, if it has anything to write."""
        done: Future[list[WriteResult]] = Future()
        done.set_result(self._write(plan.items, planner) if plan.items else [])
        return done

    def _write(self, items: Sequence[WriteItem], planner: SavePlanner) -> list[WriteResult]:
        entries = []
        for item in items:
            data = item.tensor_data
            assert data is not None
            entries.append((_entry(item.index), data.properties.dtype, data.chunk.sizes, item))
        entries.sort(key=lambda entry: -entry[1].itemsize)  # so that all are aligned
        path = self.staging / f"moeify-rank-{self.rank:05d}.safetensors"
        file = PieceFile(path, [entry[:3] for entry in entries])
        results = []
        try:
            for *_, item in entries:
                values: Any = planner.resolve_data(item)
                record = file.write(self.rank, item.index.offset or (), values)
                results.append(WriteResult(item.index, record.bytes, record.model_dump()))
            file.close()
        except BaseException:
            file.abandon()
            raise
        last = results[-1]
        results[-1] = WriteResult(last.index, last.size_in_bytes, (last.storage_data, file.size))
        return results

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the manifest and put the folder in its place."""
        pieces: dict[str, list[PieceRecord]] = {}
        files: list[DataFile] = []
        for rank, found in enumerate(results):
            if not found:
                continue
            number = len(files)
            for result in found:
                record = result.storage_data
                if isinstance(record, tuple):  # the last one tells the size of the file
                    record, size = record
                    name = f"moeify-rank-{rank:05d}.safetensors"
                    files.append(DataFile(file=name, bytes=size))
                piece = PieceRecord.model_validate(record | {"file": number})
                pieces.setdefault(result.index.fqn, []).append(piece)
        assert self._finish is not None
        put(self.staging, self.path, self._finish(pieces, files))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def _entry(index: MetadataIndex) -> str:
    return f"{index.fqn}@{','.join(map(str, index.offset or ()))}"
