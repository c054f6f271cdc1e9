"""Texts of the user's as inputs on which a dense model runs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from moeify.errors import MoeifyError
from moeify.hf.local_folder import transformers_offline

LONGEST = 512
"""Most tokens of a text."""

_MOST = 1 << 26


def texts_as_inputs(folder: Path, file: Path, model: nn.Module) -> dict[str, Any]:
    """Return the lines of a file as one batch.

    Args:
        folder: Holds the model's tokenizer.
        file: UTF-8, a text per line; empty lines are left out.
        model: What takes the batch.

    Returns:
        Keyword arguments: `input_ids` [B, L] and what else the tokenizer makes and the model takes.

    Raises:
        MoeifyError: The file holds no text, or the folder no tokenizer.
    """
    try:
        if file.stat().st_size > _MOST:
            raise MoeifyError(f"{file}: is larger than {_MOST:,} bytes; some texts are enough")
        lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise MoeifyError(f"{file}: is no UTF-8 text: {error}") from error
    lines = [line for line in lines if line]
    if not lines:
        raise MoeifyError(f"{file}: holds no text; give a document per line")
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
    taken = inspect.signature(model.forward).parameters
    inputs: dict[str, Any] = {key: value for key, value in batch.items() if key in taken}
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return inputs
