"""Build the dense model that a saved one was converted from, without its weights.

Only classes of transformers are built by name, from their config alone: nothing is downloaded,
unpickled or imported from elsewhere. Parameters go to `meta` as soon as a module registers them;
buffers are computed, because some (rotary frequencies) are in no file.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import nn

from moeify.capture.on_meta import parameters_on_meta, quiet_random_state
from moeify.convert.replay import Recorded, layer_records, replay, versions
from moeify.errors import CheckpointError
from moeify.hf.dense_class import config_json, dense_class
from moeify.hf.detect import is_hf
from moeify.passes.infra.base import Pass
from moeify.sites.record import Conversion, require_conversion
from moeify.storage.manifest import Manifest, ModelRecord
from moeify.storage.model_state import describe_modes, to_meta
from moeify.storage.safetensors_file import DTYPES

_OWN: Final = re.compile(r"transformers\.models\.[A-Za-z0-9_.]+\.[A-Za-z0-9_]+")
_KINDS: Final = ("attention", "experts")


def describe_model(model: nn.Module) -> ModelRecord:
    """Describe a model beside its tensors and its config."""
    cls = dense_class(model)
    training, other_mode = describe_modes(model)
    found: dict[str, dict[str, str | None]] = {kind: {} for kind in _KINDS}
    if is_hf(model):
        config: Any = model.config
        parts = {"": config} | {k: getattr(config, k, None) for k in _parts(config)}
        for kind in _KINDS:
            for key, part in parts.items():
                value = getattr(part, _attribute(kind), None)
                if value is None or isinstance(value, str):
                    found[kind][key] = value
    return ModelRecord(
        name=f"{cls.__module__}.{cls.__qualname__}",
        training=training,
        other_mode=other_mode,
        attention=found["attention"],
        experts=found["experts"],
    )


def describe_conversion(model: nn.Module) -> dict[str, Any]:
    """Return what both manifests keep of a conversion."""
    conversion = require_conversion(model)
    return {
        "versions": versions(),
        "plan": conversion.plan.data(),
        "plan_sha256": conversion.plan.digest(),
        "layers": layer_records(model, conversion),
        "ledger": {name: list(fate) for name, fate in conversion.ledger.items()},
    }


def config_texts(model: nn.Module) -> dict[str, str]:
    """Return the texts of a Hugging Face model's config files by file name."""
    texts = {}
    for file, attribute in (
        ("source_config.json", "config"),
        ("generation_config.json", "generation_config"),
    ):
        config: Any = getattr(model, attribute, None)
        if is_hf(model) and hasattr(config, "to_json_string"):
            texts[file] = config_json(config)
    return texts


def build(
    record: ModelRecord, config: Mapping[str, Any], generation: Mapping[str, Any] | None, where: str
) -> nn.Module:
    """Build a dense Hugging Face model, its parameters on meta, from its config files' content."""
    if _OWN.fullmatch(record.name) is None:
        raise CheckpointError(
            f"{where}: a {record.name} is not of the transformers package, which alone is imported "
            "by name: pass model=, an instance of that class (its weights do not matter)"
        )
    try:
        cls = _class(record.name)
        settings = cls.config_class.from_dict(_harmless(dict(config)))
        for kind in _KINDS:
            values = getattr(record, kind)
            if values:
                setattr(settings, _attribute(kind), dict(values))
        with quiet_random_state(), parameters_on_meta():
            model = cls(settings)
        if generation is not None and getattr(model, "generation_config", None) is not None:
            model.generation_config = type(model.generation_config).from_dict(dict(generation))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{where}: a {record.name} cannot be built from source_config.json "
            f"({type(error).__name__}: {error}): use the transformers that saved it, or pass "
            "model=, an instance of that class"
        ) from error
    assert isinstance(model, nn.Module)
    return model


def convert_again(
    model: nn.Module,
    manifest: Manifest,
    where: str,
    *,
    passes: Sequence[Pass] = (),
    prove: bool = True,
) -> Conversion:
    """Convert a dense model, whose weights do not matter, on meta as a saved one was converted.

    Unless `prove`, another result is accepted: the saved model was made for other ranks.
    """
    to_meta(model, _dense_dtypes(manifest))
    then = Recorded(
        where=where,
        fields=f"{where}/moeify.json: ",
        plan=manifest.plan,
        plan_sha256=manifest.plan_sha256,
        inputs=manifest.inputs,
        layers=manifest.layers if prove else None,
        ledger=manifest.ledger if prove else None,
        versions=manifest.versions,
    )
    return replay(model, then, passes=passes)


def _dense_dtypes(manifest: Manifest) -> dict[str, torch.dtype]:
    """Return the dtypes that the dense model had when it was converted, by name.

    What was copied into experts is known from the plan of its layer. The model may have been cast
    after the conversion; if so, the rest was cast as the experts were.
    """
    names = manifest.names()
    before = {layer.block: layer.plan.dtype for layer in manifest.layers}
    cast = {}
    for name, tensor in manifest.tensors.items():
        block = name.partition(".experts.")[0]
        if block in before and tensor.role == "parameter":
            cast[tensor.dtype] = before[block]
    found = {}
    for name, stored in names.items():
        dtype = manifest.tensors[stored].dtype
        found[name] = cast.get(dtype, dtype)
    for name, (fate, place) in manifest.ledger.items():
        if fate == "copied" and place in before:
            found[name] = before[place]
        elif fate == "moved" and place in found:
            found[name] = found[place]
    return {name: DTYPES[dtype] for name, dtype in found.items() if dtype in DTYPES}


def _class(name: str) -> Any:
    import transformers

    module, _, leaf = name.rpartition(".")
    cls = getattr(importlib.import_module(module), leaf)
    if not isinstance(cls, type) or not issubclass(cls, transformers.PreTrainedModel):
        raise TypeError(f"{leaf} is not a model")
    return cls


def _attribute(kind: str) -> str:
    return "_attn_implementation" if kind == "attention" else "_experts_implementation"


def _parts(config: Any) -> list[str]:
    return [str(key) for key in getattr(config, "sub_configs", {})]


def _harmless(value: Any) -> Any:
    """Remove from a config what would make transformers download something."""
    if isinstance(value, dict):
        kept = {}
        for key, part in value.items():
            if "_implementation" in key:
                continue
            kept[key] = False if key == "use_pretrained_backbone" else _harmless(part)
        return kept
    return [_harmless(part) for part in value] if isinstance(value, list) else value
