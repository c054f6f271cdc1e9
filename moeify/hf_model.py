"""What the generated code of a custom export calls: a dense class that converts itself when built.

The folder's `configuration_moeify.py` and `modeling_moeify.py` put these two before a config and a
model class of transformers. The plan is data in `config.json`. In memory the config has the dense
model's `model_type`, by which transformers, PEFT and tokenizers know what a model can do; what is
saved names another, so that nobody takes the folder for the dense model.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

import torch
from pydantic import Field, ValidationError
from torch import nn

from moeify.api import moeify as convert
from moeify.checkpoint_build import describable, parameters_on_meta
from moeify.checkpoint_manifest import LayerRecord
from moeify.checkpoint_replay import check_layer, layer_records, versions
from moeify.checkpoint_state import tensors_of, to_meta
from moeify.conversion import Conversion, require_conversion, require_one_process
from moeify.errors import CaptureError, CheckpointError, MoeifyError
from moeify.hf_dense import KEY, with_decoys, without_decoys
from moeify.input_spec import make_inputs
from moeify.plan import Plan
from moeify.selection import Strict
from moeify.strict_yaml import path_text

log = logging.getLogger("moeify")

_OF_DTYPE: Final = frozenset({"dtype", "bytes_after"})
"""What follows from the dtype, which a caller of `from_pretrained` may choose."""

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Recipe(Strict):
    """The content of `config.moeify`.

    Attributes:
        version: Of this form.
        versions: Of the packages that wrote it.
        plan: The plan's data.
        plan_sha256: Its digest.
        inputs: Description of the example inputs; None where they are made from the config.
        layers: What must come out of the conversion, without what is at its default.
    """

    version: Literal[2]
    versions: dict[str, str]
    plan: dict[str, Any]
    plan_sha256: _Digest
    inputs: Any
    layers: list[LayerRecord]


def recipe_of(conversion: Conversion, layers: list[LayerRecord]) -> dict[str, Any]:
    """Return the recipe of a converted Hugging Face model, as JSON-able data."""
    recipe = Recipe(
        version=2,
        versions=versions(),
        plan=conversion.plan.data(),
        plan_sha256=conversion.plan.digest(),
        inputs=conversion.inputs if describable(conversion.inputs) else None,
        layers=layers,
    )
    return recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)


class ConvertedConfig:
    """Stands before a config class of transformers in a generated one.

    Attributes:
        saved_as: The `model_type` that is written, which transformers does not know.
    """

    saved_as: ClassVar[str] = ""
    model_type: ClassVar[str]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read the file, with the `model_type` that it has in memory."""
        found, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return cls._in_memory(found), rest

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Any:
        """Make the config, without what keeps dense classes off."""
        return super().from_dict(cls._in_memory(config_dict), **kwargs)  # type: ignore[misc]

    @classmethod
    def _in_memory(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        made = without_decoys(data)
        if made.get("model_type") == cls.saved_as:
            made["model_type"] = cls.model_type
        return made

    def to_dict(self) -> dict[str, Any]:
        """Return what is written."""
        made: dict[str, Any] = super().to_dict()  # type: ignore[misc]
        return with_decoys(made | {"model_type": self.saved_as})


def dense_config_class(cls: type) -> type:
    """Return the config class of transformers behind a generated one."""
    return next(base for base in cls.__mro__ if not issubclass(base, ConvertedConfig))


class ConvertedModel:
    """Stands before a model class of transformers in a generated one.

    Attributes:
        dense_class: That class.
    """

    dense_class: ClassVar[type]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        self.build_dense(config, *args, **kwargs)
        assert isinstance(self, nn.Module)
        convert_for_loading(self)

    def build_dense(self, config: Any, *args: Any, **kwargs: Any) -> None:
        """Build the dense model, which may ask for the classes that its config's class has."""
        generated = type(config)
        config.__class__ = self.__dict__["config_class"] = dense_config_class(generated)
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            config.__class__ = generated
            del self.__dict__["config_class"]

    def _get_name(self) -> str:
        """Return the dense class's name, by which trainers know whose labels are shifted."""
        return self.dense_class.__name__


def convert_for_loading(model: nn.Module) -> None:
    """Convert a newly built dense model by the recipe in its config; its weights come later.

    Args:
        model: Of a generated class; on meta it stays on meta.

    Raises:
        CheckpointError: The recipe is damaged, does not fit, or gives something else than it did.
    """
    config: Any = model.config
    where = f"{getattr(config, 'name_or_path', '') or 'config.json'}: {KEY}"
    recipe = _read(getattr(config, KEY, None), where)
    try:
        plan = Plan.of(recipe.plan)
    except MoeifyError as error:
        raise CheckpointError(f"{where}.plan: {error}") from error
    if plan.digest() != recipe.plan_sha256:
        raise CheckpointError(f"{where}.plan_sha256: is not the digest of the plan")
    if recipe.inputs is not None and not describable(recipe.inputs):
        raise CheckpointError(f"{where}.inputs: cannot be made again")
    try:
        with torch.device("cpu"):
            inputs = None if recipe.inputs is None else make_inputs(recipe.inputs)
            _convert(model, plan, inputs)
        require_one_process(model, "from_pretrained")
    except MoeifyError as error:
        raise CheckpointError(
            f"{where}: the plan does not fit this {type(model).__name__}: {error}"
        ) from error
    _check(model, recipe, where)


def _convert(model: nn.Module, plan: Plan, inputs: Any) -> None:
    try:
        convert(model, plan, example_inputs=inputs, verify=False)
    except CaptureError:
        # It reads values on the way: build it again with its buffers, and zeros for parameters.
        if not any(item.tensor.is_meta for item in tensors_of(model)):
            raise
        assert isinstance(model, ConvertedModel)
        with parameters_on_meta():
            model.build_dense(model.config)
        for module in model.modules():  # nothing is initialised: values come from a file
            for part in (module, *module._parameters.values(), *module._buffers.values()):
                getattr(part, "__dict__", {}).pop("_is_hf_initialized", None)
        for item in list(tensors_of(model)):
            if item.role == "parameter" and item.tensor.is_meta:
                zeros = torch.zeros_like(item.tensor, device="cpu")
                setattr(item.module, item.key, nn.Parameter(zeros, item.tensor.requires_grad))
        convert(model, plan, example_inputs=inputs, verify=False)
        to_meta(model)


def _read(data: Any, where: str) -> Recipe:
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: is missing: the config is of no converted model")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}.{path_text(first['loc'])}: {first['msg']}") from None


def _check(model: nn.Module, recipe: Recipe, where: str) -> None:
    """Compare what was converted with what the recipe says.

    Raises:
        CheckpointError: It is something else, though by the same releases.
    """
    now = layer_records(model, require_conversion(model))
    names, were = ([layer.plan.name for layer in layers] for layers in (now, recipe.layers))
    if names != were:
        raise CheckpointError(
            f"{where}.layers: were {were}, and are now {names}: the library changed"
        )
    for old, new in zip(recipe.layers, now, strict=True):
        check_layer(old, new, f"{where}.layers", "the library changed", ignore=_OF_DTYPE)
        if (old.graph, old.inner) == (new.graph, new.inner):
            continue
        if recipe.versions != versions():
            log.warning(
                "%s: %s: the graph of its block is not the one that %s wrote: compare outputs",
                where,
                old.plan.name,
                recipe.versions,
            )
            continue
        raise CheckpointError(
            f"{where}.layers: {old.plan.name}: its block computes something else: passes of your "
            "own, and dense modules that were changed, do not travel with this format; use "
            "moeify.save"
        )


def become_dense(model: nn.Module) -> None:
    """Give a model of a generated class, which was converted back, its dense class and config."""
    if not isinstance(model, ConvertedModel):
        return
    configs = {id(c): c for m in model.modules() if (c := m.__dict__.get("config")) is not None}
    for config in configs.values():
        if hasattr(config, KEY):
            config.__class__ = dense_config_class(type(config))
            for key in (KEY, "auto_map", "architectures"):
                config.__dict__.pop(key, None)
    model.__class__ = model.dense_class


__all__ = ["ConvertedConfig", "ConvertedModel", "become_dense", "convert_for_loading", "recipe_of"]
