"""Which kind of folder a converted model becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from moeify.checkpoint import moeify_content
from moeify.content import Content, Stored
from moeify.custom import custom_content
from moeify.errors import CheckpointError
from moeify.native import NotNative, native_content

Export = Literal["auto", "native", "custom", "moeify"]
KINDS: tuple[Export, ...] = ("auto", "native", "custom", "moeify")


def content_for(
    model: nn.Module,
    stored: Stored,
    kind: Export = "auto",
    *,
    source: Mapping[str, Any] | None = None,
) -> Content:
    """Return what is to be in a converted model's folder.

    Args:
        model: A converted model; may be on meta.
        stored: Its tensors.
        kind: "native": a class of transformers that computes the same, so that nothing else is
            needed. "custom": code that needs moeify, for any class of transformers. "moeify": what
            `moeify.load` reads, for any model. "auto": the first of them that fits.
        source: Where the weights came from; see `ExportManifest`.

    Returns:
        The content; its notes say why what comes earlier in "auto" does not fit.

    Raises:
        NotNative: "native" does not fit; says why for each class.
        CheckpointError: Another kind does not fit.
        MoeifyError: The model has not been converted.
        ValueError: The kind is unknown.
    """
    given = dict(source or {})
    if kind not in KINDS:
        raise ValueError(f"export: {kind!r} is unknown; use one of {', '.join(KINDS)}")
    if kind == "moeify":
        return moeify_content(model, stored, source=given)
    if kind == "custom":
        return custom_content(model, stored, source=given)
    notes: list[str] = []
    try:
        return native_content(model, stored, source=given)
    except NotNative as error:
        if kind == "native":
            raise
        reasons: dict[str, list[str]] = {}
        for name, reason in error.reasons.items():
            reasons.setdefault(reason, []).append(name)
        every = len(reasons) == 1
        for reason, names in reasons.items():
            notes.append(f"not {'native' if every else ', '.join(names)}: {reason}")
    try:
        content = custom_content(model, stored, source=given)
    except CheckpointError as error:
        notes.append(f"not custom: {error}")
        content = moeify_content(model, stored, source=given)
    return dataclasses.replace(content, notes=(*content.notes, *notes))
