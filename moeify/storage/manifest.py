"""`moeify.json`: what a saved model is, as strict data that is checked against itself."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from moeify.errors import CheckpointError
from moeify.plan.layer_description import LayerDescription
from moeify.plan.selection import Strict
from moeify.plan.strict_yaml import path_text
from moeify.storage.atomic_folder import MANIFEST, Folder
from moeify.storage.strict_json import canonical_digest, parse_json

VERSION: Final = 2
MAX_BYTES: Final = 1 << 28

SHARD_NAME: Final = re.compile(r"moeify-([0-9]{5})-of-([0-9]{5})\.safetensors")
_Natural = Annotated[int, Field(ge=0)]
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
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


class FileRecord(Strict):
    """One file of the folder.

    Attributes:
        file: Its name.
        sha256: Digest of its content, in hex.
        bytes: Its size.
    """

    file: str
    sha256: _Digest
    bytes: _Natural


class TensorRecord(Strict):
    """One stored tensor.

    Attributes:
        shard: The file that holds it.
        dtype: Such as `float32`.
        shape: Sizes.
        role: A parameter, a buffer of the state dict, or a buffer that is in no state dict
            (`scratch`: such as rotary frequencies, kept because a cast may have changed them).
        requires_grad: Whether it trains.
    """

    shard: str
    dtype: _Dtype
    shape: list[_Natural]
    role: Literal["parameter", "buffer", "scratch"]
    requires_grad: bool


class LayerRecord(Strict):
    """One converted layer, and what proves that another conversion is the same.

    Attributes:
        plan: What it became.
        block: Path of the block.
        swaps: Paths of the modules that were replaced.
        graph: Digest of the block's graph, as moeify prints it.
        inner: Digest of the graphs inside it, which hold what of the dense MLP is no activation
            that moeify knows.
    """

    plan: LayerDescription
    block: str
    swaps: list[str]
    graph: _Digest
    inner: _Digest


class ModelRecord(Strict):
    """What the model was beside its tensors.

    Attributes:
        name: Fully qualified class.
        training: Mode of the model.
        other_mode: Paths of the modules that were in the other mode.
        attention: Attention implementations of a Hugging Face model: its own under "", those of
            the parts of its config by their name.
        experts: Expert implementations, likewise.
    """

    name: str
    training: bool
    other_mode: list[str]
    attention: dict[str, _Implementation | None]
    experts: dict[str, _Implementation | None]


class Manifest(Strict):
    """The content of `moeify.json`, without its own digest.

    Attributes:
        format: Always "moeify".
        version: Version of the format.
        versions: Of the packages that wrote it.
        model: What the model was.
        plan: The plan's data.
        plan_sha256: Its digest.
        layers: The converted layers, in execution order.
        inputs: Description of the example inputs; None where they cannot be made again.
        ledger: Where each dense parameter went.
        dtype: Of most parameter elements.
        parameters: Number of parameter elements, shared ones counted once.
        tensors: Every stored tensor by name.
        aliases: Further names of stored tensors, to the name they are stored under.
        shards: The files with the tensors.
        files: The other files.
        source: Where the weights came from: folder name, files with sizes and digests; empty for a
            model in memory.
    """

    format: Literal["moeify"]
    version: Literal[2]
    versions: dict[str, str]
    model: ModelRecord
    plan: dict[str, Any]
    plan_sha256: _Digest
    layers: list[LayerRecord]
    inputs: Any
    ledger: dict[str, Annotated[list[str], Field(min_length=2, max_length=2)]]
    dtype: _Dtype
    parameters: _Natural
    tensors: dict[str, TensorRecord]
    aliases: dict[str, str]
    shards: list[FileRecord]
    files: list[FileRecord]
    source: dict[str, Any] = Field(default_factory=dict)

    def of_shard(self, file: str) -> dict[str, TensorRecord]:
        """Return the tensors of one shard by name."""
        return {name: t for name, t in self.tensors.items() if t.shard == file}

    def names(self) -> dict[str, str]:
        """Return every name, aliases too, with the name that its tensor is stored under."""
        return {name: name for name in self.tensors} | self.aliases


def encode(manifest: Manifest) -> bytes:
    """Return the file's content."""
    data = manifest.model_dump(mode="json", by_alias=True)
    data["sha256"] = canonical_digest(data)
    return json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"


def read_manifest(folder: Folder) -> Manifest:
    """Read and check `moeify.json`.

    Raises:
        CheckpointError: It is missing, damaged, of another version, or contradicts itself; the
            message names the file and the key.
    """
    where = folder.where(MANIFEST)
    data = parse_json(folder.read(MANIFEST, limit=MAX_BYTES), where)
    if not isinstance(data, dict) or data.get("format") != "moeify":
        raise CheckpointError(f"{where}: format: is no saved moeify model")
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{where}: version: {version!r:.40} cannot be read, only {VERSION}; "
            "use the moeify that wrote it"
        )
    digest = data.pop("sha256", None)
    try:
        manifest = Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}: {path_text(first['loc'])}: {first['msg']}") from None
    if digest != canonical_digest(data):
        raise CheckpointError(f"{where}: sha256: is not the digest of the rest: it was changed")
    _check(manifest, where)
    return manifest


def _check(manifest: Manifest, where: str) -> None:
    """Hold the parts of a manifest against each other."""
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
                f"{where}: tensors.{name}.shard: {tensor.shard!r:.80} is no shard"
            )
    for alias, name in manifest.aliases.items():
        if name not in manifest.tensors or alias in manifest.tensors:
            raise CheckpointError(f"{where}: aliases.{alias}: {name!r:.80} does not fit `tensors`")
    total = sum(math.prod(t.shape) for t in manifest.tensors.values() if t.role == "parameter")
    if total != manifest.parameters:
        raise CheckpointError(
            f"{where}: parameters: {manifest.parameters}, but the tensors have {total}"
        )
