"""Revert a folder: the dense model behind it, one layer at a time.

The dense model is built on meta and converted there as it once was, which says where every tensor
went. Kept tensors are copied under their old names. When the first dense tensor of a converted
layer is due, its block alone is given its tensors, and `moeify.convert.revert` makes them all.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from moeify.capture.on_meta import default_device_cpu
from moeify.checkpoint.rebuild import build
from moeify.checkpoint.single import load
from moeify.convert.replay import Recorded, layer_records, replay
from moeify.convert.revert import RevertedLayer
from moeify.errors import CheckpointError
from moeify.formats.dense_details import config_files, main_dtype
from moeify.formats.manifest import FormatManifest, format_manifest, read_format_manifest
from moeify.formats.native.reader import NativeTensors
from moeify.formats.reader import FolderTensors
from moeify.hf.dense_class import dense_class, dense_config, generation_config
from moeify.hf.tensor_names import places_of, renaming
from moeify.sites.record import Conversion, ConvertedLayer, require_conversion
from moeify.storage.atomic_folder import Folder
from moeify.storage.manifest import MAX_BYTES, Manifest, ModelRecord, read_manifest
from moeify.storage.model_state import tensors_of
from moeify.storage.strict_json import parse_json
from moeify.storage.tensor_source import (
    ModelFiles,
    Output,
    TensorSource,
    TensorSpec,
    Written,
    copied,
    describe,
)

log = logging.getLogger("moeify")

_EXACT_INITS: Final = frozenset({"copy", "granular", "split"})  # the dense MLP can be restored
# Fields of a layer's plan on which the meaning of its tensors depends.
_KEYS: Final = {"name", "experts", "top_k", "residual", "expert", "init"}


def dense_files(directory: str | os.PathLike[str]) -> ModelFiles:
    """Describe the dense model that a save, or a custom or native export, comes from.

    Exact, bit for bit, where nothing has been trained and the experts are copies; see `demoeify`
    for other cases. Experts that differ are averaged, and a warning names them when they are
    written. An `UnsupportedModuleError` is raised then too, if a block has learned something that
    the dense module has no place for.
    """
    with default_device_cpu():
        start = _start(directory)
    model, tensor_source = start.model, start.tensor_source
    conversion = require_conversion(model)
    places = _fill(model, tensor_source, start.where)
    layers = _Layers(model, tensor_source, places)
    kept = _kept(start, conversion, places, layers.specs)
    outputs = [
        layers.output(name) if name in layers.specs else copied(tensor_source, kept[name], name)
        for name in start.names
    ]
    config = dense_config(model) | {"dtype": main_dtype(output.spec for output in outputs)}
    make = format_manifest(
        "dense",
        architecture=dense_class(model).__name__,
        plan=conversion.plan,
        layers=layer_records(model, conversion),
        source=start.source,
    )

    def manifest(written: Written) -> bytes:
        tensor_source.unchanged()  # by now everything has been read
        return make(written)

    return ModelFiles(
        kind="dense",
        tensors=tuple(outputs),
        texts=config_files(config, generation_config(model)),
        manifest=manifest,
        notes=_notes(conversion),
    )


def _notes(conversion: Conversion) -> tuple[str, ...]:
    """Name the layers whose experts were not copies of one another from the start."""
    return tuple(
        f"{c.layer.name}: its experts were not the same from the start ({c.layer.init.experts}): "
        "their mean is not an MLP that was ever trained"
        for c in conversion.layers
        if c.layer.init.experts not in _EXACT_INITS
    )


@dataclass(frozen=True, slots=True)
class _Start:
    """What a folder holds."""

    where: str  # the folder, for messages
    tensor_source: FolderTensors | NativeTensors
    names: tuple[str, ...]  # the dense model's tensors, in the order of its state dict
    aliases: Mapping[str, str]  # further names of tied ones, to those names
    model: nn.Module  # the converted model on meta
    source: dict[str, Any]  # the folder as a source, for the manifest


def _start(directory: str | os.PathLike[str]) -> _Start:
    with Folder(directory) as folder:
        export, where = read_format_manifest(folder), folder.path
        if export is not None and export.kind == "dense":
            raise CheckpointError(f"{where}: is a dense model already")
        native = export is not None and export.kind == "native"
        tensor_source = NativeTensors(directory) if native else FolderTensors(directory)
        if isinstance(tensor_source.manifest, Manifest):
            dense = _saved(folder, tensor_source.manifest)
        else:
            dense = _exported(tensor_source.manifest, where)
    specs, aliases = places_of(dense)
    rename = renaming(dense, where)
    for name in specs:
        if (other := rename(name)) != name:
            raise CheckpointError(
                f"{where}: transformers would load {name} as {other}: load the model and use "
                "moeify.demoeify and save_pretrained"
            )
    model = dense
    if export is None:
        load(directory, device="meta", model=model)
    else:
        replay(model, _recorded(export, where))
    files = [record.model_dump(mode="json") for record in tensor_source.manifest.shards]
    source = {"folder": os.path.basename(os.path.realpath(directory)), "files": files}
    return _Start(where, tensor_source, tuple(specs), aliases, model, source)


def _saved(folder: Folder, manifest: Manifest) -> nn.Module:
    """Build the dense model of a save on meta."""
    texts: dict[str, Any] = {}
    names = {record.file for record in manifest.files}
    for name in ("source_config.json", "generation_config.json"):
        if name in names:
            texts[name] = parse_json(folder.read(name, limit=MAX_BYTES), folder.where(name))
            if not isinstance(texts[name], dict):
                raise CheckpointError(f"{folder.where(name)}: is not a mapping")
    if "source_config.json" not in texts:
        raise CheckpointError(
            f"{folder.path}: holds a {manifest.model.name}, not a Hugging Face model: use "
            "moeify.load(folder, model=...) and moeify.demoeify"
        )
    config, generation = texts["source_config.json"], texts.get("generation_config.json")
    return build(manifest.model, config, generation, folder.path)


def _exported(export: FormatManifest, where: str) -> nn.Module:
    """Build the dense model of an export on meta."""
    details = export.details
    config, generation = details.get("config"), details.get("generation")
    if not isinstance(config, dict) or not (generation is None or isinstance(generation, dict)):
        raise CheckpointError(f"{where}/moeify.json: details: lack the dense config")
    try:
        modes: dict[str, Any] = {"other_mode": [], "attention": {}, "experts": {}}
        record = ModelRecord.model_validate(
            {"name": details.get("class"), "training": False, **modes}
        )
    except ValidationError as error:
        raise CheckpointError(f"{where}/moeify.json: details: class: {error}") from None
    return build(record, config, generation, where)


def _recorded(export: FormatManifest, where: str) -> Recorded:
    """Return what an export says of its conversion."""
    return Recorded(
        where=where,
        fields=f"{where}/moeify.json: ",
        plan=export.plan,
        plan_sha256=export.plan_sha256,
        inputs=export.details.get("inputs"),
        layers=export.layers,
        only=_KEYS,
        versions=export.versions,
    )


def _fill(model: nn.Module, tensor_source: TensorSource, where: str) -> dict[str, str]:
    """Give a converted model on meta the dtypes of its tensors, and check their shapes.

    Return every name in the model's state dict with its name in `tensor_source.specs`.
    """
    specs, aliases = places_of(model)
    groups = {name: [name] for name in specs}
    for alias, name in aliases.items():
        groups[name].append(alias)
    places: dict[str, str] = {}
    for name, group in groups.items():
        found = {alias: tensor_source.aliases.get(alias, alias) for alias in group}
        stored = next((at for at in found.values() if at in tensor_source.specs), None)
        if stored is None:
            raise CheckpointError(f"{where}: {name}: is in none of the files")
        spec = tensor_source.specs[stored]
        if spec.shape != specs[name].shape:
            raise CheckpointError(
                f"{where}: {name}: is {describe(spec)}, but {list(specs[name].shape)} in a "
                f"{type(model).__name__} of this plan"
            )
        tensor: Tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        path, _, key = name.rpartition(".")
        if key in model.get_submodule(path)._parameters:
            tensor = nn.Parameter(tensor, spec.dtype.is_floating_point)
        for alias, at in found.items():
            path, _, key = alias.rpartition(".")
            setattr(model.get_submodule(path), key, tensor)
            places[alias] = at if at in tensor_source.specs else stored
    return places


def _kept(
    start: _Start, conversion: Conversion, places: Mapping[str, str], made: Mapping[str, TensorSpec]
) -> dict[str, str]:
    """Return where every dense tensor is stored that no block holds; refuse untied tied ones."""
    found: dict[str, str] = {}
    for name in (*start.names, *start.aliases):
        if name in made or start.aliases.get(name, name) in made:
            continue
        _, now = conversion.ledger.get(name, ("kept", name))
        if now not in places:
            raise CheckpointError(f"{start.where}: {name}: is in none of the files")
        found[name] = places[now]
        first = start.aliases.get(name, name)
        if found[first] != found[name]:
            raise CheckpointError(
                f"{start.where}: {first} and {name} are two tensors, which the dense class ties: "
                "load the model and use moeify.demoeify"
            )
    return found


class _Layers:
    """The dense tensors that come out of the blocks, made when they are asked for.

    `places` has the name in `tensor_source` of every name in the converted model, which is on meta.
    """

    def __init__(
        self, model: nn.Module, tensor_source: TensorSource, places: Mapping[str, str]
    ) -> None:
        self._model, self._tensor_source, self._places = model, tensor_source, places
        self._layer: dict[str, ConvertedLayer] = {}
        self.specs: dict[str, TensorSpec] = {}
        for converted in require_conversion(model).layers:
            with torch.no_grad():
                rebuilt = RevertedLayer(model, converted)
            for name, parameter in rebuilt.parameters.items():
                self._layer[name] = converted
                self.specs[name] = TensorSpec(tuple(parameter.shape), parameter.dtype)
        self._made: tuple[ConvertedLayer | None, dict[str, Tensor]] = None, {}

    def output(self, name: str) -> Output:
        def pieces() -> Iterator[Tensor]:
            layer = self._layer[name]
            if self._made[0] is not layer:
                self._made = None, {}  # free the last layer first
                self._made = layer, self._make(layer)
            yield self._made[1][name]

        return Output(name, self.specs[name], pieces)

    def _make(self, layer: ConvertedLayer) -> dict[str, Tensor]:
        with self._real(layer), torch.no_grad():
            rebuilt = RevertedLayer(self._model, layer)
        if not rebuilt.exact:
            log.warning(
                "%s: its experts differ: they were averaged, and the dense model does not compute "
                "what the MoE model did",
                rebuilt.name,
            )
        return {name: parameter.detach() for name, parameter in rebuilt.parameters.items()}

    @contextmanager
    def _real(self, layer: ConvertedLayer) -> Iterator[None]:
        """Give a block its tensors for a while."""
        block = self._model.get_submodule(layer.block)
        with contextlib.ExitStack() as undo:
            for item in list(tensors_of(block)):
                if item.role == "scratch":
                    continue
                value = self._tensor_source.read(self._places[f"{layer.block}.{item.name}"])
                if item.role == "parameter":
                    value = nn.Parameter(value, requires_grad=False)
                undo.callback(setattr, item.module, item.key, item.tensor)
                setattr(item.module, item.key, value)
            yield


def dense_on_meta(directory: str | os.PathLike[str]) -> nn.Module:
    """Build the dense model that a converted folder comes from, without its weights."""
    with Folder(directory) as folder:
        export = read_format_manifest(folder)
        if export is not None:
            return _exported(export, folder.path)
        return _saved(folder, read_manifest(folder))
