"""Read sharded checkpoints for torch.distributed.checkpoint, without trusting them.

Nothing is unpickled, and nothing is allocated that a file merely claims. Files are opened once, so
that a save that replaces the folder meanwhile cannot be mixed in.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from moeify.checkpoint.sharded.chunks import Pieces
from moeify.checkpoint.sharded.manifest import NAME, PieceRecord, ShardedManifest
from moeify.errors import CheckpointError
from moeify.storage.atomic_folder import CHUNK, Folder
from moeify.storage.safetensors_file import DTYPES

__all__ = ["PieceReader", "PiecesToLoad"]


class PiecesToLoad(LoadPlanner):
    """A planner for a load into `Pieces`: which parts of which saved pieces each of them needs."""

    state: dict[str, Pieces]
    metadata: Metadata

    def set_up_planner(
        self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        assert metadata is not None
        self.state, self.metadata = state_dict, metadata

    def create_local_plan(self) -> LoadPlan:
        items: list[ReadItem] = []
        for key, held in self.state.items():
            saved: Any = self.metadata.state_dict_metadata[key]
            # One at a time: torch numbers the chunks that it was given, and offsets are enough.
            for chunk in held.chunks:
                items += create_read_items_for_chunk_list(key, saved, [chunk])
        return LoadPlan(items)

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: is not a tensor in the checkpoint")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        index = read_item.dest_index
        view = self.state[index.fqn].at(index.offset)
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        pass


class PieceReader(StorageReader):
    """A storage reader for pieces, in parts of a moderate size, from files that are opened once."""

    def __init__(self, folder: Folder, manifest: ShardedManifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._streams: dict[int, BinaryIO] = {}
        self._pieces = {
            (key, tuple(piece.at)): piece
            for key, tensor in manifest.tensors.items()
            for piece in tensor.pieces
        }

    def reset(self, checkpoint_id: Any = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the manifest in the form of torch.distributed.checkpoint."""
        return Metadata(
            {
                key: TensorStorageMetadata(
                    TensorProperties(dtype=DTYPES[tensor.dtype]),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(torch.Size(p.at), torch.Size(p.size))
                        for p in tensor.pieces
                    ],
                )
                for key, tensor in self.manifest.tensors.items()
            }
        )

    def set_up_storage_reader(self, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def open(self, state: Mapping[str, Pieces]) -> None:
        """Open every file that is needed, so that none can be replaced later."""
        planner = PiecesToLoad()
        planner.set_up_planner(state, self.read_metadata())
        for item in planner.create_local_plan().items:
            index = item.storage_index
            self._stream(self._pieces[index.fqn, tuple(index.offset or ())].file)

    def verify(self, keys: Sequence[str], rank: int = 0, ranks: int = 1) -> None:
        """Check the digests of this rank's share of the pieces of some tensors."""
        wanted = [(key, piece) for key in keys for piece in self.manifest.tensors[key].pieces]
        wanted.sort(key=lambda pair: (pair[1].file, pair[1].begin))
        total = max(1, sum(piece.bytes for _, piece in wanted))
        passed = 0
        for key, piece in wanted:
            if passed * ranks // total == rank:
                self._verify(key, piece)
            passed += piece.bytes

    def _verify(self, key: str, piece: PieceRecord) -> None:
        digest = hashlib.sha256()
        where = self.folder.where(self.manifest.files[piece.file].file)
        for part in self._read(piece, 0, piece.bytes):
            digest.update(part)
            if self.manifest.tensors[key].dtype == "bool" and part.strip(b"\0\1"):
                raise CheckpointError(f"{where}: {key}: holds bytes that are not booleans")
        if digest.hexdigest() != piece.sha256:
            raise CheckpointError(
                f"{where}: {key}: the SHA-256 of its piece at {piece.at} is not the one in {NAME}: "
                "the file was changed or damaged; nothing was loaded"
            )

    def values(self, key: str) -> Tensor:
        """Return a whole tensor, verified, on the CPU."""
        record = self.manifest.tensors[key]
        whole = torch.empty(record.shape, dtype=DTYPES[record.dtype])
        for piece in record.pieces:
            self._verify(key, piece)
            view = whole
            for dim, (start, length) in enumerate(zip(piece.at, piece.size, strict=True)):
                view = view.narrow(dim, start, length)
            self._copy(piece, record.dtype, [0] * len(piece.at), view)
        return whole

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what is planned into the live tensors."""
        for item in plan.items:
            index = item.storage_index
            piece = self._pieces[index.fqn, tuple(index.offset or ())]
            target = planner.resolve_tensor(item)
            dtype = self.manifest.tensors[index.fqn].dtype
            self._copy(piece, dtype, item.storage_offsets, target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _copy(self, piece: PieceRecord, dtype: str, at: Sequence[int], target: Tensor) -> None:
        """Fill a tensor from the part of a piece that begins at `at`."""
        kind = DTYPES[dtype]
        first = at[0] if at else 0
        row = math.prod(piece.size[1:]) * kind.itemsize
        rows = target.shape[0] if target.ndim else 1
        step = max(1, CHUNK // row) if row else rows
        for start in range(0, rows, step):
            count = min(step, rows - start)
            begin = (first + start) * row
            raw = bytearray()
            for part in self._read(piece, begin, begin + count * row):
                raw += part
            values = torch.frombuffer(raw, dtype=torch.uint8).view(kind)
            if not target.ndim:
                target.copy_(values.view(()))
                continue
            values = values.view(count, *piece.size[1:])
            for dim in range(1, target.ndim):
                values = values.narrow(dim, at[dim], target.shape[dim])
            target.narrow(0, start, count).copy_(values)

    def _read(self, piece: PieceRecord, begin: int, end: int) -> Iterator[bytes]:
        stream = self._stream(piece.file)
        where = self.folder.where(self.manifest.files[piece.file].file)
        try:
            stream.seek(piece.begin + begin)
            while begin < end:
                part = stream.read(min(CHUNK, end - begin))
                if not part:
                    raise CheckpointError(f"{where}: ends too early: it is being changed")
                begin += len(part)
                yield part
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read: {error}") from error

    def _stream(self, number: int) -> BinaryIO:
        if number not in self._streams:
            record = self.manifest.files[number]
            self._streams[number] = self.folder.open(record.file, size=record.bytes)
        return self._streams[number]

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
