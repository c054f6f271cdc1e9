"""What moeify knows of Hugging Face models, by their config and signature; never by their class.

transformers itself is not imported here.
"""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from moeify.errors import CaptureError, MoeifyError

LENGTH = 8


def is_hf(model: nn.Module) -> bool:
    """Tell whether a model looks like a Hugging Face one: a config and a main input."""
    return hasattr(model, "config") and isinstance(getattr(model, "main_input_name", None), str)


def example_inputs_for(model: nn.Module) -> dict[str, Any]:
    """Make small inputs for a Hugging Face model from its config and signature.

    Raises:
        CaptureError: It is no such model, or its inputs are of an unknown kind.
    """
    if not is_hf(model):
        raise CaptureError(
            f"{type(model).__name__} is no Hugging Face model: give example_inputs, a dict of "
            "keyword arguments, a tuple of positional ones, or a tensor"
        )
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    inputs: dict[str, Any] = {}
    generator = torch.Generator().manual_seed(0)
    for name in ("input_ids", "pixel_values", "input_features", "input_values"):
        if name in parameters and (name == str(model.main_input_name) or _required(model, name)):
            inputs[name] = _make(name, config, generator)
    if not inputs:
        raise CaptureError(
            f"{type(model).__name__} takes {model.main_input_name!r}, which moeify cannot make up: "
            "give example_inputs"
        )
    if "input_ids" in inputs and "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        inputs["decoder_input_ids"] = _ids(config, generator)
    if "use_cache" in parameters or hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _required(model: nn.Module, name: str) -> bool:
    """Tell whether a second modality is needed: the config has a part for it."""
    config: Any = model.config
    if name == "pixel_values":
        return hasattr(config, "vision_config") and hasattr(config, "text_config")
    if name == "input_ids":
        return hasattr(config, "text_config")
    return False


def _of(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first attribute that a config or one of its parts has."""
    parts = [getattr(config, p, None) for p in ("text_config", "vision_config", "audio_config")]
    for part in (config, *parts):
        for name in names:
            value = getattr(part, name, None) if part is not None else None
            if value is not None:
                return value
    return default


def _ids(config: Any, generator: torch.Generator) -> Tensor:
    size = int(_of(config, "vocab_size", default=100))
    special = {_of(config, f"{k}_token_id") for k in ("pad", "bos", "eos")}
    low = min(3, size - 1)
    ids = torch.randint(low, size, (2, LENGTH), generator=generator)
    for token in special:
        if isinstance(token, int):
            ids[ids == token] = low if low != token else max(low - 1, 0)
    return ids


def _make(name: str, config: Any, generator: torch.Generator) -> Tensor:
    if name == "input_ids":
        return _ids(config, generator)
    if name == "pixel_values":
        size = _of(config, "image_size", default=32)
        height, width = size if isinstance(size, list | tuple) else (size, size)
        channels = _of(config, "num_channels", default=3)
        return torch.randn(2, channels, height, width, generator=generator)
    if name == "input_features":
        frames = 2 * int(_of(config, "max_source_positions", default=50))
        bins = int(_of(config, "num_mel_bins", "input_feat_per_channel", default=80))
        return torch.randn(2, bins, frames, generator=generator)
    return torch.randn(2, 4000, generator=generator)


def guard(model: nn.Module) -> None:
    """Make `save_pretrained` of a converted model raise: its output would load as a dense model."""
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = refuse_save_pretrained


def unguard(model: nn.Module) -> None:
    """Give `save_pretrained` back."""
    model.__dict__.pop("save_pretrained", None)


def refuse_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for `save_pretrained` on a converted model.

    Raises:
        MoeifyError: Always; it says what to call instead.
    """
    raise MoeifyError(
        "save_pretrained would write a model that loads as a dense one with random MLPs; use "
        "moeify.save(model, directory), and moeify.load(directory) to read it"
    )
