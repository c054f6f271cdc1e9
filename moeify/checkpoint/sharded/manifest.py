"""`moeify-sharded.json`: what a sharded checkpoint holds and where, checked against itself."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from moeify.errors import CheckpointError
from moeify.plan.selection import Strict
from moeify.plan.strict_yaml import path_text
from moeify.storage.atomic_folder import Folder
from moeify.storage.manifest import LayerRecord, ModelRecord
from moeify.storage.safetensors_file import DTYPES
from moeify.storage.strict_json import canonical_digest, parse_json

__all__ = [
    "NAME",
    "VERSION",
    "DataFile",
    "OptimizerRecord",
    "OptionGroup",
    "PieceRecord",
    "ShardedManifest",
    "StoredTensor",
    "encode",
    "read",
]

NAME: Final = "moeify-sharded.json"
VERSION: Final = 2
MAX_BYTES: Final = 1 << 30
_FILE = re.compile(r"moeify-rank-[0-9]{5,7}\.safetensors")
_Natural = Annotated[int, Field(ge=0)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class PieceRecord(Strict):
    """One rectangle of a tensor.

    Attributes:
        file: Position of its file in `files`.
        begin: Its first byte there.
        bytes: Its length; the values lie row by row.
        sha256: Of these bytes, in hex.
        at: Where it begins in the tensor.
        size: Its sizes.
    """

    file: _Natural
    begin: _Natural
    bytes: _Natural
    sha256: _Digest
    at: list[_Natural]
    size: list[_Natural]


class StoredTensor(Strict):
    """One tensor.

    Attributes:
        dtype: Such as `float32`.
        shape: Of the whole.
        role: What it is.
        requires_grad: Whether it trains.
        pieces: The rectangles that it is made of.
    """

    dtype: str
    shape: list[_Natural]
    role: Literal["parameter", "buffer", "scratch", "optimizer", "rng"]
    requires_grad: bool
    pieces: list[PieceRecord]


class OptionGroup(Strict):
    """Hyperparameters of some parameters.

    Attributes:
        options: By name, such as `lr`.
        names: The parameters.
    """

    options: dict[str, Any]
    names: list[str]


class OptimizerRecord(Strict):
    """An optimizer beside its tensors.

    Attributes:
        name: Its class.
        groups: Hyperparameters.
        states: Names of the state tensors of each parameter; `optimizer.<name>.<key>` holds one.
        values: State that is no tensor.
    """

    name: str
    groups: list[OptionGroup]
    states: dict[str, list[str]]
    values: dict[str, dict[str, Any]]


class DataFile(Strict):
    """One file with tensors.

    Attributes:
        file: Its name.
        bytes: Its size.
    """

    file: str
    bytes: _Natural


class ShardedManifest(Strict):
    """The content of `moeify-sharded.json`, without its own digest.

    Attributes:
        format: Always "moeify-sharded".
        version: Of the format.
        versions: Of the packages that wrote it.
        step: The training step.
        world: How many ranks wrote it.
        layout: How they were cut: "tensor", "expert", "experts_in_tp".
        plan: The plan's data.
        plan_sha256: Its digest.
        layers: What was converted.
        model: What the model was; None where it was not described.
        inputs: Description of the example inputs; None where they cannot be made again.
        ledger: Where each dense parameter went.
        texts: Config files of a Hugging Face model.
        aliases: Further names of tied tensors.
        tensors: All tensors by key.
        optimizer: The optimizer, if one was saved.
        extra: The user's own data.
        files: The files.
    """

    format: Literal["moeify-sharded"]
    version: Literal[2]
    versions: dict[str, str]
    step: _Natural
    world: Annotated[int, Field(ge=1)]
    layout: dict[str, Any]
    plan: dict[str, Any]
    plan_sha256: _Digest
    layers: list[LayerRecord]
    model: ModelRecord
    inputs: Any
    ledger: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]
    texts: dict[str, str]
    aliases: dict[str, str]
    tensors: dict[str, StoredTensor]
    optimizer: OptimizerRecord | None
    extra: dict[str, Any]
    files: list[DataFile]


def encode(manifest: ShardedManifest) -> bytes:
    """Return the file's content."""
    data = manifest.model_dump(mode="json", by_alias=True)
    data["sha256"] = canonical_digest(data)
    return json.dumps(data, allow_nan=False).encode() + b"\n"


def read(folder: Folder) -> ShardedManifest:
    """Read and check `moeify-sharded.json`.

    Raises:
        CheckpointError: It is missing, damaged, of another version, or contradicts itself.
    """
    where = folder.where(NAME)
    data = parse_json(folder.read(NAME, limit=MAX_BYTES), where)
    if not isinstance(data, dict) or data.get("format") != "moeify-sharded":
        raise CheckpointError(f"{where}: format: is no sharded moeify checkpoint")
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{where}: version: {version!r:.40} cannot be read, only {VERSION}; "
            "use the moeify that wrote it"
        )
    digest = data.pop("sha256", None)
    try:
        manifest = ShardedManifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}: {path_text(first['loc'])}: {first['msg']}") from None
    if digest != canonical_digest(data):
        raise CheckpointError(f"{where}: sha256: is not the digest of the rest: it was changed")
    check(manifest, where)
    return manifest


def check(manifest: ShardedManifest, where: str) -> None:
    """Hold the parts of a manifest against each other.

    Raises:
        CheckpointError: They do not fit; names the tensor.
    """
    seen = set()
    for record in manifest.files:
        if _FILE.fullmatch(record.file) is None or record.file in seen:
            raise CheckpointError(f"{where}: files: {record.file!r:.80} is no name of a data file")
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
            raise CheckpointError(f"{where}: aliases.{alias}: {name!r:.80} is no tensor")
    record_of = manifest.optimizer
    for name, keys in ({} if record_of is None else record_of.states).items():
        for key in keys:
            if f"optimizer.{name}.{key}" not in manifest.tensors:
                raise CheckpointError(f"{where}: optimizer.states.{name}: {key} is no tensor")


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
        raise CheckpointError(f"{at}: pieces: one ends behind the end of its file")


def _check_cover(tensor: StoredTensor, at: str) -> None:
    """Check that pieces cover a tensor exactly: volumes add up, and none overlaps another."""
    volume = sum(math.prod(piece.size) for piece in tensor.pieces)
    if volume != math.prod(tensor.shape):
        raise CheckpointError(
            f"{at}: pieces: {volume} elements of {math.prod(tensor.shape)} are there"
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
