"""Choose which format a converted model is written in."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from torch import nn

from moeify.checkpoint.single import moeify_files
from moeify.errors import CheckpointError
from moeify.formats.custom import custom_files
from moeify.formats.native.export import NotNative, native_files
from moeify.storage.tensor_source import ModelFiles, TensorSource

FormatChoice = Literal["auto", "native", "custom", "moeify"]
_CHOICES: Final = get_args(FormatChoice)


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
            `moeify.load` reads, for any model. "auto": the first of these that fits; notes say why
            the earlier ones do not.
        source: Where the weights came from; see `FormatManifest`.
    """
    if kind not in _CHOICES:
        raise ValueError(f"export: {kind!r} is unknown; use one of {', '.join(_CHOICES)}")
    if kind == "moeify":
        return moeify_files(model, tensor_source, source=source)
    if kind == "custom":
        return custom_files(model, tensor_source, source=source)
    try:
        return native_files(model, tensor_source, source=source)
    except NotNative as error:
        if kind == "native":
            raise
        notes = _why_not(error)
    try:
        model_files = custom_files(model, tensor_source, source=source)
    except CheckpointError as error:
        notes.append(f"not custom: {error}")
        model_files = moeify_files(model, tensor_source, source=source)
    return dataclasses.replace(model_files, notes=(*model_files.notes, *notes))


def _why_not(error: NotNative) -> list[str]:
    classes: dict[str, list[str]] = {}
    for name, reason in error.reasons.items():
        classes.setdefault(reason, []).append(name)
    if len(classes) == 1:
        return [f"not native: {reason}" for reason in classes]
    return [f"not {', '.join(names)}: {reason}" for reason, names in classes.items()]
