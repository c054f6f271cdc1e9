"""`moeify.json`: what a saved model is, as strict data that is checked against itself."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from moeify.errors import CheckpointError
from moeify.plan.layer_description import LayerDescription
from moeify.plan.selection import Strict
from moeify.storage.atomic_folder import MANIFEST, Folder
from moeify.storage.strict_json import decode_manifest, parse_json

VERSION: Final = 2
MAX_BYTES: Final = 1 << 28

SHARD_NAME: Final = re.compile(r"moeify-([0-9]{5})-of-([0-9]{5})\.safetensors")
Natural = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
_Dtype = Literal[
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint64",
    "uint32",
    "uint16",
    "uint8",
    "bool",
    "complex64",
]
# A name alone: an implementation such as "owner/kernel" would make transformers download code.
_Implementation = Annotated[str, Field(pattern="^[A-Za-z0-9_]+$")]


# Where each dense parameter went: name: [fate, place].
Ledger = dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]


class FileRecord(Strict):
    """One file of the folder."""

    file: str
    sha256: Digest
    bytes: Natural


class TensorRecord(Strict):
    """One stored tensor."""

    shard: str
    dtype: _Dtype
    shape: list[Natural]
    # "scratch": a buffer outside the state dict (rotary frequencies), kept as a cast may change it
    role: Literal["parameter", "buffer", "scratch"]
    requires_grad: bool


class LayerRecord(Strict):
    """One converted layer, and what proves that another conversion gives the same."""

    plan: LayerDescription
    block: str  # path
    swaps: list[str]  # paths of the modules that were replaced
    graph: Digest  # of the block's graph, as moeify prints it
    inner: Digest  # of the graphs inside the block: activations that moeify does not know


class ModelRecord(Strict):
    """What is kept of the model beside its tensors."""

    name: str  # fully qualified class
    training: bool
    other_mode: list[str]  # paths of the modules that were in the other mode
    # Of a Hugging Face model: its own under "", those of the parts of its config by their name.
    attention: dict[str, _Implementation | None]
    experts: dict[str, _Implementation | None]


class Manifest(Strict):
    """The content of `moeify.json`, without its own digest."""

    format: Literal["moeify"]
    version: Literal[2]
    versions: dict[str, str]  # of the packages that wrote it
    model: ModelRecord
    plan: dict[str, Any]
    plan_sha256: Digest
    layers: list[LayerRecord]  # in execution order
    inputs: Any  # the example inputs; None where they cannot be made again
    ledger: Ledger
    dtype: _Dtype  # of most parameter elements
    parameters: Natural  # elements, shared ones counted once
    tensors: dict[str, TensorRecord]
    aliases: dict[str, str]  # further name: name in `tensors`
    shards: list[FileRecord]
    files: list[FileRecord]  # all others
    # Folder, files and digests that the weights came from; empty for a model in memory.
    source: dict[str, Any] = Field(default_factory=dict)

    def of_shard(self, file: str) -> dict[str, TensorRecord]:
        """Return the tensors of one shard by name."""
        return {name: t for name, t in self.tensors.items() if t.shard == file}

    def names(self) -> dict[str, str]:
        """Map every name, aliases included, to the name that its tensor is stored under."""
        return {name: name for name in self.tensors} | self.aliases


def read_manifest(folder: Folder) -> Manifest:
    """Read and check `moeify.json`.

    Raises:
        CheckpointError: It is missing, damaged, of another version, or contradicts itself; the
            message names the file and the key.
    """
    where = folder.where(MANIFEST)
    data = parse_json(folder.read(MANIFEST, limit=MAX_BYTES), where)
    if not isinstance(data, dict) or data.get("format") != "moeify":
        raise CheckpointError(f"{where}: format: is not a saved moeify model")
    manifest = decode_manifest(Manifest, data, VERSION, where)
    _check(manifest, where)
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    """Check the parts of a manifest against each other."""
    count = len(manifest.shards)
    for number, record in enumerate(manifest.shards, 1):
        match = SHARD_NAME.fullmatch(record.file)
        if match is None or (int(match[1]), int(match[2])) != (number, count):
            raise CheckpointError(
                f"{where}: shards[{number - 1}].file: {record.file!r:.80} is not "
                f"moeify-{number:05d}-of-{count:05d}.safetensors"
            )
    files = {record.file for record in manifest.shards}
    for name, tensor in manifest.tensors.items():
        if tensor.shard not in files:
            raise CheckpointError(
                f"{where}: tensors.{name}.shard: {tensor.shard!r:.80} is not a shard"
            )
    for alias, name in manifest.aliases.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CheckpointError(f"{where}: aliases.{alias}: {name!r:.80} does not fit `tensors`")
    total = sum(math.prod(t.shape) for t in manifest.tensors.values() if t.role == "parameter")
    if total != manifest.parameters:
        raise CheckpointError(
            f"{where}: parameters: {manifest.parameters}, but the tensors have {total}"
        )
