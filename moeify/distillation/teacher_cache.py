"""A teacher's logits on disk, so that it runs once per row of data and not once per epoch.

A folder of safetensors shards and one JSON manifest; see `moeify.distillation.store`. The key of a
row is the SHA-256 of all inputs of the teacher for it, so that rows may be batched in another way.
After a crash the folder holds whole shards, and rows that are in none are computed again.

Shapes: N positions, V words, K words kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from moeify.distillation.divergence import TopK, top_k
from moeify.distillation.store import Row, Store
from moeify.errors import CheckpointError, MoeifyError

log = logging.getLogger("moeify")

SHARD_BYTES: Final = 64 << 20
_SAMPLE: Final = 64


class CacheMissError(MoeifyError, LookupError):
    """A batch has a row that is not in the cache, and there is no teacher to ask."""


class TeacherCache:
    """A folder of teacher logits.

    Args:
        folder: Made if it does not exist; its parent must.
        top_k: K, the likeliest words kept per position, the rest in one lump; None keeps all
            logits as the teacher gave them.
        temperature: T of the probabilities that are kept with `top_k`.
        vocab: Number of words, the first ones, that are kept; the student's size, if its vocabulary
            is the teacher's with less padding. None keeps all.
        shard_bytes: A shard is written when so much has been gathered.

    Attributes:
        nbytes: Bytes of the shards on the disk.
        rows: Rows that can be read.

    Raises:
        CheckpointError: The folder holds something else, or a cache of other options.

    Example:
        >>> cache = TeacherCache(folder, top_k=64)  # doctest: +SKIP
        >>> kd = moeify.distill(student, teacher, cache=cache)  # doctest: +SKIP
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        top_k: int | None = None,
        temperature: float = 1.0,
        vocab: int | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k: {top_k} is not at least 1, nor None for all")
        self.top_k, self.temperature, self._vocab = top_k, float(temperature), vocab
        self._writer = Store(Path(folder), shard_bytes, self._options())
        self._finalizer = weakref.finalize(self, self._writer.close)

    def __enter__(self) -> TeacherCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def nbytes(self) -> int:
        return sum(record["bytes"] for record in self._writer.shards)

    @property
    def rows(self) -> int:
        return len(self._writer.places) + len(self._writer.pending)

    def close(self) -> None:
        """Write what was gathered and end reading; the end of the program does so too."""
        if self._finalizer.alive:
            self._finalizer()
            log.info("%s: %d rows in %d bytes", self._writer.folder, self.rows, self.nbytes)

    def bind(self, teacher: nn.Module) -> None:
        """Check that the cache is this teacher's, or make it so if it is empty.

        Raises:
            CheckpointError: It was filled by other weights.
        """
        found, own = self._writer.teacher, fingerprint(teacher)
        if found is not None and found != own:
            raise CheckpointError(
                f"{self._writer.folder}: was filled by a teacher of other weights: give that one, "
                "or another folder"
            )
        self._writer.teacher = own

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Return the positions of keys whose rows cannot be read."""
        known = self._writer
        return [
            i for i, key in enumerate(keys) if key not in known.places and key not in known.pending
        ]

    def add(self, keys: Sequence[bytes], logits: Tensor) -> None:
        """Keep a teacher's logits [B, ..., V] under B keys, of `row_keys`."""
        new = self.missing(keys)
        if not new:
            return
        rows = logits.detach()[new][..., : self._vocab]
        each = rows[0, ..., 0].numel()
        flat = rows.flatten(0, -2)
        if self.top_k is None:
            kept: Row = (flat.cpu(),)
        else:
            k = min(self.top_k, flat.shape[1])
            found = top_k(flat, k, self.temperature)
            kept = tuple(part.cpu() for part in found[:3])
        for at, i in enumerate(new):
            part = slice(at * each, (at + 1) * each)
            self._writer.put(keys[i], tuple(t[part].clone() for t in kept), flat.shape[1])

    def read(self, keys: Sequence[bytes]) -> Tensor | TopK:
        """Return rows on the CPU, flat: logits [N, V] in the teacher's dtype, or a `TopK`.

        Raises:
            CacheMissError: A row is missing.
            CheckpointError: A row is damaged.
        """
        missing = self.missing(keys)
        if missing:
            raise CacheMissError(
                f"{self._writer.folder}: {len(missing)} of {len(keys)} rows of this batch are not "
                f"in the cache (the first is row {missing[0]}): give the teacher too, or fill the "
                "cache with the same inputs"
            )
        parts = [self._writer.get(key) for key in keys]
        joined = [torch.cat(each) for each in zip(*parts, strict=True)]
        if self.top_k is None:
            return joined[0]
        return TopK(joined[0], joined[1], joined[2], self._writer.vocab or 0)

    def flush(self) -> None:
        """Write what was gathered."""
        self._writer.flush()

    def verify(self) -> None:
        """Compare every shard with its SHA-256 in the manifest.

        Raises:
            CheckpointError: One was changed.
        """
        for record in self._writer.shards:
            if self._writer.files.sha256(record["file"]) != record["sha256"]:
                raise CheckpointError(
                    f"{self._writer.folder / record['file']}: its SHA-256 is not the manifest's: "
                    "delete the folder and fill it again"
                )

    def _options(self) -> dict[str, Any]:
        if self.top_k is None:
            return {"top_k": None}  # logits serve any temperature
        return {"top_k": self.top_k, "temperature": self.temperature}


def row_keys(inputs: Mapping[str, Any]) -> list[bytes]:
    """Return a key of 32 bytes for each row of a batch; integers of any width give the same.

    Inputs are tensors [B, ...] of one B, and plain values that hold for all rows.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in inputs.items() if name not in tensors}
    sizes = {value.shape[0] if value.dim() else None for value in tensors.values()}
    plain = all(v is None or isinstance(v, bool | int | float | str) for v in others.values())
    if len(sizes) != 1 or None in sizes or not plain:
        shown = {name: list(value.shape) for name, value in tensors.items()}
        raise MoeifyError(
            f"a batch of {shown} and {sorted(others)} cannot be cached row by row: give tensors "
            "that all have the batch as their first dimension"
        )
    head = json.dumps(others, sort_keys=True).encode()
    count = next(iter(tensors.values())).shape[0]
    digests = [hashlib.sha256(head) for _ in range(count)]
    for name in sorted(tensors):
        value = tensors[name].detach()
        value = value if value.is_floating_point() else value.to(torch.int64)
        value = value.cpu().contiguous()
        about = f"{name}:{value.dtype}:{list(value.shape[1:])}".encode()
        for digest, row in zip(digests, value, strict=True):
            digest.update(about)
            digest.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
    return [digest.digest() for digest in digests]


def fingerprint(model: nn.Module) -> str:
    """Return a digest of a model's names, shapes, dtypes, and some values of each tensor."""
    digest = hashlib.sha256()
    model = getattr(model, "_orig_mod", model)
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor) or name.endswith("pending_counts"):
            continue
        digest.update(f"{name}:{tensor.dtype}:{list(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SAMPLE)].cpu().contiguous()
        digest.update(some.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
