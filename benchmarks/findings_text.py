"""Real text without a download: the standard library's sources and documents, as bytes.

Files, not windows, are held out, so that no file is in both parts; which ones is fixed by a hash
of the path. Identical and nearly identical files are taken once, or copies of a training file would
be in the held-out part.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".py", ".txt", ".rst", ".md", ".html")
LEFT_OUT = ("site-packages", "dist-packages", "__pycache__")
HELD_OUT_IN = 10
"""One file in so many is held out."""
SHINGLE = 3
"""Lines of a shingle."""
MOST_SEEN = 0.5
"""A file is left out if this share of its shingles is in files that were taken."""
LARGEST = 400_000
"""Bytes of the largest file that is taken: beyond it are tables."""
END = b"\0"
"""Stands between files."""


@dataclass(frozen=True)
class Corpus:
    """Text by part."""

    train: Tensor  # [N] uint8, the training files one after the other, in the order of a hash
    held_out: tuple[Tensor, ...]  # one [n] uint8 per held-out file, in the order of a hash
    facts: dict[str, int | str]  # files, bytes, what was left out, and a digest of all of it


def read(root: Path | None = None) -> Corpus:
    """Read, deduplicate and split.

    Args:
        root: A folder of text; Python's standard library if None.

    Raises:
        ValueError: One of the parts is empty.
    """
    root = Path(sysconfig.get_paths()["stdlib"]) if root is None else root
    taken, identical, near = _deduplicated(_files(root))
    parts: dict[bool, list[tuple[str, bytes]]] = {False: [], True: []}
    for name, content in sorted(taken, key=lambda file: _hash(file[0])):
        parts[is_held_out(name)].append((name, content))
    if not parts[False] or not parts[True]:
        raise ValueError(f"{root}: {len(taken)} files are too few to hold some out")
    train = END.join(content for _, content in parts[False])
    digest = hashlib.sha256(train)
    for _, content in parts[True]:
        digest.update(END + content)
    held_out = [content for _, content in parts[True]]
    facts: dict[str, int | str] = {
        "train_files": len(parts[False]),
        "train_bytes": len(train),
        "held_out_files": len(held_out),
        "held_out_bytes": sum(map(len, held_out)),
        "identical_left_out": identical,
        "near_identical_left_out": near,
        "sha256": digest.hexdigest(),
    }
    return Corpus(_tensor(train), tuple(_tensor(content) for content in held_out), facts)


def is_held_out(name: str) -> bool:
    """Return whether the file of that relative path is held out."""
    return _hash(name) % HELD_OUT_IN == 0


def batches(train: Tensor, context: int, batch: int, seed: int, first: int) -> Iterator[Tensor]:
    """Yield batches [batch, context] int64 without end, from the `first` one of a seed's order.

    Windows do not overlap; each is seen once before any is seen again.
    """
    windows = len(train) // context
    per_epoch = windows // batch
    if not per_epoch:
        raise ValueError(f"{len(train)} bytes hold no batch of {batch} x {context}")
    at, order, epoch = first, torch.empty(0), -1
    view = train[: windows * context].view(windows, context)
    while True:
        if at // per_epoch != epoch:
            epoch = at // per_epoch
            generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
            order = torch.randperm(windows, generator=generator)
        start = at % per_epoch * batch
        yield view[order[start : start + batch]].long()
        at += 1


def held_out_windows(files: Sequence[Tensor], context: int, most: int) -> Tensor:
    """Return about `most` tokens of all files: [W, context] int64, -1 after a file's end.

    Windows are taken evenly from the list of all windows of all files, so that a file weighs what
    it holds.
    """
    windows = [part for file in files for part in file.split(context) if len(part) > 1]
    count = max(1, min(len(windows), most // context))
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    out = torch.full((count, context), -1, dtype=torch.int64)
    for row, part in zip(out, chosen, strict=True):
        row[: len(part)] = part
    return out


def _files(root: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.suffix not in SUFFIXES or set(name.parts) & set(LEFT_OUT) or not path.is_file():
            continue
        content = path.read_bytes()
        if 0 < len(content) <= LARGEST and END not in content:
            yield name.as_posix(), content


def _deduplicated(
    files: Iterator[tuple[str, bytes]],
) -> tuple[list[tuple[str, bytes]], int, int]:
    """Return the files to take, and how many were identical, or nearly, to those before."""
    taken, whole, seen = [], set(), set()
    identical = near = 0
    for name, content in files:
        digest = hashlib.sha256(content).digest()
        shingles = _shingles(content)
        if digest in whole:
            identical += 1
        elif shingles and len(shingles & seen) >= MOST_SEEN * len(shingles):
            near += 1
        else:
            taken.append((name, content))
            whole.add(digest)
            seen |= shingles
    return taken, identical, near


def _shingles(content: bytes) -> set[bytes]:
    lines = [line for line in (line.strip() for line in content.splitlines()) if line]
    last = max(1, len(lines) - SHINGLE + 1)
    return {
        hashlib.blake2b(b"\n".join(lines[i : i + SHINGLE]), digest_size=8).digest()
        for i in range(last if lines else 0)
    }


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)
