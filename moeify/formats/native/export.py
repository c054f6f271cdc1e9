"""Native export: a folder that transformers, vLLM and SGLang read without moeify.

A converted model whose plan is within what a class of transformers can do is written as that class:
its config, its names, one tensor per expert and projection. Every difference is a reason to refuse,
never a silent change; padding is counted and reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from moeify.convert.replay import layer_records
from moeify.errors import MoeifyError
from moeify.formats.dense_details import config_files, dense_details
from moeify.formats.manifest import format_manifest
from moeify.formats.native.architectures import TARGETS, Target, config_of, misfits
from moeify.formats.native.model_facts import Facts, facts_of
from moeify.formats.native.tensors import NativeTensorList, names_of
from moeify.formats.native.training import training_warning
from moeify.plan import strict_yaml
from moeify.sites.record import Conversion, require_conversion, require_one_process
from moeify.storage.tensor_source import ModelFiles, TensorSource
from moeify.units import dtype_name


class NotNative(MoeifyError):
    """No class of transformers computes what the model does; `reasons` says why, by class."""

    def __init__(self, reasons: Mapping[str, str]) -> None:
        self.reasons = dict(reasons)
        texts = list(dict.fromkeys(self.reasons.values()))
        why = texts[0]
        if len(texts) > 1:
            why = "".join(f"\n  {name}: {text}" for name, text in self.reasons.items())
        super().__init__(f"no class of transformers computes what this model does: {why}")


def native_files(
    model: nn.Module,
    tensor_source: TensorSource,
    *,
    source: Mapping[str, Any] | None = None,
    architecture: str | None = None,
) -> ModelFiles:
    """Describe the folder of a converted model as a class of transformers.

    Args:
        model: The converted model; it may be on meta.
        tensor_source: Its tensors.
        source: Where its weights came from, for the manifest.
        architecture: The class to write, such as "MixtralForCausalLM"; the first that fits if None.

    Returns:
        What is to be written; notes list the padding, and why earlier classes do not fit, and
        warnings say how the class trains otherwise.

    Raises:
        NotNative: No class fits, or not the given one.
    """
    record = require_conversion(model)
    require_one_process(model, "native export")
    chosen = [t for t in TARGETS if architecture in (None, t.architecture)]
    if not chosen:
        known = ", ".join(target.architecture for target in TARGETS)
        raise ValueError(f"architecture: {architecture!r} is unknown; use one of {known}")
    facts = facts_of(model, record, tensor_source)
    if isinstance(facts, str):
        raise NotNative({target.architecture: facts for target in chosen})
    reasons: dict[str, str] = {}
    for target in chosen:
        why = "; ".join(misfits(target, facts)) or _differs(target, facts)
        if not why:
            return _files_of(target, facts, record, model, tensor_source, source, reasons)
        reasons[target.architecture] = why
    raise NotNative(reasons)


def _differs(target: Target, facts: Facts) -> str:
    """Return what of the config the class does not keep; empty if it keeps everything."""
    rope = dict(facts.config.rope_parameters)
    try:
        config = config_of(target, facts)
    except Exception as error:  # a config's own checks may raise anything
        return f"its config refuses: {error}"
    rope |= target.rope
    if dict(config.rope_parameters) != rope:
        return f"its rope_parameters become {dict(config.rope_parameters)} from {rope}"
    return ""


def _files_of(
    target: Target,
    facts: Facts,
    record: Conversion,
    model: nn.Module,
    tensor_source: TensorSource,
    source: Mapping[str, Any] | None,
    reasons: Mapping[str, str],
) -> ModelFiles:
    config = config_of(target, facts)
    tensors = NativeTensorList(target, facts, tensor_source)
    _check(target, config, tensors)
    details = dense_details(model, record)
    texts = config_files(json.loads(config.to_json_string()), details["generation"])
    plan = strict_yaml.dump(record.plan.data(), "plan.yaml")
    names = {"names": list(tensor_source.specs), "aliases": dict(tensor_source.aliases)}
    return ModelFiles(
        kind="native",
        tensors=tuple(tensors.outputs),
        texts=texts | {"plan.yaml": plan.encode()},
        manifest=format_manifest(
            "native",
            architecture=target.architecture,
            plan=record.plan,
            layers=layer_records(model, record),
            source=source,
            details=details | names,
        ),
        notes=tuple(_notes(target, facts, tensors, reasons)),
        warnings=training_warning(target, facts),
    )


def _check(target: Target, config: Any, tensors: NativeTensorList) -> None:
    """Compare names and shapes with those of the class in the installed transformers."""
    import transformers

    with torch.device("meta"):
        instance = getattr(transformers, target.architecture)(config)
    expected = names_of(target, instance)
    written = {output.name: output.spec.shape for output in tensors.outputs}
    for name in sorted(expected.keys() | written.keys()):
        if expected.get(name) != written.get(name):
            raise NotNative(
                {
                    target.architecture: f"{name} is {expected.get(name)} in the class of "
                    f"transformers {transformers.__version__}, but {written.get(name)} here"
                }
            )


def _notes(
    target: Target,
    facts: Facts,
    tensors: NativeTensorList,
    reasons: Mapping[str, str],
) -> list[str]:
    total, size = tensors.elements, facts.dtype.itemsize
    notes = [
        f"padding: {what}: {count:,} parameters, {count * size / 1e6:,.1f} MB, "
        f"{count / total:.1%} of all"
        for what, count in tensors.padding.items()
    ]
    scores = {layer.plan.router.score for layer in facts.layers}
    if target.score == "sigmoid" and "softmax" in scores:
        notes.append(
            "routing: the class chooses by sigmoids, which agrees with the plan except where the "
            "best two logits x differ by less than 6e-8 * exp(x), such as 0.001 at 10, in float32"
        )
    if target.score == "softmax" and facts.dtype.itemsize < 4:
        notes.append(
            f"routing: the class computes logits in {dtype_name(facts.dtype)}, moeify in float32: "
            "near ties may go to another expert"
        )
    if target.window and facts.free_head_dim:
        notes.append("SGLang's Mixtral takes hidden_size / heads as head_dim: it cannot load this")
    chosen = f"written as {target.architecture}, which transformers loads without moeify"
    return [chosen, *notes, *(f"not {name}: {why}" for name, why in reasons.items())]
