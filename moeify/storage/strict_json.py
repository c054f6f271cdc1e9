"""JSON that is read strictly (no duplicate keys, no NaN, no bombs), and manifests made of it.

A manifest holds the digest of the rest of it under `sha256`.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from moeify.errors import CheckpointError
from moeify.plan.strict_yaml import path_text

M = TypeVar("M", bound=BaseModel)


def parse_json(data: bytes, where: str) -> Any:
    """Parse UTF-8 JSON; `where` names the file in messages."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise CheckpointError(f"{where}: {key}: appears twice")
            found[key] = value
        return found

    def constant(text: str) -> NoReturn:
        raise CheckpointError(f"{where}: {text} is not JSON")

    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is not JSON: {error}") from error


def canonical_digest(data: Any) -> str:
    """Return the SHA-256, in hex, of data's canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def validated(model: type[M], data: Any, where: str, hint: str = "") -> M:
    """Check data against a schema; raise with the first key that does not fit."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}: {path_text(first['loc'])}: {first['msg']}{hint}") from None


def encode_manifest(manifest: BaseModel, *, indent: int | None = 1) -> bytes:
    """Return a manifest's file content, its digest included."""
    data = manifest.model_dump(mode="json", by_alias=True)
    data["sha256"] = canonical_digest(data)
    return json.dumps(data, indent=indent, allow_nan=False).encode() + b"\n"


def decode_manifest(model: type[M], data: dict[str, Any], version: int, where: str) -> M:
    """Check a manifest's version, schema and digest."""
    found = data.get("version")
    if type(found) is not int or found != version:
        raise CheckpointError(
            f"{where}: version: {found!r:.40} cannot be read, only {version}; "
            "use the moeify that wrote it"
        )
    digest = data.pop("sha256", None)
    manifest = validated(model, data, where)
    if digest != canonical_digest(data):
        raise CheckpointError(f"{where}: sha256: is not the digest of the rest: it was changed")
    return manifest
