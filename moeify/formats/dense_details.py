"""What a folder says of the dense model behind it, and its config files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from torch import nn

from moeify.capture.input_spec import describable
from moeify.errors import CheckpointError
from moeify.hf.dense_class import dense_class, dense_config, generation_config
from moeify.sites.record import Conversion
from moeify.storage.tensor_source import TensorSpec
from moeify.units import dtype_name


def dense_details(model: nn.Module, conversion: Conversion) -> dict[str, Any]:
    """Return what is needed to build the dense model of a conversion again."""
    cls = dense_class(model)
    return {
        "class": f"{cls.__module__}.{cls.__name__}",
        "config": dense_config(model),
        "inputs": conversion.inputs if describable(conversion.inputs) else None,
        "generation": generation_config(model),
    }


def config_files(
    config: Mapping[str, Any], generation: Mapping[str, Any] | None
) -> dict[str, bytes]:
    """Return the config files of a Hugging Face folder, by name."""
    files = {"config.json": config}
    if generation is not None:
        files["generation_config.json"] = generation
    return {name: _json(name, data) for name, data in files.items()}


def _json(name: str, data: Mapping[str, Any]) -> bytes:
    try:
        text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name}: cannot be written: {error}") from error
    return text.encode() + b"\n"


def main_dtype(specs: Iterable[TensorSpec]) -> str:
    """Return the dtype of most floating-point elements."""
    counts: dict[str, int] = {}
    for spec in specs:
        if spec.dtype.is_floating_point:
            name = dtype_name(spec.dtype)
            counts[name] = counts.get(name, 0) + prod(spec.shape)
    return max(counts, key=lambda name: counts[name], default="float32")
