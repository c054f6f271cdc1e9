"""The class that reads a custom folder, made here: nothing of a stranger's folder is imported.

Users load such a folder with `trust_remote_code=True`, which runs the code in it. What moeify
itself does with a folder from elsewhere, such as converting it back, uses these classes instead;
they are those that the code of an untouched folder defines.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from moeify.errors import CheckpointError
from moeify.formats.manifest import read_format_manifest
from moeify.formats.remote_code import ConvertedConfig, ConvertedModel
from moeify.hf.dense_class import class_named, own_class
from moeify.storage.atomic_folder import MANIFEST, Folder


def custom_class(directory: Path) -> Any:
    """Return the class of a folder's model, with `from_pretrained`.

    Raises:
        CheckpointError: The folder has no such model, or names a class that is not transformers'.
    """
    with Folder(directory) as folder:
        manifest, where = read_format_manifest(folder), folder.where(MANIFEST)
    if manifest is None or manifest.kind != "custom":
        raise CheckpointError(f"{directory}: is not a folder with a custom export")
    what = f"{where}: details.class"
    dense = class_named(str(manifest.details.get("class")), what)
    config: Any = getattr(dense, "config_class", None)
    if not issubclass(dense, nn.Module) or not isinstance(config, type):
        raise CheckpointError(f"{what}: {dense.__name__} is not a model")
    own_class(config, "the config's class")
    saved_as = f"moeify_{config.model_type}"  # type: ignore[attr-defined]
    generated = type(f"Moeify{config.__name__}", (ConvertedConfig, config), {"saved_as": saved_as})
    body = {"config_class": generated, "dense_class": dense}
    return type(f"Moeify{dense.__name__}", (ConvertedModel, dense), body)
