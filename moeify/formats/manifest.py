"""`moeify.json` in folders that others read: plan, source, and the digest of every file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from pydantic import ValidationError

from moeify.convert.replay import versions
from moeify.errors import CheckpointError
from moeify.plan.plan import Plan
from moeify.plan.selection import Strict
from moeify.plan.strict_yaml import path_text
from moeify.storage.atomic_folder import MANIFEST, Folder
from moeify.storage.manifest import MAX_BYTES, FileRecord, LayerRecord
from moeify.storage.strict_json import canonical_digest, parse_json
from moeify.storage.tensor_source import Kind, Written

VERSION: Final = 3


class FormatManifest(Strict):
    """The content of `moeify.json`, without its own digest."""

    format: Literal["moeify-export"]
    version: Literal[3]
    kind: Literal["custom", "native", "dense"]  # who reads the folder
    versions: dict[str, str]  # of the packages that wrote it
    architecture: str  # the class that reads it, such as "MixtralForCausalLM"
    plan: dict[str, Any]
    plan_sha256: str
    layers: list[LayerRecord]  # in execution order
    source: dict[str, Any]  # where the weights came from; empty for a model in memory
    details: dict[str, Any]  # what else the reader of this kind needs
    shards: list[FileRecord]  # files with tensors
    files: list[FileRecord]  # all others


def format_manifest(
    kind: Kind,
    *,
    architecture: str,
    plan: Plan,
    layers: list[LayerRecord],
    source: Mapping[str, Any] | None,
    details: dict[str, Any] | None = None,
) -> Callable[[Written], bytes]:
    """Return a function that makes the manifest once the other files are written."""

    def make(written: Written) -> bytes:
        manifest = FormatManifest.model_validate(
            {
                "format": "moeify-export",
                "version": VERSION,
                "kind": kind,
                "versions": versions(),
                "architecture": architecture,
                "plan": plan.data(),
                "plan_sha256": plan.digest(),
                "layers": layers,
                "source": dict(source or {}),
                "details": details or {},
                "shards": written.shards,
                "files": written.files,
            }
        )
        data = manifest.model_dump(mode="json", by_alias=True)
        data["sha256"] = canonical_digest(data)
        return json.dumps(data, indent=1, allow_nan=False).encode() + b"\n"

    return make


def read_format_manifest(folder: Folder) -> FormatManifest | None:
    """Read `moeify.json` of an exported folder; None if it is missing or of another format."""
    where = folder.where(MANIFEST)
    try:
        text = folder.read(MANIFEST, limit=MAX_BYTES)
    except CheckpointError as error:
        if str(error).endswith("is missing"):
            return None
        raise
    data = parse_json(text, where)
    if not isinstance(data, dict) or data.get("format") != "moeify-export":
        return None
    version = data.get("version")
    if type(version) is not int or version != VERSION:
        raise CheckpointError(
            f"{where}: version: {version!r:.40} cannot be read, only {VERSION}; "
            "use the version of moeify that wrote it"
        )
    digest = data.pop("sha256", None)
    try:
        manifest = FormatManifest.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}: {path_text(first['loc'])}: {first['msg']}") from None
    if digest != canonical_digest(data):
        raise CheckpointError(f"{where}: sha256: is not the digest of the rest: it was changed")
    return manifest
