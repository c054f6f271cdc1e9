"""Files that are either complete on disk or absent, and the temporary names they start under.

An unfinished file lies beside its final place, under a name that holds the host and process that
made it, so that `remove_leftovers` can clear away what processes left when they died.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, Literal, Self

_PART: Final = 1 << 24  # bytes that are written and hashed at a time
_THREAD_MINIMUM: Final = 1 << 20  # bytes
_NAME_LENGTH: Final = 100  # characters of a file's name that its temporary name repeats

_TEMPORARY = re.compile(r"\.(.+)\.(staging|replaced)-([0-9]+)-([0-9a-f]+)", re.DOTALL)
_NO_FOLDER_SYNC: Final = {errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class SyncedFile:
    """A new file, synced to disk when closed; a `with` block that raises abandons it."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._stream = path.open("xb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def write(self, data: bytes | memoryview) -> None:
        self._stream.write(data)
        self.size += len(data)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        """Sync the file to disk and close it; do nothing if it is closed."""
        if self._stream.closed:
            return
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())

    def abandon(self) -> None:
        """Close the file without syncing it."""
        with contextlib.suppress(OSError):
            self._stream.close()


class HashedFile(SyncedFile):
    """A `SyncedFile` hashed as it is written; large parts in a thread beside the writing."""

    def __init__(self, path: Path) -> None:
        self._digest = hashlib.sha256()
        self._threads: ThreadPoolExecutor | None = None
        super().__init__(path)

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PART):
            part = view[start : start + _PART]
            if len(part) < _THREAD_MINIMUM:
                self._stream.write(part)
                self._digest.update(part)
                continue
            if self._threads is None:
                self._threads = ThreadPoolExecutor(1, "moeify-file")
            hashed = self._threads.submit(self._digest.update, part)
            try:
                self._stream.write(part)
            finally:
                hashed.result()
        self.size += len(view)

    def close(self) -> None:
        self._end_threads()
        super().close()

    def sha256(self) -> str:
        """Close the file, synced to disk, and return its SHA-256 in hex."""
        self.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        self._end_threads()
        super().abandon()

    def _end_threads(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


def write_new(path: Path, data: bytes) -> str:
    """Write a file that must not exist, sync it to disk and return its SHA-256 in hex."""
    with HashedFile(path) as file:
        file.write(data)
        return file.sha256()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, all or nothing; a link in its place is replaced, not followed.

    Raises:
        OSError: It cannot be written. The older file is then unchanged, unless only the sync of the
            folder failed.
    """
    short = path.name[:_NAME_LENGTH]
    remove_leftovers(path.parent, short)
    staged = temporary_name(path.with_name(short))
    try:
        with SyncedFile(staged) as file:
            file.write(data)
        staged.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            staged.unlink()
        raise
    try:
        sync_folder(path.parent)
    except OSError as error:  # unsupported by some file systems, forbidden in some folders
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path, kind: Literal["staging", "replaced"] = "staging") -> Path:
    """Return a name beside a path for what is to be there ("staging"), or was ("replaced")."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{_host()}{secrets.token_hex(4)}")


def final_name(name: str) -> str:
    """Return the name that a temporary name stands for; any other name unchanged."""
    match = _TEMPORARY.fullmatch(name)
    return name if match is None else match[1]


def remove_leftovers(folder: Path, names: str | re.Pattern[str]) -> None:
    """Remove what dead processes of this host left under temporary names, skipping what cannot be.

    Args:
        folder: Where to look.
        names: The final name, or a pattern that must match the whole final name.
    """
    with contextlib.suppress(OSError):
        for entry in list(folder.iterdir()):
            match = _TEMPORARY.fullmatch(entry.name)
            if match is None:
                continue
            name, kind, process, tag = match.groups()
            if name != names if isinstance(names, str) else names.fullmatch(name) is None:
                continue
            if (len(tag) == 16 and tag[:8] != _host()) or _is_alive(int(process)):
                continue
            if kind == "replaced" and not os.path.lexists(folder / name):
                continue  # what was moved aside is then the only copy
            if entry.is_symlink():
                continue
            if entry.is_dir():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.is_file():
                entry.unlink(missing_ok=True)


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


__all__ = [
    "HashedFile",
    "SyncedFile",
    "final_name",
    "remove_leftovers",
    "replace_file",
    "sync_folder",
    "temporary_name",
    "write_new",
]
