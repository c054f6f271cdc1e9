"""Files that are whole on the disk or not there at all, and the temporary names they start under.

Whatever is not finished lies beside its final place, under a name that tells which process of which
host made it. `remove_leftovers` clears away what such processes left when they died.
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

_PART: Final = 1 << 24
"""Bytes that are written and hashed at a time."""

_WORTH_A_THREAD: Final = 1 << 20
_LONGEST: Final = 100
"""Characters of a file's name that its temporary name repeats."""

_TEMPORARY = re.compile(r"\.(.+)\.(staging|replaced)-([0-9]+)-([0-9a-f]+)", re.DOTALL)
_NO_FOLDER_SYNC: Final = {errno.EACCES, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class SyncedFile:
    """A new file that is on the disk once it is closed.

    As a context manager it closes the file at the end, or abandons it where there is an exception.

    Args:
        path: Must not exist.

    Attributes:
        size: Bytes so far.
    """

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
        """Append bytes."""
        self._stream.write(data)
        self.size += len(data)

    def flush(self) -> None:
        """Hand what was written to the system."""
        self._stream.flush()

    def close(self) -> None:
        """Bring the file to the disk and close it; do nothing if it is closed."""
        if self._stream.closed:
            return
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())

    def abandon(self) -> None:
        """Close it as it is."""
        with contextlib.suppress(OSError):
            self._stream.close()


class HashedFile(SyncedFile):
    """A `SyncedFile` that is hashed as it is written.

    Large data is hashed in a thread beside the writing.

    Args:
        path: Must not exist.
    """

    def __init__(self, path: Path) -> None:
        self._digest = hashlib.sha256()
        self._threads: ThreadPoolExecutor | None = None
        super().__init__(path)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        for start in range(0, len(view), _PART):
            part = view[start : start + _PART]
            if len(part) < _WORTH_A_THREAD:
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
        """Bring the file to the disk and close it; do nothing if it is closed."""
        self._end_threads()
        super().close()

    def sha256(self) -> str:
        """Bring the file to the disk, close it, and return its SHA-256 in hex."""
        self.close()
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close it as it is."""
        self._end_threads()
        super().abandon()

    def _end_threads(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


def write_new(path: Path, data: bytes) -> str:
    """Write a file that does not exist, bring it to the disk and return its SHA-256 in hex.

    Raises:
        OSError: It exists, or cannot be written; what was begun stays there.
    """
    with HashedFile(path) as file:
        file.write(data)
        return file.sha256()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file, all or nothing; a link in its place is replaced, not followed.

    Raises:
        OSError: It cannot be written. The older file is then as it was, unless the disk failed to
            record the new one's name.
    """
    short = path.name[:_LONGEST]
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
    except OSError as error:  # some file systems cannot, and some folders may not be read
        if error.errno not in _NO_FOLDER_SYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary_name(path: Path, kind: Literal["staging", "replaced"] = "staging") -> Path:
    """Return a name beside a path for what will be there ("staging"), or was ("replaced")."""
    return path.with_name(f".{path.name}.{kind}-{os.getpid()}-{_host()}{secrets.token_hex(4)}")


def final_name(name: str) -> str:
    """Return the name that a temporary name stands for; any other name as it is."""
    match = _TEMPORARY.fullmatch(name)
    return name if match is None else match[1]


def remove_leftovers(folder: Path, names: str | re.Pattern[str]) -> None:
    """Remove what dead processes of this host left under temporary names; skip what cannot be.

    What was moved aside stays while nothing is in its place: it is then the only copy.

    Args:
        folder: Where to look.
        names: The final name, or a pattern that final names match as a whole.
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
                continue
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
