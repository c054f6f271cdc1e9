"""Read a dense Hugging Face folder under the tensor names of its model.

Older files use other names than the classes that read them: transformers renames, adds or removes
the prefix of the base model, and ties. Its own functions are used for that. Where it computes
tensors from others (merges, splits, transposes), the whole model has to be loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeify.errors import CheckpointError, MoeifyError
from moeify.storage.atomic_folder import CHUNK
from moeify.storage.folder_reader import CheckpointReader
from moeify.storage.model_state import tensors_of
from moeify.storage.tensor_source import TensorSpec


class NeedsLoading(MoeifyError):
    """The model's tensors are not in the folder: transformers computes them on loading."""


class DenseTensors:
    """A `TensorSource` of a dense model's tensors in a folder, by the model's names.

    Shapes in `specs` are the model's and dtypes those of the files, or the model's for `missing`
    tensors, which cannot be read. `unused` are the names in the files that the model lacks.
    """

    def __init__(
        self,
        folder: CheckpointReader,
        specs: Mapping[str, TensorSpec],
        aliases: Mapping[str, str],
        keys: Mapping[str, str],
        unused: Iterable[str],
    ) -> None:
        self.folder = folder
        self.specs = specs
        self.aliases = aliases
        self.missing = tuple(name for name in specs if name not in keys)
        self.unused = tuple(unused)
        self._keys = keys

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `TensorSource.read`."""
        key = self._keys.get(self.aliases.get(name, name))
        if key is None:
            raise CheckpointError(f"{self.folder.path}: {name}: is in none of the files")
        return self.folder.read(key, start, stop)


def open_dense_folder(directory: str | os.PathLike[str], model: nn.Module) -> DenseTensors:
    """Open a dense Hugging Face folder, tensor by tensor, under the names of a model (or on meta).

    Raises:
        CheckpointError: The folder is damaged, quantised, or does not fit the model.
        NeedsLoading: The model's tensors are computed from those in the files.
    """
    folder = CheckpointReader(directory)
    try:
        return _by_name(folder, model)
    except BaseException:
        folder.close()
        raise


def refuse_quantised(config: Mapping[str, Any], where: str) -> None:
    """Refuse a folder whose config says that its weights are quantised."""
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        found = part.get("quantization_config")
        if found is None:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else None
        raise CheckpointError(
            f"{where}: its weights are quantised ({method or 'by an unnamed method'!s:.40}): "
            "convert the model that they were made from, or dequantise and save it first"
        )


def _by_name(folder: CheckpointReader, model: nn.Module) -> DenseTensors:
    refuse_quantised(folder.config, folder.path)
    specs, aliases = places_of(model)
    rename = renaming(model, folder.path)
    keys: dict[str, str] = {}
    unused = []
    for key, entry in folder.keys.items():
        name = rename(key)
        if name not in specs and name not in aliases:
            unused.append(key)
            continue
        spec = specs[aliases.get(name, name)]
        if entry.spec.shape != spec.shape:
            raise CheckpointError(
                f"{folder.path}: {entry.file}: {key}: has the shape {list(entry.spec.shape)}, but "
                f"{name} of a {type(model).__name__} has {list(spec.shape)}"
            )
        if name in keys:
            raise CheckpointError(f"{folder.path}: {keys[name]} and {key} are both {name}")
        keys[name] = key
    keys = _tied(folder, keys, aliases)
    specs = {n: folder.keys[keys[n]].spec if n in keys else spec for n, spec in specs.items()}
    made, known = _ignored(model, "missing"), _ignored(model, "unexpected")
    for name in specs:
        if name not in keys and made(name):
            raise NeedsLoading(
                f"{folder.path}: {name} is in none of the files: transformers computes it when "
                f"it loads a {type(model).__name__}"
            )
    return DenseTensors(folder, specs, aliases, keys, (key for key in unused if not known(key)))


def places_of(model: nn.Module) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Return every tensor of a state dict under its first name, and its aliases.

    Tensors are tied if they are one object, so the model may be on meta.
    """
    specs: dict[str, TensorSpec] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for item in tensors_of(model):
        if item.role == "scratch":
            continue
        name = first.setdefault(id(item.tensor), item.name)
        if name == item.name:
            specs[name] = TensorSpec(tuple(item.tensor.shape), item.tensor.dtype)
        else:
            aliases[item.name] = name
    return specs, aliases


def _tied(
    folder: CheckpointReader, keys: Mapping[str, str], aliases: Mapping[str, str]
) -> dict[str, str]:
    """Return the key of each tensor's first name, whichever of its names the files use."""
    found = {name: key for name, key in keys.items() if name not in aliases}
    for name, key in keys.items():
        if name in aliases:
            held = found.setdefault(aliases[name], key)
            if held != key and not _same(folder, held, key):
                raise NeedsLoading(
                    f"{folder.path}: {held} and {key} differ, but the config ties them: correct "
                    "tie_word_embeddings, or load the whole model"
                )
    return found


def _same(folder: CheckpointReader, one: str, other: str) -> bool:
    """Compare two tensors bit by bit, some rows at a time."""
    specs = [folder.keys[key].spec for key in (one, other)]
    if specs[0] != specs[1]:
        return False
    rows = specs[0].shape[0] if specs[0].shape else 1
    size = folder.keys[one].end - folder.keys[one].begin
    step = max(1, rows * CHUNK // max(size, 1))
    return all(
        torch.equal(
            folder.read(one, at, at + step).reshape(-1).view(torch.uint8),
            folder.read(other, at, at + step).reshape(-1).view(torch.uint8),
        )
        for at in range(0, rows, step)
    )


def renaming(model: nn.Module, where: str) -> Callable[[str], str]:
    """Return the function from keys of the files to names of the model, as transformers has it."""
    if not hasattr(model, "base_model_prefix"):
        return lambda key: key
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            rename_source_key,
        )
    except ImportError as error:
        raise NeedsLoading(f"{where}: transformers is too old to rename its tensors") from error
    dense: Any = model
    mapping = get_model_conversion_mapping(dense)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    computed = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    places = dict(model.state_dict(keep_vars=True))
    prefix: Any = model.base_model_prefix

    def rename(key: str) -> str:
        name, pattern = rename_source_key(key, renamings, computed, prefix, places)
        if name not in places and key in places:
            return str(rename_source_key(key, [], [], prefix, places)[0])
        if pattern is not None and name in places:
            raise NeedsLoading(
                f"{where}: {key}: {name} of a {type(model).__name__} is computed from it when "
                "transformers loads the model"
            )
        return str(name)

    return rename


def _ignored(model: nn.Module, which: str) -> Callable[[str], bool]:
    """Return a test for names that the model's class ignores on loading."""
    patterns = list(getattr(model, f"_keys_to_ignore_on_load_{which}", None) or ())
    if which == "unexpected":  # buffers that older files hold
        patterns += [r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$"]
    found = [re.compile(pattern) for pattern in patterns]
    return lambda name: any(pattern.search(name) for pattern in found)
