"""Write sharded checkpoints for torch.distributed.checkpoint: safetensors files and strict JSON.

Every rank writes its pieces into one file of a staged folder; the first rank adds the manifest and
renames the folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from moeify.atomic_file import SyncedFile, write_new
from moeify.checkpoint.sharded.chunks import Pieces
from moeify.checkpoint.sharded.manifest import NAME, DataFile, PieceRecord, ShardedManifest
from moeify.storage.atomic_folder import CHUNK, publish
from moeify.storage.safetensors_file import bytes_of, file_head
from moeify.storage.strict_json import encode_manifest

__all__ = ["PieceFile", "PieceWriter", "PiecesToSave", "entry_name", "put"]

Finish = Callable[[dict[str, list[PieceRecord]], list[DataFile]], ShardedManifest]


class PieceFile:
    """A new safetensors file with pieces, each hashed as it is written; a context manager.

    Args:
        path: Must not exist.
        entries: Name, dtype and shape of each piece, in the order in which they will be written.
    """

    def __init__(
        self, path: Path, entries: Sequence[tuple[str, torch.dtype, Sequence[int]]]
    ) -> None:
        head = file_head(entries)
        self.name = path.name
        self._file = SyncedFile(path)
        try:
            self._file.write(head)
        except BaseException:
            self._file.abandon()
            raise

    def __enter__(self) -> PieceFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.__exit__(kind)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._file.size

    def write(self, number: int, at: Sequence[int], values: Tensor) -> PieceRecord:
        """Append a piece of any strides and device to this file, the `number`-th of the checkpoint.

        `at` is where the piece begins in its tensor.
        """
        begin, digest = self.size, hashlib.sha256()
        for part in _rows(values):
            view = bytes_of(part)
            for start in range(0, len(view), CHUNK):
                digest.update(view[start : start + CHUNK])
                self._file.write(view[start : start + CHUNK])
        return PieceRecord(
            file=number,
            begin=begin,
            bytes=self.size - begin,
            sha256=digest.hexdigest(),
            at=list(at),
            size=list(values.shape),
        )


def _rows(values: Tensor) -> Iterator[Tensor]:
    """Split a tensor along its first dimension into parts of at most `CHUNK` bytes or one row."""
    size = values.numel() * values.element_size()
    if values.ndim == 0 or size <= CHUNK:
        yield values
        return
    step = max(1, values.shape[0] * CHUNK // size)
    for start in range(0, values.shape[0], step):
        yield values[start : start + step]


def put(staging: Path, path: Path, manifest: ShardedManifest) -> None:
    """Add the manifest to a staged folder and put it in its place, all or nothing."""
    write_new(staging / NAME, encode_manifest(manifest, indent=None))
    publish(staging, path, exists=path.exists())


class PiecesToSave(DefaultSavePlanner):
    """A planner for `Pieces`: equal ones are written once, by the rank with the least to do."""

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
    """A storage writer for one rank's pieces; the first rank calls `finish` for the manifest."""

    def __init__(self, staging: Path, path: Path, rank: int, finish: Finish) -> None:
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
            data, index = item.tensor_data, item.index
            assert data is not None
            name = entry_name(index.fqn, index.offset or ())
            entries.append((name, data.properties.dtype, data.chunk.sizes, item))
        entries.sort(key=lambda entry: -entry[1].itemsize)  # so that all are aligned
        path = self.staging / f"moeify-rank-{self.rank:05d}.safetensors"
        results = []
        with PieceFile(path, [entry[:3] for entry in entries]) as file:
            for *_, item in entries:
                values: Any = planner.resolve_data(item)
                record = file.write(self.rank, item.index.offset or (), values)
                results.append(WriteResult(item.index, record.bytes, record.model_dump()))
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
        put(self.staging, self.path, self._finish(pieces, files))

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True


def entry_name(key: str, at: Sequence[int]) -> str:
    """Return what a piece is called in its file."""
    return f"{key}@{','.join(map(str, at))}"
