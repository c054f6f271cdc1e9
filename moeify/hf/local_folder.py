"""Read Hugging Face folders: local ones, safetensors only, and never their own code.

Nothing here uses the network, and nothing unpickles.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moeify.atomic_file import replace_file
from moeify.capture.on_meta import parameters_on_meta, quiet_random_state
from moeify.errors import MoeifyError
from moeify.hf.name_rules import fits, float32_patterns
from moeify.storage.folder_reader import CheckpointReader
from moeify.storage.manifest import MAX_BYTES
from moeify.units import dtype_from_name

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
    """Import transformers with the network and its progress bars switched off."""
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
    """Return a local folder that holds a `config.json`."""
    folder = Path(path)
    if not folder.is_dir():
        raise MoeifyError(f"{folder}: no such folder; give a local one, moeify downloads nothing")
    if not (folder / "config.json").is_file():
        raise MoeifyError(f"{folder}: has no config.json, so it is not a Hugging Face model")
    return folder


def build_on_meta(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the model that a folder's config describes, with parameters on meta.

    Buffers are computed as usual, because some (rotary frequencies) are not in any file. Dtypes are
    those that `from_pretrained` would choose.
    """
    config, kind = _config_and_class(folder)
    chosen = dtype or getattr(config, "dtype", None)
    if not isinstance(chosen, torch.dtype):
        chosen = _stored_dtype(folder)
    for part in (
        config,
        *(getattr(config, key, None) for key in getattr(config, "sub_configs", {})),
    ):
        if part is not None:
            part.dtype = chosen
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(chosen)
        with quiet_random_state(), parameters_on_meta():
            model: nn.Module = kind(config) if kind is not None else _auto().from_config(config)
    except Exception as error:
        raise MoeifyError(f"{folder}: transformers cannot build this model: {error}") from error
    finally:
        torch.set_default_dtype(before)
    _keep_in_float32(model, chosen)
    _read_generation_config(model, folder)
    return model.eval()


def _stored_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of the first floating-point tensor of a folder, as transformers does."""
    if not any((folder / name).is_file() for name in (_WEIGHTS, _INDEX)):
        return torch.float32
    keys = CheckpointReader(folder).keys.values()
    return next((k.spec.dtype for k in keys if k.spec.dtype.is_floating_point), torch.float32)


def _keep_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the parameters that their class keeps in float32."""
    kept = float32_patterns(model, dtype)
    if not kept:
        return
    cast: dict[int, nn.Parameter] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and fits(kept, f"{path}.{key}" if path else key):
                wide = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                module._parameters[key] = cast.setdefault(id(parameter), wide)


def _read_generation_config(model: Any, folder: Path) -> None:
    """Set a model's generation config to the folder's, as `from_pretrained` does."""
    if getattr(model, "generation_config", None) is None:
        return
    if not (folder / "generation_config.json").is_file():
        return
    kind = type(model.generation_config)
    try:
        model.generation_config = kind.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        raise MoeifyError(f"{folder}: generation_config.json: {error}") from error


def load_dense(folder: Path, dtype: str | None = None) -> tuple[nn.Module, list[str]]:
    """Load a model from its safetensors, in evaluation mode.

    Returns:
        The model, and the parameters that the files lack and transformers has drawn at random.
    """
    _check_files(folder)
    _, kind = _config_and_class(folder)
    chosen = "auto" if dtype is None else dtype_from_name(dtype)
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


def files_beside(source: Path) -> dict[str, bytes]:
    """Return the contents of a folder's tokenizer and processor files by name."""
    found = {path.name for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()}
    texts = {}
    for name in sorted(found):
        if (source / name).stat().st_size > MAX_BYTES:
            raise MoeifyError(f"{source / name}: is too large for a tokenizer; take it out")
        texts[name] = (source / name).read_bytes()
    return texts


def copy_beside(source: Path, target: Path) -> list[str]:
    """Copy tokenizer and processor files, replacing older ones, and return their names."""
    texts = files_beside(source)
    for name, data in texts.items():
        replace_file(target / name, data)
    return list(texts)


def folder_bytes(folder: Path) -> int:
    """Return the total size of all files in a folder."""
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
        raise MoeifyError(f"{index}: is not an index of weights: {error!r}") from error
    for name in sorted(map(str, names)):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise MoeifyError(f"{index}: {name!r} is not a safetensors file in the same folder")
        if not (folder / name).is_file():
            raise MoeifyError(f"{folder}: {name}, which the index names, is missing")
