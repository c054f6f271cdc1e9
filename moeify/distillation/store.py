"""The folder of a teacher's logits: whole shards, a manifest that lists them, and pending rows.

A shard is written beside its name, synced and renamed, and only then entered into the manifest,
which is replaced in one step. Each shard holds the keys of its rows.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from moeify.atomic_file import final_name, replace_file
from moeify.errors import CheckpointError
from moeify.storage.atomic_folder import Folder, try_lock
from moeify.storage.strict_json import parse_json
from moeify.storage.tensor_reader import TensorFiles

MANIFEST: Final = "teacher_cache.json"
FORMAT: Final = "moeify-teacher-cache-1"
_LOCK: Final = "teacher_cache.lock"
_LIMIT: Final = 1 << 26


class _Place(NamedTuple):
    shard: str
    start: int
    stop: int


Row = tuple[Tensor, ...]


class Store:
    """The rows on disk, and those that wait for a shard of `shard_bytes`.

    The manifest holds `options`, among them `top_k`; a folder of other options is refused.
    """

    def __init__(self, folder: Path, shard_bytes: int, options: dict[str, Any]) -> None:
        self.folder, self.shard_bytes, self.options = folder, shard_bytes, options
        self._names = ("logits",) if options["top_k"] is None else ("ids", "log_probs", "log_rest")
        self.teacher: str | None = None
        self.vocab: int | None = None
        self.shards: list[dict[str, Any]] = []
        self.places: dict[bytes, _Place] = {}
        self.pending: dict[bytes, Row] = {}
        self.waiting = 0
        self._read: bytes | None = None
        self.files = TensorFiles(str(folder))
        self._lock: int | None = None
        try:
            folder.mkdir(exist_ok=True)
            present = (folder / MANIFEST).exists()
            if not present and any(not _ours(entry.name) for entry in folder.iterdir()):
                raise CheckpointError(
                    f"{folder}: holds files and is not a cache (it has no {MANIFEST}): give another"
                )
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be used: {error}") from error
        if present:
            self._open()

    def put(self, key: bytes, row: Row, vocab: int) -> None:
        """Keep a row, and write a shard if one is full."""
        self._claim()
        if self.vocab not in (None, vocab):
            raise CheckpointError(
                f"{self.folder}: holds logits of {self.vocab} words, not of {vocab}"
            )
        self.vocab = vocab
        if key not in self.pending:
            self.pending[key] = row
            self.waiting += sum(part.numel() * part.element_size() for part in row)
        if self.waiting >= self.shard_bytes:
            self.flush()

    def get(self, key: bytes) -> Row:
        """Return a row, checked if it comes from the disk."""
        if key in self.pending:
            return self.pending[key]
        shard, start, stop = self.places[key]
        row = tuple(self.files.read(f"{shard}.{name}", start, stop) for name in self._names)
        if len(row) == 3:
            ids, log_probs, log_rest = row
            total = log_probs.double().exp().sum(1) + log_rest.double().exp()
            inside = (ids >= 0) & (ids < (self.vocab or 0))
            if not bool(inside.all()) or not bool(((total - 1).abs() < 1e-3).all()):
                raise CheckpointError(
                    f"{self.folder / _file(shard)}: does not hold probabilities of "
                    f"{self.vocab} words: it was damaged; delete the folder and fill it again"
                )
        return row

    def flush(self) -> None:
        """Write all that waits as one shard, then the manifest; after an error rows still wait."""
        if not self.pending:
            return
        from safetensors.torch import save

        number = f"{len(self.shards) + 1:05d}"
        keys, rows = list(self.pending), list(self.pending.values())
        ends = torch.tensor([0, *(row[0].shape[0] for row in rows)]).cumsum(0)
        tensors = {
            f"{number}.{name}": torch.cat(each)
            for name, each in zip(self._names, zip(*rows, strict=True), strict=True)
        }
        tensors[f"{number}.keys"] = torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8)
        tensors[f"{number}.ends"] = ends
        data = save(tensors)
        digest = hashlib.sha256(data).hexdigest()
        file = _file(number)
        record = {"file": file, "bytes": len(data), "sha256": digest, "rows": len(keys)}
        try:
            replace_file(self.folder / file, data)
            self._read = self._manifest([*self.shards, record])
            replace_file(self.folder / MANIFEST, self._read)
        except OSError as error:
            raise CheckpointError(f"{self.folder}: cannot be written: {error}") from error
        self._add(record)
        self.pending.clear()
        self.waiting = 0

    def close(self) -> None:
        """Write what waits, and release the lock."""
        try:
            self.flush()
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None
            self.files.close()

    def _claim(self) -> None:
        """Take the lock, so that nobody else writes here."""
        if self._lock is not None:
            return
        handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            manifest = self.folder / MANIFEST
            locked = try_lock(handle)
            if not locked or (manifest.read_bytes() if manifest.exists() else None) != self._read:
                raise BlockingIOError
        except OSError:
            os.close(handle)
            raise CheckpointError(
                f"{self.folder}: another process writes to it, or has since it was opened: give "
                "each process its own folder, or open this one after the other has closed it"
            ) from None
        self._lock = handle

    def _manifest(self, shards: list[dict[str, Any]]) -> bytes:
        known = {"format": FORMAT, "teacher": self.teacher, "vocab": self.vocab}
        return (json.dumps({**known, **self.options, "shards": shards}, indent=1) + "\n").encode()

    def _open(self) -> None:
        where = str(self.folder / MANIFEST)
        with Folder(self.folder) as folder:
            self._read = folder.read(MANIFEST, limit=_LIMIT)
        data = parse_json(self._read, where)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CheckpointError(f"{where}: is not a manifest of format {FORMAT}")
        found = {name: data.get(name) for name in self.options}
        if found != self.options:
            raise CheckpointError(f"{where}: is a cache of {found}, not of {self.options}")
        self.teacher, self.vocab = data.get("teacher"), data.get("vocab")
        shards = data.get("shards")
        types = {"file": str, "bytes": int, "sha256": str, "rows": int}
        if (
            not isinstance(self.teacher, str | None)
            or not isinstance(self.vocab, int | None)
            or not isinstance(shards, list)
            or not all(
                isinstance(r, dict)
                and r.keys() == types.keys()
                and all(type(r[name]) is kind for name, kind in types.items())
                for r in shards
            )
            or [r["file"] for r in shards] != [_file(f"{i + 1:05d}") for i in range(len(shards))]
        ):
            raise CheckpointError(f"{where}: is damaged")
        for record in shards:
            self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        """Open a shard and enter its rows."""
        where = self.folder / record["file"]
        with Folder(self.folder) as folder:
            entries = self.files.add(folder, record["file"], record["bytes"])
        number = f"{len(self.shards) + 1:05d}"
        if set(entries) != {f"{number}.{name}" for name in (*self._names, "keys", "ends")}:
            raise CheckpointError(f"{where}: holds other tensors than a shard")
        keys = self.files.read(f"{number}.keys").numpy().tobytes()
        ends = self.files.read(f"{number}.ends").tolist()
        lengths = {entries[f"{number}.{name}"].spec.shape[:1] for name in self._names}
        fits = len(keys) == 32 * record["rows"] and len(ends) == record["rows"] + 1
        if not fits or ends != sorted(ends) or ends[0] != 0 or lengths != {(ends[-1],)}:
            raise CheckpointError(f"{where}: its rows do not fit its tensors")
        for i in range(record["rows"]):
            place = _Place(number, int(ends[i]), int(ends[i + 1]))
            self.places[keys[32 * i : 32 * i + 32]] = place
        self.shards.append(record)


def _file(number: str) -> str:
    return f"teacher-{number}.safetensors"


def _ours(name: str) -> bool:
    name = final_name(name)
    return name in (MANIFEST, _LOCK) or (
        name.startswith("teacher-") and name.endswith(".safetensors")
    )
