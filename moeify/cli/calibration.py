"""The user's texts as calibration inputs of a dense model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from moeify.errors import MoeifyError
from moeify.hf.local_folder import transformers_offline

LONGEST = 512  # tokens of a text
_MOST_BYTES = 1 << 26


def texts_as_inputs(folder: Path, file: Path, model: nn.Module) -> dict[str, Any]:
    """Return the lines of a UTF-8 file as one batch of keyword arguments for `model`.

    Args:
        folder: Holds the model's tokenizer.
        file: One text per line; empty lines are skipped.
        model: Takes `input_ids` [B, L] and any other output of the tokenizer that `forward` names.
    """
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise MoeifyError(f"{file}: is larger than {_MOST_BYTES:,} bytes; fewer texts will do")
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise MoeifyError(f"{file}: is not UTF-8 text: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise MoeifyError(f"{file}: holds no text; give one document per line")
    transformers = transformers_offline()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
        batch = tokenizer(
            lines, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
    except Exception as error:
        raise MoeifyError(f"{folder}: its tokenizer cannot be used: {error}") from error
    accepted = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key in accepted}
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return inputs
