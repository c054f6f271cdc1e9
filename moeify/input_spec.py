"""Describe example inputs by shape and dtype, and make inputs of the same form again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moeify.units import dtype_from_name, dtype_name


def describe_inputs(value: Any) -> Any:
    """Return JSON-able data that describes nested inputs; values of tensors are not kept."""
    if isinstance(value, Tensor):
        return {"tensor": {"shape": list(value.shape), "dtype": dtype_name(value.dtype)}}
    if isinstance(value, Mapping):
        return {"dict": {str(key): describe_inputs(part) for key, part in value.items()}}
    if isinstance(value, list | tuple):
        return {"tuple": [describe_inputs(part) for part in value]}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    return {"unknown": type(value).__name__}


def make_inputs(description: Any) -> Any:
    """Return inputs of a described form, filled with zeros (ones for masks of int64 or bool).

    Raises:
        ValueError: The description holds something that cannot be made.
    """
    kind, content = next(iter(description.items()))
    if kind == "tensor":
        return torch.zeros(content["shape"], dtype=dtype_from_name(content["dtype"]))
    if kind == "dict":
        made = {key: make_inputs(part) for key, part in content.items()}
        for key, part in made.items():
            if "mask" in key and isinstance(part, Tensor):
                part.fill_(1)
        return made
    if kind == "tuple":
        return tuple(make_inputs(part) for part in content)
    if kind == "value":
        return content
    raise ValueError(f"the example inputs hold a {content}, which cannot be made again")
