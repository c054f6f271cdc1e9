"""Checkpoints of a Hugging Face `Trainer` where each rank holds only a part of the model.

A Trainer saves on its first rank. A model that is spread over ranks saves a marker there, in place
of its weights, and a callback of every Trainer saves and loads the sharded checkpoint beside it:

    checkpoint-20/
        model.safetensors     the marker: what makes the Trainer take the folder for a checkpoint
        step-00000020/        model and optimizer, by `save_sharded`
        optimizer.pt          hyperparameters alone
        scheduler.pt, trainer_state.json, rng_state_0.pth, ...

Imported where a model is spread over ranks, because it needs transformers' Trainer.
"""

from __future__ import annotations

import re
import uuid
from pathlib import Path
from typing import Any, Final

import torch
import transformers.trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from moeify.checkpoint.sharded.api import find_checkpoint, load_sharded, save_sharded
from moeify.checkpoint.sharded.manifest import read
from moeify.errors import CheckpointError, MoeifyError
from moeify.formats.save_hook import SavePretrained
from moeify.sites.record import is_spread
from moeify.storage.atomic_folder import Folder

_MARKER: Final = "moeify.sharded_checkpoint"
"""Name of the only tensor in a marker: 16 random bytes, which its sharded checkpoint has too."""

_KEY: Final = "trainer"  # of these bytes there
_CHECKPOINT: Final = re.compile(r"checkpoint-[0-9]+")


class _SaveMarker(SavePretrained):
    """Replaces the `save_pretrained` of a model that is spread over ranks."""

    # Of the Trainer that is training; it saves into `checkpoint-N` there.
    folder: Path | None = None
    mark: str | None = None  # of the checkpoint that is being saved
    resumed: str | None = None  # mark of the checkpoint that the Trainer resumes from

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        target = Path(save_directory).absolute()
        if target.parent != self.folder or _CHECKPOINT.fullmatch(target.name) is None:
            super().__call__(save_directory, *args, **kwargs)
            return
        mark = uuid.uuid4()
        self.mark = mark.hex
        marker = torch.frombuffer(bytearray(mark.bytes), dtype=torch.uint8)
        # Without a config.json, which `from_pretrained` needs.
        save_file({_MARKER: marker}, target / "model.safetensors")


def attach(model: nn.Module) -> None:
    """Let every Trainer that trains this guarded model, spread over ranks, save it sharded."""
    guarded = model.__dict__["save_pretrained"]
    assert isinstance(guarded, SavePretrained)
    model.__dict__["save_pretrained"] = _SaveMarker(model, guarded.rules)
    model.register_load_state_dict_pre_hook(_note_marker)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_post_hook(_nothing_is_missing)  # type: ignore[no-untyped-call]
    callbacks: Any = transformers.trainer.DEFAULT_CALLBACKS
    if TrainerCheckpoints not in callbacks:
        callbacks.append(TrainerCheckpoints)


def _saver(model: Any) -> _SaveMarker | None:
    found = getattr(model, "__dict__", {}).get("save_pretrained")
    return found if isinstance(found, _SaveMarker) and is_spread(model) else None


def _note_marker(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    marker = state_dict.pop(prefix + _MARKER, None)
    saver = _saver(model)
    if isinstance(marker, Tensor) and saver is not None:
        saver.resumed = bytes(marker.tolist()).hex()


def _nothing_is_missing(model: nn.Module, incompatible: Any) -> None:
    """Keep the Trainer from listing all weights as missing: they come when training begins."""
    saver = _saver(model)
    if saver is not None and saver.resumed is not None:
        incompatible.missing_keys.clear()


class TrainerCheckpoints(TrainerCallback):
    """Saves and loads what a Trainer cannot, on all ranks; among the callbacks of every Trainer."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Refuse what cannot be saved, before the first step, and load what is resumed from."""
        saver = _saver(model)
        if saver is None:
            return
        saves = args.save_strategy != "no"
        if args.load_best_model_at_end or (saves and state.is_hyper_param_search):
            name = "load_best_model_at_end" if args.load_best_model_at_end else "a search"
            raise MoeifyError(
                f"{name}: the Trainer would load weights on each rank from a checkpoint of the "
                "first: this model is spread over ranks; load with moeify.load_sharded instead"
            )
        saver.folder = Path(args.output_dir).absolute()
        if saver.resumed is not None:
            self._load(args, state, model, saver, kwargs.get("optimizer"))

    def on_save(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Save model and optimizer from all ranks, beside what the Trainer has saved."""
        saver = _saver(model)
        if saver is None:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        optimizer = None if args.save_only_model else _inner(kwargs.get("optimizer"))
        extra = {_KEY: saver.mark}
        save_sharded(model, folder, optimizer=optimizer, step=state.global_step, extra=extra)
        if args.should_save and optimizer is not None:
            # The Trainer has written the states of its first rank, and would load them on each.
            groups = optimizer.state_dict()["param_groups"]
            torch.save({"state": {}, "param_groups": groups}, folder / "optimizer.pt")

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Let `save_pretrained` refuse again: no callback runs after it any more."""
        if (saver := _saver(model)) is not None:
            saver.folder = None

    def _load(self, args: Any, state: Any, model: Any, saver: _SaveMarker, optimizer: Any) -> None:
        resumed, saver.resumed = saver.resumed, None
        given = args.resume_from_checkpoint
        usual = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder = Path(given) if isinstance(given, str) and Path(given).is_dir() else usual
        with Folder(find_checkpoint(folder, state.global_step)) as found:
            manifest = read(found)
        if manifest.extra.get(_KEY) != resumed:
            raise CheckpointError(
                f"{folder}: is another checkpoint than the one that the Trainer resumes from: set "
                "TrainingArguments(resume_from_checkpoint=...) to that folder, too"
            )
        inner = None if manifest.optimizer is None else _inner(optimizer)
        load_sharded(model, folder, optimizer=inner, step=state.global_step)


def _inner(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)
