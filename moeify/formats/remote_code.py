"""What the generated code of a custom export calls: a dense class that converts itself when built.

The folder's `configuration_moeify.py` and `modeling_moeify.py` put these two before a config and a
model class of transformers. The plan is data in `config.json`. In memory the config has the dense
model's `model_type`, by which transformers, PEFT and tokenizers know what a model can do; what is
saved names another, so that nobody takes the folder for the dense model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from moeify.capture.on_meta import parameters_on_meta
from moeify.convert.replay import replay
from moeify.errors import CheckpointError, MoeifyError
from moeify.formats.recipe import read_recipe, recorded
from moeify.formats.save_hook import guard
from moeify.hf.dense_class import KEY, dense_config_class, with_decoys, without_decoys
from moeify.plan.selection import shorten
from moeify.sites.record import require_conversion, require_one_process


class ConvertedConfig:
    """The base that a generated config class puts before one of transformers."""

    saved_as: ClassVar[str] = ""  # the `model_type` on disk, which transformers does not know
    model_type: ClassVar[str]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the file, with the `model_type` that it has in memory."""
        found, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return cls._in_memory(found), rest

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Make the config, without the decoys that keep dense classes from loading it."""
        return super().from_dict(cls._in_memory(config_dict), **kwargs)  # type: ignore[misc]

    @classmethod
    def _in_memory(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        made = without_decoys(data)
        if made.get("model_type") == cls.saved_as:
            made["model_type"] = cls.model_type
        return made

    def to_json_string(self, use_diff: bool = True) -> str:
        """Return what is written to disk; `to_dict` is what the model is in memory."""
        data = json.loads(super().to_json_string(use_diff))  # type: ignore[misc]
        data = with_decoys(data | {"model_type": self.saved_as})
        return json.dumps(data, indent=2, sort_keys=True) + "\n"


class ConvertedModel:
    """The base that a generated model class puts before one of transformers."""

    dense_class: ClassVar[type]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self.build_dense(config, *args, **kwargs)
        assert isinstance(self, nn.Module)
        convert_for_loading(self)
        guard(self)

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        """Load as the dense class does, and refuse a folder whose blocks are not whole.

        Of tensors outside the blocks the dense class draws those that the files lack, with its own
        warning, as it does for a dense folder.

        Raises:
            CheckpointError: The files lack a tensor of a block, have it in another shape, or hold
                one that the block does not have.
        """
        mismatched = bool(kwargs.pop("ignore_mismatched_sizes", False))
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        _refuse_damaged(model, info, mismatched=mismatched)
        return (model, info) if output_loading_info else model

    def build_dense(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the dense model, whose code may check the class of its config."""
        generated = type(config)
        config.__class__ = self.__dict__["config_class"] = dense_config_class(generated)
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.__class__ = generated
            del self.__dict__["config_class"]

    def _get_name(self) -> str:
        """Return the dense class's name, by which trainers decide whether labels are shifted."""
        return self.dense_class.__name__


def convert_for_loading(model: nn.Module) -> None:
    """Convert a newly built dense model by the recipe in its config; weights are loaded later."""
    config: Any = model.config
    where = f"{getattr(config, 'name_or_path', '') or 'config.json'}: {KEY}"
    recipe = read_recipe(getattr(config, KEY, None), where)
    with torch.device("cpu"):
        replay(model, recorded(recipe, where), rebuild=lambda: _build_again(model))
    try:
        require_one_process(model, "from_pretrained")
    except MoeifyError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _refuse_damaged(model: nn.Module, info: Mapping[str, Any], *, mismatched: bool) -> None:
    """Refuse what transformers draws at random or leaves out; `mismatched` allows other shapes.

    No block may have such a tensor: nothing in the dense class knows how experts start.
    """
    conversion = require_conversion(model)
    blocks = tuple(f"{layer.block}." if layer.block else "" for layer in conversion.layers)
    replaced = {name for name, (fate, _) in conversion.ledger.items() if fate == "copied"}
    where = getattr(model, "name_or_path", "") or "the given state dict"
    other = {
        name: f"has the shape {list(found)} and not {list(wanted)}"
        for name, found, wanted in info["mismatched_keys"]
    }
    wrong = {name: why for name, why in other.items() if name.startswith(blocks)}
    cure = "copy the folder again, or save the model again with its save_pretrained"
    wrong |= {n: "is in none of the files" for n in info["missing_keys"] if n.startswith(blocks)}
    for name in info["unexpected_keys"]:
        if name in replaced or name.startswith(blocks):
            wrong[name] = "is not of this model's experts: another model was saved over it"
    if not wrong and other and not mismatched:
        wrong, cure = other, "ignore_mismatched_sizes=True draws such tensors at random"
    if wrong:
        names = sorted(wrong)
        more = f" ({len(names)} such tensors: {shorten(names, 4)})" if len(names) > 1 else ""
        raise CheckpointError(f"{where}: {names[0]} {wrong[names[0]]}{more}; {cure}")


def _build_again(model: nn.Module) -> None:
    """Build the dense model once more, with real buffers; parameters are loaded later."""
    assert isinstance(model, ConvertedModel)
    with parameters_on_meta():
        model.build_dense(model.config)
    for module in model.modules():  # what is marked as initialised is not loaded
        for part in (module, *module._parameters.values(), *module._buffers.values()):
            getattr(part, "__dict__", {}).pop("_is_hf_initialized", None)
