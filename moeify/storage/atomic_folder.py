"""Folders that are written whole or not at all, and files that are read without trusting them.

A folder is staged beside its target, synced file by file, and put in place by one rename (on Linux
it is exchanged with an older one in one step). What an interrupted writer left is removed then, or
by the next writer; see `atomic_file` for single files and temporary names.

Files are opened without following links and without blocking on a FIFO, all from one directory
handle, so that a save that replaces the folder meanwhile cannot be mixed in.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final

from moeify.atomic_file import remove_leftovers, sync_folder, temporary_name
from moeify.errors import CheckpointError

log = logging.getLogger("moeify")

MANIFEST: Final = "moeify.json"
CHUNK: Final = 1 << 24

_OURS = re.compile(
    r"moeify\.json|plan\.yaml|source_config\.json|generation_config\.json|config\.json"
    r"|(?:configuration|modeling)_moeify\.py|model\.safetensors(?:\.index\.json)?"
    r"|(?:moeify|model)-[0-9]{5}-of-[0-9]{5}\.safetensors"
)
_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}


def replace_folder(target: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder and put it in place of `target`, all or nothing.

    What others put into an older save (a tokenizer, a README) is linked into the new one.

    Raises:
        CheckpointError: The target is neither absent, empty nor an older save, or it cannot be
            written; it is then unchanged.
    """
    path = resolve_target(target)
    old = holds_save(path)
    try:
        with staged_folder(path) as staging:
            if old:
                carry_over(path, staging)
            write(staging)
            publish(staging, path, exists=old)
    except OSError as error:
        state = "the older save is unchanged" if old else "nothing was left there"
        raise CheckpointError(f"{path}: cannot be saved: {error}; {state}") from error


def resolve_target(target: str | os.PathLike[str]) -> Path:
    """Return the absolute path to write to, links resolved."""
    text = os.fspath(target)
    try:
        path = Path(text).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{text!r}: is not a valid path: {error}") from error
    if not text or not path.name:
        raise CheckpointError(f"{text!r}: give the folder to save to")
    return path


def holds_save(path: Path) -> bool:
    """Return whether a path holds an older save; raise if it must not be written to."""
    try:
        if not path.parent.is_dir():
            raise CheckpointError(f"{path.parent}: is not a folder; create it first")
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
            f"{path}: holds files and is not a moeify save (it has no {MANIFEST}); nothing was "
            "changed: give another folder"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return True


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """Make a folder beside a path; whatever has its name at the end is removed."""
    staging = stage(path)
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def stage(path: Path) -> Path:
    """Make a folder beside a path, which the caller publishes or removes."""
    remove_leftovers(path.parent, path.name)
    staging = temporary_name(path)
    staging.mkdir()
    return staging


def publish(staging: Path, path: Path, *, exists: bool) -> None:
    """Put a staged folder, whose files are synced, in its place; remove an older one.

    Raises:
        OSError: It cannot be put there; an older one is unchanged.
    """
    sync_folder(staging)
    _put(staging, path, exists=exists)
    try:
        with contextlib.suppress(OSError):
            sync_folder(path.parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)  # the older one, after an exchange
        remove_leftovers(path.parent, path.name)


def move_files_into(
    staging: Path, target: Path, *, stale: re.Pattern[str], last: Sequence[str]
) -> None:
    """Move a staged folder's synced files into a folder that holds other things too.

    The files without which nothing loads are removed before all others and moved after them: if the
    machine stops in between, nothing loads from the folder, never a mix.

    Args:
        staging: Holds files only.
        target: Where they go.
        stale: Names of older files to remove.
        last: Files to move after all others, in this order.
    """
    for name in reversed(last):
        (target / name).unlink(missing_ok=True)
    for entry in list(target.iterdir()):
        if stale.fullmatch(entry.name):
            entry.unlink()
    sync_folder(target)
    names = [entry.name for entry in staging.iterdir()]
    for name in sorted(names, key=lambda n: (last.index(n) if n in last else -1, n)):
        (staging / name).replace(target / name)
    sync_folder(target)


@contextmanager
def locked_folder(path: Path) -> Iterator[None]:
    """Make a folder if needed and lock it against other processes; remove it at the end if empty.

    Raises:
        CheckpointError: Another process holds the lock, which ends with its process.
    """
    while True:
        with contextlib.suppress(FileExistsError):
            path.mkdir()
        if path.is_symlink():
            raise CheckpointError(f"{path}: is a link; remove it")
        try:
            handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:  # another process has just finished
            continue
        try:
            try:
                if not try_lock(handle):
                    raise CheckpointError(
                        f"{path}: another process is writing this folder; wait for it, or stop it"
                    )
            except OSError as error:  # a file system without locks
                log.warning("%s: cannot be locked (%s): do not start a second writer", path, error)
            if not _is_same(path, handle):
                continue
            try:
                yield
            finally:
                if _is_same(path, handle):
                    _remove_if_empty(path)
            return
        finally:
            os.close(handle)


def try_lock(handle: int) -> bool:
    """Take a lock that ends with its process; return False if another one has it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_same(path: Path, handle: int) -> bool:
    """Return whether a path is still the folder that was opened."""
    try:
        found = path.stat(follow_symlinks=False)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(handle))


def _remove_if_empty(path: Path) -> None:
    """Remove a folder that holds nothing but empty folders."""
    with contextlib.suppress(OSError):
        for entry in list(path.iterdir()):
            entry.rmdir()
        path.rmdir()


def carry_over(old: Path, new: Path) -> None:
    """Give a staged folder the older save's mode and links to what others put there."""
    new.chmod(stat.S_IMODE(old.stat().st_mode))
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


def _put(staging: Path, path: Path, *, exists: bool) -> None:
    """Rename the staged folder to its place; an older save is then at `staging`, or gone."""
    if not exists:
        staging.rename(path)
        return
    if _exchange(staging, path):
        return
    aside = temporary_name(path, "replaced")
    path.rename(aside)
    try:
        staging.rename(path)
    except BaseException:
        aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; return False where the system cannot."""
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
    """A folder to read from: one directory handle for all of its files."""

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

        Raises:
            CheckpointError: It is missing, a link, not a regular file, or not of `size` bytes.
        """
        where = self.where(name)
        if "/" in name or os.sep in name or name in ("", ".", ".."):
            raise CheckpointError(f"{where}: a file name must not contain a path")
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
            problem = "is not a regular file"
        elif size is not None and found.st_size != size:
            problem = f"has {found.st_size} bytes instead of {size}: it is truncated or was changed"
        if problem:
            os.close(handle)
            raise CheckpointError(f"{where}: {problem}")
        return os.fdopen(handle, "rb")

    def read(self, name: str, *, limit: int, size: int | None = None) -> bytes:
        """Return a file's content; raise if it is larger than `limit` bytes."""
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


def read_at(stream: BinaryIO, view: memoryview, offset: int, where: str) -> None:
    """Fill a view from a file, beginning at a byte of it."""
    done = 0
    while done < len(view):
        try:
            count = os.preadv(stream.fileno(), [view[done : done + CHUNK]], offset + done)
        except OSError as error:
            raise CheckpointError(f"{where}: cannot be read: {error}") from error
        if not count:
            raise CheckpointError(f"{where}: ends too early: it is being changed")
        done += count


__all__ = [
    "CHUNK",
    "MANIFEST",
    "Folder",
    "carry_over",
    "holds_save",
    "locked_folder",
    "move_files_into",
    "publish",
    "read_at",
    "replace_folder",
    "resolve_target",
    "stage",
    "staged_folder",
    "try_lock",
]
