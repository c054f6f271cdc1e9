"""The recipe in the config of a custom export: the plan, and what its conversion must give."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError
from torch import nn

from moeify.checkpoint_replay import LayerFacts, Recorded, layer_records, versions
from moeify.conversion import Conversion
from moeify.errors import CheckpointError
from moeify.input_spec import describable
from moeify.selection import Strict
from moeify.strict_yaml import path_text

_Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class RecipeLayer(Strict):
    """What must come out of the conversion for one layer.

    Attributes:
        name: The layer.
        block: Path of its block.
        experts: Number of experts.
        top_k: Experts per token.
        graph: Digest of what the block computes.
        inner: Digest of the graphs inside it.
    """

    name: str
    block: str
    experts: int
    top_k: int
    graph: _Digest
    inner: _Digest


class Recipe(Strict):
    """The content of `config.moeify`.

    Attributes:
        version: Of this form.
        versions: Of the packages that wrote it.
        plan: The plan's data.
        plan_sha256: Its digest.
        inputs: Description of the example inputs; None where they are made from the config.
        layers: What must come out.
    """

    version: Literal[1]
    versions: dict[str, str]
    plan: dict[str, Any]
    plan_sha256: _Digest
    inputs: Any
    layers: list[RecipeLayer]


def recipe_of(model: nn.Module, conversion: Conversion) -> dict[str, Any]:
    """Return the recipe of a converted Hugging Face model, as JSON-able data."""
    records = layer_records(model, conversion)
    return Recipe(
        version=1,
        versions=versions(),
        plan=conversion.plan.data(),
        plan_sha256=conversion.plan.digest(),
        inputs=conversion.inputs if describable(conversion.inputs) else None,
        layers=[
            RecipeLayer(
                name=converted.layer.name,
                block=converted.block,
                experts=converted.layer.experts,
                top_k=converted.layer.top_k,
                graph=record.graph,
                inner=record.inner,
            )
            for converted, record in zip(conversion.layers, records, strict=True)
        ],
    ).model_dump(mode="json")


def read_recipe(data: Any, where: str) -> Recipe:
    """Read a recipe.

    Args:
        data: What the config holds.
        where: Its place, for messages.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: is missing: the config is of no converted model")
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
        layers=[
            LayerFacts(
                {"name": layer.name, "experts": layer.experts, "top_k": layer.top_k},
                layer.block,
                graph=layer.graph,
                inner=layer.inner,
            )
            for layer in recipe.layers
        ],
        versions=recipe.versions,
        passes="passes of your own, and dense modules that were changed, do not travel with this "
        "format; use moeify.save",
    )


__all__ = ["Recipe", "read_recipe", "recipe_of", "recorded"]
