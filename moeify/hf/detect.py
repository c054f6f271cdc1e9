"""Recognise Hugging Face models by their config and signature, without importing transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeify.errors import CaptureError
from moeify.hf.example_inputs import make_inputs


def is_hf(model: nn.Module) -> bool:
    """Tell whether a model looks like a Hugging Face one: a config and a main input."""
    return hasattr(model, "config") and isinstance(getattr(model, "main_input_name", None), str)


def example_inputs_for(model: nn.Module) -> dict[str, Any]:
    """Make small inputs for a Hugging Face model from its config and signature.

    Raises:
        CaptureError: It is not one, or its inputs are of an unknown kind.
    """
    if not is_hf(model):
        raise CaptureError(
            f"{type(model).__name__} is not a Hugging Face model: give example_inputs, a dict of "
            "keyword arguments, a tuple of positional ones, or a tensor"
        )
    return make_inputs(model)
