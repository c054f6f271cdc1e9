"""A native folder read back under the names of the converted model.

The weights may have been trained since, and saved by transformers over the folder: of `moeify.json`
only the mapping of the layers is needed, not the digests of the files.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moeify.errors import CheckpointError
from moeify.formats.manifest import FormatManifest, read_format_manifest
from moeify.formats.native.architectures import TARGETS
from moeify.storage.atomic_folder import Folder
from moeify.storage.folder_reader import CheckpointReader
from moeify.storage.manifest import MAX_BYTES, LayerRecord
from moeify.storage.strict_json import parse_json
from moeify.storage.tensor_source import TensorSpec

_BLOCK = re.compile(r"model\.layers\.[0-9]+\.mlp")


@dataclass(frozen=True, slots=True)
class _Layer:
    """Where the tensors of a layer are in the folder: keys of single tensors, and of stacks."""

    single: dict[str, str]
    stacks: dict[str, list[tuple[str, ...]]]
    experts: int
    biased: bool


class NativeTensors:
    """The tensors of a native folder, by the names of the converted model; a `TensorSource`."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        with Folder(directory) as folder:
            manifest = read_format_manifest(folder)
            if manifest is None or manifest.kind != "native":
                raise CheckpointError(f"{folder.path}: does not hold a native export of moeify")
            config = parse_json(
                folder.read("config.json", limit=MAX_BYTES), folder.where("config.json")
            )
        self.manifest: FormatManifest = manifest
        self._where = os.fspath(directory)
        found = config.get("architectures") if isinstance(config, dict) else None
        if found != [manifest.architecture]:
            raise CheckpointError(
                f"{self._where}: config.json names {found}, moeify.json {manifest.architecture}"
            )
        self._reader = CheckpointReader(directory)
        details = manifest.details
        try:
            names = [str(name) for name in details["names"]]
            self.aliases: Mapping[str, str] = {
                str(alias): str(name) for alias, name in details["aliases"].items()
            }
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{self._where}/moeify.json: details: {error!r}") from None
        self._layers = {record.block: self._layer(record) for record in manifest.layers}
        self.specs: Mapping[str, TensorSpec] = {name: self._spec(name) for name in names}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        layer, rest = self._split(name)
        if layer is None:
            return self._reader.read(name, start, stop)
        if rest == "router.pending_counts":
            return torch.zeros(layer.experts, dtype=torch.int64)[start:stop]
        if rest in layer.stacks:
            keys = layer.stacks[rest][start:stop]
            return torch.stack([torch.cat([self._reader.read(k) for k in each]) for each in keys])
        first, last, _ = slice(start, stop).indices(self.specs[name].shape[0])
        return self._reader.read(layer.single[rest], first, last)

    def unchanged(self) -> None:
        self._reader.unchanged()

    def close(self) -> None:
        self._reader.close()

    def _layer(self, record: LayerRecord) -> _Layer:
        architecture = self.manifest.architecture
        target = next((t for t in TARGETS if t.architecture == architecture), None)
        if target is None:
            raise CheckpointError(f"{self._where}: moeify does not write a {architecture}")
        if _BLOCK.fullmatch(record.block) is None:
            raise CheckpointError(f"{self._where}: {record.block:.200} is not an MLP of a decoder")
        prefix = f"{record.block.removesuffix('.mlp')}.{target.moe}"
        experts, residual = record.plan.experts, record.plan.residual
        biased = record.plan.router.bias_update > 0
        if experts > len(self._reader.keys):
            raise CheckpointError(f"{self._where}: {prefix} cannot have {experts} experts")
        single = {"router.weight": f"{prefix}.gate.weight"}
        if biased:
            single["router.selection_bias"] = f"{prefix}.gate.e_score_correction_bias"
        if residual != "none":
            for part in ("gate_proj", "up_proj", "down_proj"):
                single[f"mlp.{part}.weight"] = f"{prefix}.{target.shared}.{part}.weight"
        if residual == "sigmoid":
            single["residual_mix.coefficient.weight"] = f"{prefix}.{target.shared}_gate.weight"
        gate, up, down = target.leaves
        each = [f"{prefix}.experts.{expert}" for expert in range(experts)]
        stacks: dict[str, list[tuple[str, ...]]] = {
            "experts.gate_up_proj": [(f"{e}.{gate}.weight", f"{e}.{up}.weight") for e in each],
            "experts.down_proj": [(f"{e}.{down}.weight",) for e in each],
        }
        return _Layer(single, stacks, experts, biased)

    def _split(self, name: str) -> tuple[_Layer | None, str]:
        head, sep, rest = name.partition(".mlp.")
        return self._layers.get(head + ".mlp") if sep else None, rest

    def _spec(self, name: str) -> TensorSpec:
        layer, rest = self._split(name)
        if layer is None:
            return self._entry(name)
        if rest == "router.pending_counts":
            return TensorSpec((layer.experts,), torch.int64)
        if rest in layer.stacks:
            stacks = [[self._entry(key) for key in keys] for keys in layer.stacks[rest]]
            shapes = {tuple(part.shape for part in parts) for parts in stacks}
            if len(shapes) != 1:
                raise CheckpointError(f"{self._where}: the experts of {name} have several shapes")
            rows = sum(part.shape[0] for part in stacks[0])
            return TensorSpec((len(stacks), rows, *stacks[0][0].shape[1:]), stacks[0][0].dtype)
        spec = self._entry(layer.single[rest])
        if rest.startswith("router."):
            return TensorSpec((layer.experts, *spec.shape[1:]), spec.dtype)
        return spec

    def _entry(self, key: str) -> TensorSpec:
        entry = self._reader.keys.get(key)
        if entry is None:
            raise CheckpointError(f"{self._where}: {key} is missing")
        return entry.spec
