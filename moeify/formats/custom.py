"""A Hugging Face folder for any architecture, with code that needs moeify when it is loaded.

The generated code is two classes that put `moeify.formats.remote_code` before the dense ones; all
else is data in `config.json`. `trust_remote_code=True` loads it with the Auto classes that know
the dense class. Without it nothing loads: the folder's `model_type` is unknown to transformers,
and a dense class called by name is pointed to a file that does not exist.

Source: https://huggingface.co/docs/transformers/custom_models
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from moeify.convert.replay import layer_records
from moeify.formats.dense_details import config_files, dense_details, main_dtype
from moeify.formats.manifest import format_manifest
from moeify.formats.recipe import recipe_of
from moeify.hf.dense_class import KEY, dense_classes, with_decoys
from moeify.sites.record import require_conversion
from moeify.storage.tensor_source import ModelFiles, TensorSource, copied

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
    """Return the files of a folder that transformers loads with moeify's help."""
    conversion = require_conversion(model)
    layers = layer_records(model, conversion)
    cls, config_class = dense_classes(model)
    details = dense_details(model, conversion)
    name, config_name = _made_name(cls), _made_name(config_class)
    saved_as = f"moeify_{config_class.model_type}"  # type: ignore[attr-defined]
    config = with_decoys(
        details["config"]
        | {
            "model_type": saved_as,
            "architectures": [name],
            "auto_map": _auto_map(cls, config_name, name),
            "dtype": main_dtype(tensor_source.specs.values()),
            KEY: recipe_of(conversion, layers),
        }
    )
    code = _code_of(cls, config_class, saved_as)
    return ModelFiles(
        kind="custom",
        tensors=tuple(
            copied(tensor_source, at, name) for name, at in _names(model, tensor_source).items()
        ),
        texts=config_files(config, details["generation"]) | code,
        manifest=format_manifest(
            "custom",
            architecture=name,
            plan=conversion.plan,
            layers=layers,
            source=source,
            details=details,
        ),
        notes=(f"loading {name} needs moeify and trust_remote_code=True",),
    )


def _made_name(dense: type) -> str:
    return f"Moeify{dense.__name__}"


def _code_of(cls: type, config_class: type, saved_as: str) -> dict[str, bytes]:
    """Return the Python files of the folder, by name."""
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


def _auto_map(cls: type, config_name: str, name: str) -> dict[str, str]:
    """Name the Auto classes that load a generated class: those that know its dense one."""
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


def _names(model: nn.Module, tensor_source: TensorSource) -> dict[str, str]:
    """Return every name to write with the name that it is stored under.

    A name that transformers ties when it loads is left out, as transformers does; other aliases of
    a tensor are written in full.
    """
    groups: dict[str, list[str]] = {name: [name] for name in tensor_source.specs}
    for alias, name in tensor_source.aliases.items():
        groups[name].append(alias)
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {
        alias: name
        for name, group in groups.items()
        for alias in group
        if tied.get(alias) not in group
    }
