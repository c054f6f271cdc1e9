"""The recipe in the config of a custom export: the plan, and the layers that it must produce."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError

from moeify.capture.input_spec import describable
from moeify.convert.replay import Recorded, versions
from moeify.errors import CheckpointError
from moeify.plan.selection import Strict
from moeify.plan.strict_yaml import path_text
from moeify.sites.record import Conversion
from moeify.storage.manifest import LayerRecord

_OF_DTYPE: Final = frozenset({"dtype", "bytes_after"})  # a caller of from_pretrained chooses it
_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Recipe(Strict):
    """The content of `config.moeify`."""

    version: Literal[3]
    versions: dict[str, str]
    plan: dict[str, Any]
    plan_sha256: _Digest
    inputs: Any  # description of the example inputs; None where the config gives them
    layers: list[LayerRecord]  # what the conversion must produce, without defaults


def recipe_of(conversion: Conversion, layers: list[LayerRecord]) -> dict[str, Any]:
    """Return the recipe of a converted Hugging Face model, as JSON data."""
    recipe = Recipe(
        version=3,
        versions=versions(),
        plan=conversion.plan.data(),
        plan_sha256=conversion.plan.digest(),
        inputs=conversion.inputs if describable(conversion.inputs) else None,
        layers=layers,
    )
    return recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)


def read_recipe(data: Any, where: str) -> Recipe:
    """Read the recipe that a config holds; `where` is its place, for messages."""
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: is missing: this is not the config of a converted model")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise CheckpointError(f"{where}.{path_text(first['loc'])}: {first['msg']}") from None


def recorded(recipe: Recipe, where: str) -> Recorded:
    """Return what a recipe says of the conversion."""
    return Recorded(
        where=where,
        fields=f"{where}.",
        plan=recipe.plan,
        plan_sha256=recipe.plan_sha256,
        inputs=recipe.inputs,
        layers=recipe.layers,
        ignore=_OF_DTYPE,
        versions=recipe.versions,
        passes="this format does not keep passes of your own or changes to dense modules; use "
        "moeify.save",
    )
