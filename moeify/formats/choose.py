"""Choose which format a converted model is written in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from moeify.checkpoint.single import moeify_files
from moeify.errors import CheckpointError
from moeify.formats.custom import custom_files
from moeify.formats.native.export import NotNative, native_files
from moeify.storage.tensor_source import ModelFiles, TensorSource

FormatChoice = Literal["auto", "native", "custom", "moeify"]
CHOICES: tuple[FormatChoice, ...] = ("auto", "native", "custom", "moeify")


def choose_format(
    model: nn.Module,
    tensor_source: TensorSource,
    kind: FormatChoice = "auto",
    *,
    source: Mapping[str, Any] | None = None,
) -> ModelFiles:
    """Choose the format of a converted model's folder and return its files.

    Args:
        model: A converted model; may be on meta.
        tensor_source: Its tensors.
        kind: "native": a class of transformers that computes the same, so that nothing else is
            needed. "custom": code that needs moeify, for any class of transformers. "moeify": what
            `moeify.load` reads, for any model. "auto": the first of them that fits.
        source: Where the weights came from; see `FormatManifest`.

    Returns:
        The files; their notes say why what comes earlier in "auto" does not fit.

    Raises:
        NotNative: "native" does not fit; says why for each class.
        CheckpointError: Another kind does not fit.
        MoeifyError: The model has not been converted.
        ValueError: The kind is unknown.
    """
    given = dict(source or {})
    if kind not in CHOICES:
        raise ValueError(f"export: {kind!r} is unknown; use one of {', '.join(CHOICES)}")
    if kind == "moeify":
        return moeify_files(model, tensor_source, source=given)
    if kind == "custom":
        return custom_files(model, tensor_source, source=given)
    notes: list[str] = []
    try:
        return native_files(model, tensor_source, source=given)
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
        model_files = custom_files(model, tensor_source, source=given)
    except CheckpointError as error:
        notes.append(f"not custom: {error}")
        model_files = moeify_files(model, tensor_source, source=given)
    return dataclasses.replace(model_files, notes=(*model_files.notes, *notes))
