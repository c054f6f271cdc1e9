"""`save_pretrained` of a converted model: the same folder as `moeify convert` writes."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn

from moeify import compat
from moeify.errors import CheckpointError, MoeifyError
from moeify.formats.choose import FormatChoice, choose_format
from moeify.sites.record import require_conversion, require_one_process
from moeify.storage.atomic_folder import MANIFEST, Folder, move_files_into, staged_folder
from moeify.storage.manifest import MAX_BYTES
from moeify.storage.strict_json import parse_json
from moeify.storage.tensor_source import LiveTensors, ModelFiles, Written
from moeify.storage.writer import INDEX, write_files_into, write_model_files
from moeify.units import parse_bytes

log = logging.getLogger("moeify")

_CHECKPOINT: Final = re.compile(r"checkpoint-[0-9]+")  # as transformers' Trainer names them
_WEIGHTS: Final = re.compile(r"model(?:-[0-9]{5}-of-[0-9]{5})?\.safetensors(?:\.index\.json)?")
_IGNORED: Final = ("save_peft_format", "save_original_format")


def save_pretrained(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    push_to_hub: bool = False,
    max_shard_size: int | str = "50GB",
    variant: str | None = None,
    token: str | bool | None = None,
    *,
    export: FormatChoice = "auto",
    **kwargs: Any,
) -> None:
    """Save a converted model of transformers, so that `from_pretrained` gives it back.

    A folder that is new, empty, or holds nothing but an older save is written whole or not at all.
    In any other (a trainer's, with its optimizer's state) `config.json` and the older weights are
    removed once all new files are written, then these are moved in, with `config.json` last: after
    a crash in between, nothing loads from the folder, never a mix.

    A warning is logged where the folder's class would train otherwise than this model.

    Args:
        model: The converted model; its weights lie whole in this process unless `state_dict` is
            given.
        save_directory: Made if it does not exist.
        is_main_process: False writes nothing.
        state_dict: Tensors to save in place of the model's own, by its names. The folder is then a
            custom export, whatever `export` says, as are those that a `Trainer` resumes from
            (`checkpoint-N`): resuming loads them by these very names.
        push_to_hub: Upload the files to the repository `repo_id`, or one of the folder's name;
            `private`, `create_pr`, `revision`, `commit_message` and `commit_description` are
            passed on.
        max_shard_size: Bytes per file, or a text such as "5GB".
        variant: Not supported.
        token: For the upload.
        export: "auto", "native", "custom" or "moeify"; see `choose_format`.
        **kwargs: Options of the upload; `safe_serialization=True` changes nothing.

    Raises:
        CheckpointError: The folder cannot be written, or the model has state that no such folder
            can hold.
        MoeifyError: The model's weights are elsewhere, or an option is not supported.
        TypeError: An option is unknown.
    """
    upload = _options(kwargs, variant, push_to_hub)
    if not is_main_process:
        return
    if getattr(model, "_hf_peft_config_loaded", False):  # adapters alone: they name their base
        type(model).save_pretrained(model, save_directory, max_shard_size=max_shard_size)  # type: ignore[attr-defined]
        return
    target = Path(save_directory)
    if state_dict is not None or (export == "auto" and _CHECKPOINT.fullmatch(target.name)):
        export = "custom"
    _check(model, state_dict)
    model_files = choose_format(model, LiveTensors(model, state_dict), export)
    for warning in model_files.warnings:
        log.warning("%s: %s", os.fspath(save_directory), warning)
    target.parent.mkdir(parents=True, exist_ok=True)
    if _replaceable(target):
        written = write_model_files(model_files, target, max_shard_size=max_shard_size)
    else:
        written = _write_into(model_files, target, max_shard_size)
    if push_to_hub:
        names = [record.file for record in (*written.shards, *written.files)]
        _upload(target, [*names, MANIFEST], token, upload)


def _options(kwargs: dict[str, Any], variant: str | None, push_to_hub: bool) -> dict[str, Any]:
    """Check the further options and return those of the upload."""
    if variant is not None:
        raise MoeifyError("variant: a converted model has none; save it to a folder of its own")
    if not kwargs.pop("safe_serialization", True):
        raise MoeifyError("safe_serialization: a converted model is saved as safetensors only")
    if kwargs.pop("distributed_checkpoint", False):
        raise MoeifyError("distributed_checkpoint: use moeify.save_sharded(model, directory)")
    for name in _IGNORED:
        kwargs.pop(name, None)
    known = {"repo_id", "private", "create_pr", "revision", "commit_message", "commit_description"}
    unknown = sorted(kwargs.keys() - (known if push_to_hub else set()))
    if unknown:
        raise TypeError(f"save_pretrained: unknown argument {unknown[0]!r}")
    return kwargs


def _check(model: nn.Module, state_dict: Mapping[str, Tensor] | None) -> None:
    """Refuse a model whose tensors are not in this process."""
    require_conversion(model)
    for path, module in model.named_modules():
        if compat.is_compiled_module(module):
            raise CheckpointError(
                f"{path}: is wrapped by torch.compile; save before, or use {path}.compile()"
            )
    if state_dict is not None:
        return
    require_one_process(model, "save_pretrained without state_dict=")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise MoeifyError(
                f"{name}: is on meta or offloaded: load the model whole, or give state_dict="
            )
        if type(parameter.data).__name__ == "DTensor":
            raise MoeifyError(
                f"{name}: is sharded: give state_dict=, gathered on the main process (accelerate's "
                "get_state_dict(model)), or use moeify.save_sharded(model, directory)"
            )


def _replaceable(target: Path) -> bool:
    """Return whether all files in a folder are moeify's own."""
    if not target.is_dir():
        return True  # new; a file is refused by the writer
    found = {entry.name for entry in target.iterdir()}
    if not found:
        return True
    try:
        with Folder(target) as folder:
            data = parse_json(folder.read(MANIFEST, limit=MAX_BYTES), MANIFEST)
        records = [*data["shards"], *data["files"]]
        return found <= {MANIFEST, *(record["file"] for record in records)}
    except (CheckpointError, KeyError, TypeError):
        return False


def _write_into(model_files: ModelFiles, target: Path, max_shard_size: int | str) -> Written:
    """Write into a folder that holds other files; see `save_pretrained`."""
    try:
        with staged_folder(target / "moeify") as staged:
            written = write_files_into(
                model_files, staged, parse_bytes(max_shard_size, "max_shard_size")
            )
            move_files_into(staged, target, stale=_WEIGHTS, last=(INDEX, MANIFEST, "config.json"))
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be saved: {error}") from error
    return written


def _upload(
    folder: Path, names: list[str], token: str | bool | None, options: dict[str, Any]
) -> None:
    from huggingface_hub import HfApi

    api = HfApi()
    repo = api.create_repo(
        options.pop("repo_id", folder.resolve().name),
        private=options.pop("private", None),
        token=token,
        exist_ok=True,
    ).repo_id
    api.upload_folder(
        repo_id=repo,
        folder_path=folder,
        token=token,
        allow_patterns=names,
        **{"commit_message": "Upload model", **options},
    )
