"""Safetensors files that stay open, and give their tensors a few rows at a time.

The claims of a header are checked against its file. Nothing is mapped into memory, so nothing but
what has been read takes memory.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import BinaryIO, Self

import torch
from torch import Tensor

from moeify.errors import CheckpointError
from moeify.storage.atomic_folder import CHUNK, Folder, read_at
from moeify.storage.safetensors_file import header_data, header_text, spans_of
from moeify.storage.tensor_source import TensorSpec


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies: bytes `[begin, end)` of a file."""

    file: str
    spec: TensorSpec
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file as it was when it was opened."""

    stream: BinaryIO
    bytes: int
    mtime_ns: int
    header: str  # SHA-256, in hex


class TensorFiles:
    """The tensors of some files of one folder."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._keys: dict[str, Entry] = {}
        self.files: dict[str, OpenFile] = {}
        weakref.finalize(self, _close, self.files)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; nothing can be read afterwards."""
        _close(self.files)

    @property
    def keys(self) -> Mapping[str, Entry]:
        """Every tensor by its name, in the order of files and data."""
        return self._keys

    def add(self, folder: Folder, file: str, size: int | None = None) -> Mapping[str, Entry]:
        """Open a file, check its header and return its tensors in the order of their data.

        Raises:
            CheckpointError: It is not a regular file of `size` bytes, its header is damaged, or a
                tensor is in another file too.
        """
        where = self.where(file)
        stream = folder.open(file, size=size)
        state = os.fstat(stream.fileno())
        self.files[file] = OpenFile(stream, state.st_size, state.st_mtime_ns, "")  # to be closed
        text = header_text(stream, state.st_size, where)
        digest = hashlib.sha256(text).hexdigest()
        self.files[file] = OpenFile(stream, state.st_size, state.st_mtime_ns, digest)
        header = header_data(text, where)
        header.pop("__metadata__", None)
        start = 8 + len(text)
        found = {
            name: Entry(file, TensorSpec(s.shape, s.dtype), start + s.start, start + s.stop)
            for name, s in spans_of(header, state.st_size - start, where).items()
        }
        for name in found:
            if name in self._keys:
                raise CheckpointError(f"{where}: {name:.200}: is in {self._keys[name].file} too")
        self._keys |= found
        return found

    def read(self, key: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Read rows `[start, stop)` of a tensor, in the file's dtype, into CPU memory of its own.

        A tensor without dimensions is read whole.
        """
        entry = self._keys[key]
        shape, dtype = entry.spec.shape, entry.spec.dtype
        begin, end = entry.begin, entry.end
        if shape:
            start, stop, _ = slice(start, stop).indices(shape[0])
            rows = max(stop - start, 0)
            row = (end - begin) // shape[0] if shape[0] else 0
            begin, end = begin + start * row, begin + (start + rows) * row
            shape = (rows, *shape[1:])
        raw = torch.empty(end - begin, dtype=torch.uint8)
        self._fill(entry.file, raw.numpy().data, begin)
        if dtype == torch.bool and bool((raw > 1).any()):
            raise CheckpointError(
                f"{self.where(entry.file)}: {key}: holds bytes that are not booleans"
            )
        return raw.view(dtype).view(shape)

    def sha256(self, file: str) -> str:
        """Return the SHA-256 of a whole file, in hex."""
        if file not in self.files:
            raise CheckpointError(f"{self.where(file)}: has not been opened, or was closed")
        digest, size = hashlib.sha256(), self.files[file].bytes
        chunk = bytearray(min(CHUNK, size))
        for start in range(0, size, CHUNK):
            part = memoryview(chunk)[: min(CHUNK, size - start)]
            self._fill(file, part, start)
            digest.update(part)
        return digest.hexdigest()

    def unchanged(self) -> None:
        """Raise if a file was written to since it was opened: what was read must not be used."""
        for name, file in self.files.items():
            now = os.fstat(file.stream.fileno())
            if (now.st_size, now.st_mtime_ns) != (file.bytes, file.mtime_ns):
                raise CheckpointError(
                    f"{self.where(name)}: was changed while it was read: start again when "
                    "nothing writes to it"
                )

    def _fill(self, file: str, view: memoryview, offset: int) -> None:
        if file not in self.files:
            raise CheckpointError(f"{self.where(file)}: has been closed")
        read_at(self.files[file].stream, view, offset, self.where(file))

    def where(self, name: str) -> str:
        return os.path.join(self.path, name)


def _close(files: dict[str, OpenFile]) -> None:
    for file in files.values():
        file.stream.close()
    files.clear()
