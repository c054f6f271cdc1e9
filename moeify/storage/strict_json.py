"""JSON that is read strictly: no duplicate keys, no NaN, no bombs."""

from __future__ import annotations

import hashlib
import json
from typing import Any, NoReturn

from moeify.errors import CheckpointError


def parse_json(data: bytes, where: str) -> Any:
    """Parse JSON.

    Args:
        data: UTF-8.
        where: Name of the file, for messages.

    Raises:
        CheckpointError: It is no JSON, has a key twice, a number that is none, or is too deep.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in items:
            if key in found:
                raise CheckpointError(f"{where}: {key}: stands there twice")
            found[key] = value
        return found

    def constant(text: str) -> NoReturn:
        raise CheckpointError(f"{where}: {text} is no JSON")

    try:
        text = data.decode("utf-8")
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: is no JSON: {error}") from error


def canonical_digest(data: Any) -> str:
    """Return the SHA-256, in hex, of data's canonical JSON."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
