"""Processes that are killed before, or in the middle of, each operation on files."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from moeify.atomic_file import SyncedFile
from moeify.errors import CheckpointError

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.link")


class Steps:
    """Calls `act` before the n-th operation on files below a folder, or in the middle of a write.

    Writes are those of one class; half of the data is written before `act` is called.
    """

    def __init__(
        self, n: int, folder: Path, act: Callable[[], None], written: type[SyncedFile]
    ) -> None:
        self.left, self.folder, self.act, self.written = n, str(folder), act, written

    def count(self) -> bool:
        self.left -= 1
        return self.left == 0

    def event(self, name: str, args: tuple[object, ...]) -> None:
        if name in EVENTS and any(str(a).startswith(self.folder) for a in args) and self.count():
            self.act()

    def install(self, patch: Callable[[object, str, object], None], *, audit: bool) -> None:
        fsync, write = os.fsync, self.written.write

        def counted_fsync(handle: int) -> None:
            if self.count():
                self.act()
            fsync(handle)

        def counted_write(file: SyncedFile, data: bytes | memoryview) -> None:
            if self.count():
                write(file, memoryview(data)[: len(data) // 2])
                file.flush()
                self.act()
            write(file, data)

        patch(os, "fsync", counted_fsync)
        patch(self.written, "write", counted_write)
        if audit:
            sys.addaudithook(self.event)


def victim(run: Callable[[], None]) -> int:
    """Run something in a fork; return its exit status, negative for a signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            run()
            status = 0
        except CheckpointError:
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
