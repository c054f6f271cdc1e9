"""Compiled libraries on disk: built whole or not at all, and loaded only as they were built.

They lie in `moeify/kernels` under `XDG_CACHE_HOME` (`~/.cache`), in a folder that this user alone
can enter, never in a shared one. Beside each library is its SHA-256, compared before it is loaded;
what is not whole is built again. Where there is no such folder (no home, or one that others can
write to), a process builds its own in a temporary folder, which it removes at its end.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from filelock import FileLock

from moeify.atomic_file import replace_file
from moeify.compat import cpp_command

log = logging.getLogger("moeify")

_PRIVATE = 0o700


def load(source: str) -> ctypes.CDLL:
    """Compile C++ for this processor, unless that is done already, and load it.

    OpenMP is torch's own, so `torch.set_num_threads` applies.

    Raises:
        OSError: No compiler, or it failed; or no folder can be written.
    """
    key = hashlib.sha256("\0".join([source, *_facts()]).encode()).hexdigest()[:32]
    library = folder() / f"{key}.so"
    # One process builds, the others wait for it; a killed one lets go of the lock.
    with FileLock(library.with_suffix(".lock"), mode=0o600):
        if not _is_whole(library):
            _build(source, library)
        return ctypes.CDLL(str(library))


@functools.cache
def folder() -> Path:
    """Return the folder of this user's libraries; a temporary one where that cannot be trusted."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    wanted = root / "moeify" / "kernels"
    try:
        for path in (wanted.parent, wanted):
            path.mkdir(mode=_PRIVATE, parents=path == wanted.parent, exist_ok=True)
        problem = next((p for path in (wanted.parent, wanted) if (p := _problem(path))), "")
        if not problem and not os.access(wanted, os.W_OK):
            problem = f"{wanted} cannot be written"
    except OSError as error:
        problem = str(error)
    if not problem:
        return wanted
    own = Path(tempfile.mkdtemp(prefix="moeify-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    log.warning(
        "compiled kernels are not kept, and every process compiles its own: %s. Set XDG_CACHE_HOME "
        "to a folder that you own",
        problem,
    )
    return own


def _problem(path: Path) -> str:
    """Return why others may have put something into a folder, or ""."""
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode):
        return f"{path} is not a folder"
    if hasattr(os, "geteuid") and found.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if found.st_mode & 0o077:
        return f"{path} is open to other users (chmod 700 it, once you have emptied it)"
    return ""


@functools.cache
def _facts() -> tuple[str, ...]:
    """Return what decides, beside the source, how a library comes out."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # home folders are shared by machines
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = "".join(sorted({ln for ln in lines if ln.startswith(("flags", "Features"))}))
    return (*cpp_command("i", "o"), processor)


def _is_whole(library: Path) -> bool:
    """Tell whether a library is what was built, by the digest beside it."""
    try:
        digest = hashlib.sha256(library.read_bytes()).hexdigest()
        return library.with_suffix(".sha256").read_text() == digest
    except OSError:
        return False


def _build(source: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as name:
        text, made = Path(name, "main.cpp"), Path(name, "main.so")
        text.write_text(source)
        command = cpp_command(str(text), str(made))
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            first = next((ln for ln in done.stderr.splitlines() if "error" in ln), "")
            raise OSError(
                f"{command[0]} ended with {done.returncode}: {first or done.stderr[:200]}"
            )
        data = made.read_bytes()
    replace_file(library, data)
    replace_file(library.with_suffix(".sha256"), hashlib.sha256(data).hexdigest().encode())
