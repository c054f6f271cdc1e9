"""Find the dense class of transformers, and its config, behind a converted model."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from moeify.errors import CheckpointError
from moeify.hf.detect import is_hf

KEY: Final = "moeify"
"""Key of the recipe in a converted model's config."""

# A file that does not exist, named as the weights, so that dense classes fail instead of drawing
# random ones.
_DECOY: Final = "load-with-an-Auto-class-and-trust_remote_code.safetensors"
_DECOY_KEY: Final = "transformers_weights"
_MODULE: Final = re.compile(r"transformers\.models(?:\.[A-Za-z_][A-Za-z0-9_]*)+")
_CLASS: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def dense_class(model: nn.Module) -> type:
    """Return a model's class without the subclasses that a custom export or sharding adds."""
    cls = next(c for c in type(model).__mro__ if not c.__module__.startswith("torch."))
    found = cls.__dict__.get("dense_class")
    return found if isinstance(found, type) else cls


def own_class(cls: type, what: str) -> type:
    """Return a class that is transformers' own, so that generated code may name it.

    Raises:
        CheckpointError: It is not; the message calls it `what`.
    """
    module, name = str(cls.__module__), str(cls.__qualname__)
    if _lookup(module, name) is cls:
        return cls
    raise CheckpointError(
        f"{what} {module!r:.80}.{name!r:.80} is not part of transformers, and a Hugging Face "
        "folder can name only those: use moeify.save(model, directory) and moeify.load"
    )


def class_named(path: str, what: str) -> type:
    """Return transformers' own class at a dotted path, which may come from a stranger.

    Raises:
        CheckpointError: It is not one; the message calls it `what`.
    """
    module, _, name = path.rpartition(".")
    found = _lookup(module, name)
    if not isinstance(found, type) or found.__module__ != module:
        raise CheckpointError(f"{what}: {path!r:.160} is not a class of transformers")
    return found


def _lookup(module: str, name: str) -> object:
    """Return what transformers has at a place where its models are; None for all others."""
    if not _MODULE.fullmatch(module) or not _CLASS.fullmatch(name):
        return None
    try:
        found: object = getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None
    return found


def dense_classes(model: nn.Module) -> tuple[type, type]:
    """Return the model and config class of a Hugging Face model, if they are transformers' own."""
    cls = own_class(dense_class(model), "the model's class")
    if not is_hf(model):
        raise CheckpointError(f"{cls.__name__} has no config: use moeify.save(model, directory)")
    config: Any = model.config
    return cls, own_class(dense_config_class(type(config)), "the config's class")


def dense_config_class(cls: type) -> type:
    """Return the config class of transformers behind one that a custom export generated."""
    return next(base for base in cls.__mro__ if not hasattr(base, "saved_as"))


def become_dense(model: nn.Module) -> None:
    """Restore the dense class and config of a model that was converted back."""
    dense = getattr(type(model), "dense_class", None)
    if not isinstance(dense, type):
        return
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    for config in configs.values():
        if hasattr(config, KEY):
            config.__class__ = dense_config_class(type(config))
            for key in (KEY, "auto_map", "architectures"):
                config.__dict__.pop(key, None)
    model.__class__ = dense


def dense_config(model: nn.Module) -> dict[str, Any]:
    """Return the data of `config.json` of a model's dense class."""
    cls, config_class = dense_classes(model)
    data = _dense_data(model.config, use_diff=True)
    return data | {"model_type": config_class.model_type, "architectures": [cls.__name__]}  # type: ignore[attr-defined]


def config_json(config: Any) -> str:
    """Return a config, defaults included, as its dense class would write it."""
    if not hasattr(config, "saved_as"):
        return str(config.to_json_string(use_diff=False))
    data = _dense_data(config, use_diff=False)
    return json.dumps(data | {"model_type": config.model_type}, indent=2, sort_keys=True) + "\n"


def _dense_data(config: Any, *, use_diff: bool) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(config.to_json_string(use_diff=use_diff))
    if hasattr(config, "saved_as"):
        data = without_decoys(data)
        for key in (KEY, "auto_map", "architectures"):
            data.pop(key, None)
    return data


def with_decoys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config's data that points dense classes, also of its parts, to a missing file."""
    parts = {
        key: {**part, _DECOY_KEY: _DECOY}
        for key, part in config.items()
        if isinstance(part, dict) and "model_type" in part
    }
    return {**config, **parts, _DECOY_KEY: _DECOY}


def without_decoys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `with_decoys`."""
    return {
        key: {k: v for k, v in part.items() if k != _DECOY_KEY} if isinstance(part, dict) else part
        for key, part in config.items()
        if key != _DECOY_KEY
    }


def generation_config(model: nn.Module) -> dict[str, Any] | None:
    """Return the data of `generation_config.json`, or None if the model does not generate."""
    found: Any = getattr(model, "generation_config", None)
    if found is None or not model.can_generate():  # type: ignore[operator]
        return None
    data: dict[str, Any] = json.loads(found.to_json_string(use_diff=True))
    return data
