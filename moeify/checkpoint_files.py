"""Folders that are written whole or not at all, and files that are read with suspicion.

A folder is staged beside its target, synced file by file, and put in place by one rename (on Linux
it is exchanged with an older one in one step). Files are opened without following links and
without waiting for a FIFO, all from one directory handle, so that a save that replaces the folder
meanwhile cannot be mixed in.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from moeify.errors import CheckpointError

log = logging.getLogger("moeify")

MANIFEST: Final = "moeify.json"
CHUNK: Final = 1 << 24
_WORTH_A_THREAD: Final = 1 << 20

_OURS = re.compile(
    r"moeify\.json|plan\.yaml|source_config\.json|generation_config\.json|config\.json"
    r"|(?:configuration|modeling)_moeify\.py|model\.safetensors(?:\.index\.json)?"
    r"|(?:moeify|model)-[0-9]{5}-of-[0-9]{5}\.safetensors"
)
_STAGED = re.compile(r"(?:staging|replaced)-([0-9]+)-([0-9a-f]+)")
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


class HashedFile:
    """A new file that is hashed as it is written and synced when it is closed.

    Large data is hashed in a thread beside the writing.

    Args:
        path: Must not exist.

    Attributes:
        size: Bytes so far.
    """

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._digest = hashlib.sha256()
        self._threads: ThreadPoolExecutor | None = None
        self._stream = path.open("xb")

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes."""
        view = memoryview(data)
        for start in range(0, len(view), CHUNK):
            part = view[start : start + CHUNK]
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

    def close(self) -> str:
        """Bring the file to the disk and return its SHA-256 in hex."""
        self._end_threads()
        with self._stream as stream:
            stream.flush()
            os.fsync(stream.fileno())
        return self._digest.hexdigest()

    def abandon(self) -> None:
        """Close it as it is."""
        self._end_threads()
        with contextlib.suppress(OSError):
            self._stream.close()

    def _end_threads(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None


@contextmanager
def new_file(path: Path) -> Iterator[HashedFile]:
    """Open a new file; the caller closes it, an exception abandons it."""
    file = HashedFile(path)
    try:
        yield file
    except BaseException:
        file.abandon()
        raise


def replace_folder(target: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Fill a new folder and put it in the place of `target`, all or nothing.

    What others put into an older save (a tokenizer, a README) is linked into the new one.

    Args:
        target: A path that does not exist, an empty folder, or an older save.
        write: Fills the folder that it is given.

    Raises:
        CheckpointError: The target is something else, or cannot be written; it is then as it was.
    """
    path = _resolved(target)
    old = _check_target(path)
    staging = path.with_name(f".{path.name}.staging-{_tag()}")
    try:
        _sweep(path, "staging")
        staging.mkdir()
        try:
            if old:
                staging.chmod(stat.S_IMODE(path.stat().st_mode))
                _carry(path, staging)
            write(staging)
            _sync(staging)
            _put(staging, path, exists=old)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
    except OSError as error:
        state = "the older save is as it was" if old else "nothing was left there"
        raise CheckpointError(f"{path}: cannot be saved: {error}; {state}") from error
    try:
        with contextlib.suppress(OSError):
            _sync(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # the older save, after an exchange
        _sweep(path, "replaced")


def _resolved(target: str | os.PathLike[str]) -> Path:
    text = os.fspath(target)
    try:
        path = Path(text).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{text!r}: is no usable path: {error}") from error
    if not text or not path.name:
        raise CheckpointError(f"{text!r}: give the folder to save to")
    return path


def _check_target(path: Path) -> bool:
    """Tell whether there is an older save.

    Raises:
        CheckpointError: There is something else, or no folder to put it in.
    """
    try:
        if not path.parent.is_dir():
            raise CheckpointError(f"{path.parent}: is no folder; make it first")
        if not os.path.lexists(path):
            return False
        if not path.is_dir():
            raise CheckpointError(f"{path}: is a file; give a folder")
        if not any(path.iterdir()):
            return False
        if not stat.S_ISREG(os.lstat(path / MANIFEST).st_mode):
            raise FileNotFoundError
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: holds files and is no moeify save (it has no {MANIFEST}); nothing was "
            "touched: give another folder"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return True


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _tag() -> str:
    return f"{os.getpid()}-{_host()}{secrets.token_hex(4)}"


def _sweep(path: Path, kind: str) -> None:
    """Remove what processes of this host that are no more left beside `path`."""
    prefix = f".{path.name}."
    with contextlib.suppress(OSError):
        for entry in list(path.parent.iterdir()):
            if not entry.name.startswith(f"{prefix}{kind}-"):
                continue
            match = _STAGED.fullmatch(entry.name.removeprefix(prefix))
            if match is None or (len(match[2]) == 16 and match[2][:8] != _host()):
                continue
            if not _alive(int(match[1])) and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _carry(old: Path, new: Path) -> None:
    """Link what is not ours from the older save."""
    for entry in old.iterdir():
        if _OURS.fullmatch(entry.name):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(new / entry.name))


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(staging: Path, path: Path, *, exists: bool) -> None:
    """Rename the staged folder to its place; an older save is then at `staging`, or gone."""
    if not exists:
        staging.rename(path)
        return
    if _exchange(staging, path):
        return
    aside = path.with_name(f".{path.name}.replaced-{_tag()}")
    path.rename(aside)
    try:
        staging.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


class Folder:
    """A folder to read from: one directory handle for all of its files.

    Args:
        directory: An existing folder.

    Attributes:
        path: As given.
        handle: The open directory.

    Raises:
        CheckpointError: It is none.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.path = os.fspath(directory)
        try:
            self.handle = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: cannot be opened as a folder: {error}") from error

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)

    def open(self, name: str, *, size: int | None = None) -> BinaryIO:
        """Open a regular file of this folder.

        Args:
            name: A plain name, already checked to have no separators.
            size: Its size, if known.

        Raises:
            CheckpointError: It is missing, a link, no regular file, or of another size.
        """
        where = self.where(name)
        if "/" in name or os.sep in name or name in ("", ".", ".."):
            raise CheckpointError(f"{where}: a file name may not lead elsewhere")
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            handle = os.open(name, flags, dir_fd=self.handle)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.ELOOP:
                raise CheckpointError(f"{where}: is a symbolic link; copy the file here") from None
            if isinstance(error, FileNotFoundError):
                raise CheckpointError(f"{where}: is missing") from None
            raise CheckpointError(f"{where}: cannot be opened: {error}") from error
        found = os.fstat(handle)
        problem = ""
        if not stat.S_ISREG(found.st_mode):
            problem = "is no regular file"
        elif size is not None and found.st_size != size:
            problem = f"has {found.st_size} bytes instead of {size}: it is truncated or was changed"
        if problem:
            os.close(handle)
            raise CheckpointError(f"{where}: {problem}")
        return os.fdopen(handle, "rb")

    def read(self, name: str, *, limit: int, size: int | None = None) -> bytes:
        """Return a file's content.

        Raises:
            CheckpointError: As `open`, or it is larger than `limit` bytes.
        """
        with self.open(name, size=size) as stream:
            try:
                data = stream.read(limit + 1)
            except OSError as error:
                raise CheckpointError(f"{self.where(name)}: cannot be read: {error}") from error
        if len(data) > limit:
            raise CheckpointError(f"{self.where(name)}: is larger than {limit} bytes")
        return data

    def where(self, name: str) -> str:
        """Return a file's path for messages."""
        return os.path.join(self.path, name)


__all__ = ["CHUNK", "MANIFEST", "Folder", "HashedFile", "new_file", "replace_folder"]
