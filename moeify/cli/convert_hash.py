"""The SHA-256 of a source's files, computed in a thread while they are converted."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 22


@contextmanager
def hashing(paths: Sequence[Path]) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash files in a thread; yield a function that waits for the digests, in hex by file name.

    Leaving the block early stops the thread.
    """
    stop = threading.Event()

    def run() -> dict[str, str]:
        return {path.name: _sha256(path, stop) for path in paths}

    with ThreadPoolExecutor(1, "moeify-source") as pool:
        found = pool.submit(run)
        try:
            yield found.result
        finally:
            stop.set()


def _sha256(path: Path, stop: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    with path.open("rb", buffering=0) as stream:
        while (count := stream.readinto(buffer)) and not stop.is_set():
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
