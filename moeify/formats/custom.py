"""A Hugging Face folder for any architecture, with code that needs moeify when it is loaded.

The generated code is two classes that put `moeify.formats.remote_code` before the dense ones; all
else is data in `config.json`. `trust_remote_code=True` loads it with the Auto classes that know
the dense class. Without it nothing loads: the folder's `model_type` is unknown to transformers,
and a dense class called by name is led to a file that is not there.

Source: https://huggingface.co/docs/transformers/custom_models
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

from moeify.capture.input_spec import describable
from moeify.convert.replay import layer_records
from moeify.errors import CheckpointError
from moeify.formats.manifest import format_manifest
from moeify.formats.recipe import recipe_of
from moeify.hf.dense_class import (
    KEY,
    dense_class,
    dense_classes,
    dense_config,
    generation_config,
    with_decoys,
)
from moeify.sites.record import require_conversion
from moeify.storage.tensor_source import ModelFiles, TensorSource, copied
from moeify.units import dtype_name

_CONFIGURATION: Final = '''\
"""The config of a Mixture-of-Experts model made by moeify, which must be installed."""

from moeify.formats.remote_code import ConvertedConfig
from {module} import {dense}


class {name}(ConvertedConfig, {dense}):
    saved_as = {saved_as}
'''

_MODELING: Final = '''\
"""A Mixture-of-Experts model made by moeify, which must be installed; its plan is in the config."""

from moeify.formats.remote_code import ConvertedModel
from {module} import {dense}

from .configuration_moeify import {config}


class {name}(ConvertedModel, {dense}):
    config_class = {config}
    dense_class = {dense}
'''


def custom_files(
    model: nn.Module, tensor_source: TensorSource, *, source: Mapping[str, Any] | None = None
) -> ModelFiles:
    """Return what is to be in a folder that transformers loads with moeify's help.

    Args:
        model: A converted Hugging Face model; may be on meta.
        tensor_source: Its tensors.
        source: Where the weights came from; see `FormatManifest`.

    Raises:
        CheckpointError: The model's class is not transformers' own, or was converted with inputs
            that cannot be made again.
        MoeifyError: The model has not been converted.
    """
    conversion = require_conversion(model)
    layers = layer_records(model, conversion)
    cls, config_class = dense_classes(model)
    dense, generation = dense_config(model), generation_config(model)
    inputs = conversion.inputs if describable(conversion.inputs) else None
    name, config_name = _made_name(cls), _made_name(config_class)
    saved_as = f"moeify_{config_class.model_type}"  # type: ignore[attr-defined]
    config = with_decoys(
        dense
        | {
            "model_type": saved_as,
            "architectures": [name],
            "auto_map": auto_map(cls, config_name, name),
            "dtype": main_dtype(tensor_source),
            KEY: recipe_of(conversion, layers),
        }
    )
    texts = {"config.json": _json(config), **_code_of(cls, config_class, saved_as)}
    if generation is not None:
        texts["generation_config.json"] = _json(generation)
    return ModelFiles(
        kind="custom",
        tensors=tuple(
            copied(tensor_source, at, name) for name, at in _names(model, tensor_source).items()
        ),
        texts=texts,
        manifest=format_manifest(
            "custom",
            architecture=name,
            plan=conversion.plan,
            layers=layers,
            source=dict(source or {}),
            details={
                "class": f"{cls.__module__}.{cls.__name__}",
                "config": dense,
                "inputs": inputs,
                "generation": generation,
            },
        ),
        notes=(f"loading {name} needs moeify and trust_remote_code=True",),
    )


def _made_name(dense: type) -> str:
    """Return the name of the class that stands in for a dense one."""
    return f"Moeify{dense.__name__}"


def _code_of(cls: type, config_class: type, saved_as: str) -> dict[str, bytes]:
    """Return the code of the folder: the classes of the config and of the model."""
    config_name = _made_name(config_class)
    configuration = _CONFIGURATION.format(
        module=config_class.__module__,
        dense=config_class.__name__,
        name=config_name,
        saved_as=json.dumps(saved_as),
    )
    modeling = _MODELING.format(
        module=cls.__module__, dense=cls.__name__, name=_made_name(cls), config=config_name
    )
    return {
        "configuration_moeify.py": configuration.encode(),
        "modeling_moeify.py": modeling.encode(),
    }


def auto_map(cls: type, config_name: str, name: str) -> dict[str, str]:
    """Return which Auto classes load a generated class: those that know its dense one."""
    from transformers.models.auto import modeling_auto

    found = {"AutoConfig": f"configuration_moeify.{config_name}"}
    for auto, value in sorted(vars(modeling_auto).items()):
        names = getattr(getattr(value, "_model_mapping", None), "_model_mapping", {})
        if auto.startswith("Auto") and any(cls.__name__ in _each(v) for v in names.values()):
            found[auto] = f"modeling_moeify.{name}"
    if len(found) == 1:
        found["AutoModel"] = f"modeling_moeify.{name}"
    return found


def _each(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]


def main_dtype(tensor_source: TensorSource) -> str:
    """Return the dtype of most floating-point elements."""
    counts: dict[str, int] = {}
    for spec in tensor_source.specs.values():
        if spec.dtype.is_floating_point:
            name = dtype_name(spec.dtype)
            size = 1
            for length in spec.shape:
                size *= length
            counts[name] = counts.get(name, 0) + size
    return max(counts, key=lambda name: counts[name], default="float32")


def _names(model: nn.Module, tensor_source: TensorSource) -> dict[str, str]:
    """Return every name to write with the name that it is stored under.

    Names that transformers ties when it loads are left out, as it does; other further names of a
    tensor are written in full.
    """
    groups: dict[str, list[str]] = {name: [name] for name in tensor_source.specs}
    for alias, name in tensor_source.aliases.items():
        groups[name].append(alias)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: at for at, group in groups.items() for name in _written(group, tied)}


def _written(group: list[str], tied: Mapping[str, str]) -> Iterator[str]:
    for name in group:
        source = tied.get(name)
        if source is None or source not in group:
            yield name


def _json(data: Any) -> bytes:
    try:
        text = json.dumps(data, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"config.json: cannot be written: {error}") from error
    return text.encode() + b"\n"


__all__ = ["auto_map", "custom_files", "dense_class", "main_dtype"]
