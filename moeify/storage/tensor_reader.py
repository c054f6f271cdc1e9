"""Safetensors files that stay open, and give their tensors a few rows at a time.

What a header claims is held against its file before it is believed. Nothing is mapped into memory:
what has been read lies in memory of its own, and nothing else does.
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
from moeify.storage.atomic_folder import CHUNK, Folder
from moeify.storage.safetensors_file import header_data, header_text, spans_of
from moeify.storage.tensor_source import TensorSpec


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies.

    Attributes:
        file: Name of the file.
        spec: Shape and dtype.
        begin: First byte of its data in the file.
        end: One past its last byte.
    """

    file: str
    spec: TensorSpec
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file that has been opened.

    Attributes:
        stream: To read it from.
        bytes: Its size when it was opened.
        mtime_ns: Its last change then, in nanoseconds.
        header: SHA-256 of its header, in hex.
    """

    stream: BinaryIO
    bytes: int
    mtime_ns: int
    header: str


class TensorFiles:
    """The tensors of some files of one folder.

    Args:
        path: The folder, for messages.

    Attributes:
        path: As given.
        files: Those that are open, by name.
    """

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
        """Every tensor by its name in the files, in the order of files and data."""
        return self._keys

    def add(self, folder: Folder, file: str, size: int | None = None) -> Mapping[str, Entry]:
        """Open a file and check its header.

        Args:
            folder: Where it is.
            file: Its name.
            size: Its size in bytes, if known.

        Returns:
            Its tensors by name, in the order of their data.

        Raises:
            CheckpointError: It is no regular file, or its header is damaged, or holds a tensor that
                is in another file too.
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
        """Read a tensor, or rows of it.

        Args:
            key: One of `keys`.
            start: First row along the first dimension.
            stop: One past the last; the end if None. A tensor without dimensions is read whole.

        Returns:
            [rows, ...] in the dtype of the file, on the CPU, in memory of its own.

        Raises:
            CheckpointError: The file has become shorter, cannot be read, or holds booleans that
                are none.
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
                f"{self.where(entry.file)}: {key}: holds bytes that are no booleans"
            )
        return raw.view(dtype).view(shape)

    def sha256(self, file: str) -> str:
        """Return the SHA-256 of a whole file, in hex.

        Raises:
            CheckpointError: It is none of the files, or cannot be read.
        """
        if file not in self.files:
            raise CheckpointError(f"{self.where(file)}: has not been opened, or closed again")
        digest, size = hashlib.sha256(), self.files[file].bytes
        chunk = bytearray(min(CHUNK, size))
        for start in range(0, size, CHUNK):
            part = memoryview(chunk)[: min(CHUNK, size - start)]
            self._fill(file, part, start)
            digest.update(part)
        return digest.hexdigest()

    def unchanged(self) -> None:
        """Check, after reading, that no file was written to in the meantime.

        Raises:
            CheckpointError: One was: what was read is not to be used.
        """
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
        handle = self.files[file].stream.fileno()
        done = 0
        while done < len(view):
            try:
                count = os.preadv(handle, [view[done : done + CHUNK]], offset + done)
            except OSError as error:
                raise CheckpointError(f"{self.where(file)}: cannot be read: {error}") from error
            if not count:
                raise CheckpointError(f"{self.where(file)}: ends too early: it is being changed")
            done += count

    def where(self, name: str) -> str:
        """Return a file's path for messages."""
        return os.path.join(self.path, name)


def _close(files: dict[str, OpenFile]) -> None:
    for file in files.values():
        file.stream.close()
    files.clear()
