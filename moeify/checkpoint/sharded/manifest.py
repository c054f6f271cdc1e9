"""`moeify-sharded.json`: what a sharded checkpoint holds and where, checked against itself."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from moeify.errors import CheckpointError
from moeify.plan.selection import Strict
from moeify.storage.atomic_folder import Folder
from moeify.storage.manifest import Digest, LayerRecord, Ledger, ModelRecord, Natural
from moeify.storage.safetensors_file import DTYPES
from moeify.storage.strict_json import decode_manifest, parse_json

__all__ = [
    "NAME",
    "VERSION",
    "DataFile",
    "OptimizerRecord",
    "OptionGroup",
    "PieceRecord",
    "ShardedManifest",
    "StoredTensor",
    "read",
]

NAME: Final = "moeify-sharded.json"
VERSION: Final = 2
MAX_BYTES: Final = 1 << 30
_FILE = re.compile(r"moeify-rank-[0-9]{5,7}\.safetensors")


class PieceRecord(Strict):
    """One rectangle of a tensor, whose bytes lie row by row in a file."""

    file: Natural  # its position in `files`
    begin: Natural  # first byte in the file
    bytes: Natural
    sha256: Digest  # of these bytes
    at: list[Natural]  # where it begins in the tensor
    size: list[Natural]


class StoredTensor(Strict):
    """One tensor."""

    dtype: str
    shape: list[Natural]
    role: Literal["parameter", "buffer", "scratch", "optimizer", "rng"]
    requires_grad: bool
    pieces: list[PieceRecord]


class OptionGroup(Strict):
    """Hyperparameters of some parameters."""

    options: dict[str, Any]  # by name, such as `lr`
    names: list[str]  # of the parameters


class OptimizerRecord(Strict):
    """An optimizer beside its tensors."""

    name: str  # its class
    groups: list[OptionGroup]
    states: dict[str, list[str]]  # parameter: keys; a tensor is `optimizer.<parameter>.<key>`
    values: dict[str, dict[str, Any]]  # parameter: state that is not a tensor, by key


class DataFile(Strict):
    """One file with tensors."""

    file: str
    bytes: Natural


class ShardedManifest(Strict):
    """The content of `moeify-sharded.json`, without its own digest."""

    format: Literal["moeify-sharded"]
    version: Literal[2]
    versions: dict[str, str]  # of the packages that wrote it
    step: Natural
    world: Annotated[int, Field(ge=1)]  # number of ranks that wrote it
    layout: dict[str, Any]  # their "tensor" and "expert" parallelism, and "experts_in_tp"
    plan: dict[str, Any]
    plan_sha256: Digest
    layers: list[LayerRecord]
    model: ModelRecord
    inputs: Any  # the example inputs; None where they cannot be made again
    ledger: Ledger
    texts: dict[str, str]  # config files of a Hugging Face model
    aliases: dict[str, str]  # further name: name in `tensors`, without "model."
    tensors: dict[str, StoredTensor]
    optimizer: OptimizerRecord | None
    extra: dict[str, Any]  # the user's own data
    files: list[DataFile]

    def of_model(self) -> dict[str, StoredTensor]:
        """Return the model's tensors by the name in the model."""
        return {
            key.removeprefix("model."): tensor
            for key, tensor in self.tensors.items()
            if tensor.role in ("parameter", "buffer", "scratch") and key.startswith("model.")
        }


def read(folder: Folder) -> ShardedManifest:
    """Read and check `moeify-sharded.json`.

    Raises:
        CheckpointError: It is missing, damaged, of another version, or contradicts itself.
    """
    where = folder.where(NAME)
    data = parse_json(folder.read(NAME, limit=MAX_BYTES), where)
    if not isinstance(data, dict) or data.get("format") != "moeify-sharded":
        raise CheckpointError(f"{where}: format: is not a sharded moeify checkpoint")
    manifest = decode_manifest(ShardedManifest, data, VERSION, where)
    check(manifest, where)
    return manifest


def check(manifest: ShardedManifest, where: str) -> None:
    """Check the parts of a manifest against each other."""
    seen = set()
    for record in manifest.files:
        if _FILE.fullmatch(record.file) is None or record.file in seen:
            raise CheckpointError(
                f"{where}: files: {record.file!r:.80} is not the name of a data file"
            )
        seen.add(record.file)
    spans: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for key, tensor in manifest.tensors.items():
        at = f"{where}: tensors.{key}"
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"{at}: dtype: {tensor.dtype!r:.40} is unknown")
        if len(tensor.shape) > 64:
            raise CheckpointError(f"{at}: shape: more than 64 dimensions")
        for piece in tensor.pieces:
            _check_piece(manifest, tensor, piece, at)
            spans[piece.file].append((piece.begin, piece.begin + piece.bytes))
        _check_cover(tensor, at)
    for number, found in spans.items():
        found.sort()
        if any(later[0] < earlier[1] for earlier, later in pairwise(found)):
            name = manifest.files[number].file
            raise CheckpointError(f"{where}: files: two pieces share bytes of {name}")
    for alias, name in manifest.aliases.items():
        if f"model.{name}" not in manifest.tensors:
            raise CheckpointError(f"{where}: aliases.{alias}: {name!r:.80} is not a tensor")
    optimizer = manifest.optimizer
    for name, keys in ({} if optimizer is None else optimizer.states).items():
        for key in keys:
            if f"optimizer.{name}.{key}" not in manifest.tensors:
                raise CheckpointError(f"{where}: optimizer.states.{name}: {key} is not a tensor")


def _check_piece(
    manifest: ShardedManifest, tensor: StoredTensor, piece: PieceRecord, at: str
) -> None:
    if piece.file >= len(manifest.files):
        raise CheckpointError(f"{at}: pieces: there is no file number {piece.file}")
    if len(piece.at) != len(tensor.shape) or len(piece.size) != len(tensor.shape):
        raise CheckpointError(f"{at}: pieces: one has other dimensions than the tensor")
    inside = all(
        size > 0 and first + size <= whole
        for first, size, whole in zip(piece.at, piece.size, tensor.shape, strict=True)
    )
    if not inside:
        raise CheckpointError(f"{at}: pieces: {piece.at} + {piece.size} is outside {tensor.shape}")
    if piece.bytes != math.prod(piece.size) * DTYPES[tensor.dtype].itemsize:
        raise CheckpointError(f"{at}: pieces: {piece.bytes} bytes for {piece.size}")
    if piece.begin + piece.bytes > manifest.files[piece.file].bytes:
        raise CheckpointError(f"{at}: pieces: one ends after the end of its file")


def _check_cover(tensor: StoredTensor, at: str) -> None:
    """Check that pieces cover a tensor exactly: volumes add up, and none overlaps another."""
    volume = sum(math.prod(piece.size) for piece in tensor.pieces)
    if volume != math.prod(tensor.shape):
        raise CheckpointError(
            f"{at}: pieces: {volume} of {math.prod(tensor.shape)} elements are there"
        )
    if len(tensor.pieces) < 2:
        return
    starts = [{piece.at[dim] for piece in tensor.pieces} for dim in range(len(tensor.shape))]
    along = max(range(len(starts)), key=lambda dim: len(starts[dim]))
    active: list[PieceRecord] = []
    for piece in sorted(tensor.pieces, key=lambda p: p.at[along]):
        active = [p for p in active if p.at[along] + p.size[along] > piece.at[along]]
        for other in active:
            if all(
                a < b + m and b < a + n
                for a, n, b, m in zip(piece.at, piece.size, other.at, other.size, strict=True)
            ):
                raise CheckpointError(f"{at}: pieces: two of them overlap at {piece.at}")
        active.append(piece)
