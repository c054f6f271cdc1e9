"""Hugging Face folders, as the command line reads them: local, safetensors only, no code of theirs.

Nothing here touches the network, and nothing unpickles.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.checkpoint_files import MANIFEST
from moeify.errors import MoeifyError

if TYPE_CHECKING:
    from torch import nn

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_BESIDE = (
    "tokenizer*",
    "vocab.*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.spm",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def transformers_offline() -> Any:
    """Import transformers with the network and its progress bars switched off.

    Raises:
        MoeifyError: It is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        transformers: Any = importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        raise MoeifyError(
            "this needs transformers, which is not installed: pip install 'moeify[hf]'"
        ) from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def model_folder(path: str | os.PathLike[str]) -> Path:
    """Return a folder that holds a `config.json`.

    Raises:
        MoeifyError: There is none; moeify downloads nothing.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise MoeifyError(f"{folder}: no such folder; give a local one, moeify downloads nothing")
    if not (folder / "config.json").is_file():
        raise MoeifyError(f"{folder}: has no config.json, so it is no Hugging Face model")
    return folder


def build_on_meta(folder: Path) -> nn.Module:
    """Build the model that a folder's config describes, without weights.

    Raises:
        MoeifyError: transformers cannot build it.
    """
    import torch

    config, kind = _config_and_class(folder)
    try:
        with torch.device("meta"):
            model: nn.Module = kind(config) if kind is not None else _auto().from_config(config)
    except Exception as error:
        raise MoeifyError(f"{folder}: transformers cannot build this model: {error}") from error
    dtype = getattr(config, "dtype", None)
    return (model.to(dtype) if isinstance(dtype, torch.dtype) else model).eval()


def load_dense(folder: Path, dtype: str | None = None) -> tuple[nn.Module, list[str]]:
    """Load a model from its safetensors.

    Args:
        folder: From `model_folder`.
        dtype: Name of a torch dtype; the one in the config if None.

    Returns:
        The model in evaluation mode, and the parameters that the files do not hold, which
        transformers has therefore drawn at random.

    Raises:
        MoeifyError: There are no safetensors, they point elsewhere, or they do not fit.
    """
    import torch

    _check_files(folder)
    _, kind = _config_and_class(folder)
    chosen = "auto" if dtype is None else getattr(torch, dtype)
    try:
        model, info = (kind or _auto()).from_pretrained(
            str(folder),
            dtype=chosen,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise MoeifyError(f"{folder}: transformers cannot load this model: {error}") from error
    return model.eval(), sorted(info["missing_keys"])


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy tokenizer and processor files, over older ones too, and return their names."""
    found = {path.name for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()}
    names = sorted(found)
    for name in names:
        scratch = target / f".{name}.copying"
        shutil.copyfile(source / name, scratch)
        scratch.replace(target / name)
    return names


def is_save(folder: Path) -> bool:
    """Tell whether `moeify.save` wrote a folder."""
    return (folder / MANIFEST).is_file()


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _auto() -> Any:
    return transformers_offline().AutoModel


def _config_and_class(folder: Path) -> tuple[Any, Any]:
    """Return the config, and the class it names if transformers has it."""
    transformers = transformers_offline()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise MoeifyError(f"{folder}: config.json is not understood: {error}") from error
    names = getattr(config, "architectures", None) or [""]
    kind = getattr(transformers, str(names[0]), None)
    return config, kind if hasattr(kind, "from_pretrained") else None


def _check_files(folder: Path) -> None:
    index = folder / _INDEX
    if not index.is_file():
        if (folder / _WEIGHTS).is_file():
            return
        raise MoeifyError(
            f"{folder}: has neither {_WEIGHTS} nor {_INDEX}; pickled weights (.bin, .pt) are "
            "never read: convert them to safetensors first"
        )
    try:
        names = set(json.loads(index.read_bytes())["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MoeifyError(f"{index}: is no index of weights: {error!r}") from error
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise MoeifyError(f"{index}: {name!r} is no safetensors file in the same folder")
        if not (folder / name).is_file():
            raise MoeifyError(f"{folder}: {name} is missing, which the index names")
