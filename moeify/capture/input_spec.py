"""Describe example inputs by shape and dtype, and make inputs of the same form again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from moeify.units import dtype_from_name, dtype_name

MAX_ELEMENTS: Final = 1 << 28
"""Most elements that example inputs may have."""


def describe_inputs(value: Any) -> Any:
    """Return JSON-able data that describes nested inputs, without the values of tensors."""
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
    """Return inputs of a described form, filled with zeros (masks with ones).

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


def describable(description: Any) -> bool:
    """Tell whether inputs of this description can be made again, from JSON."""
    try:
        check_description(description)
        json.dumps(description, allow_nan=False)
    except (ValueError, TypeError, LookupError, RecursionError):
        return False
    return True


def check_description(description: Any) -> None:
    """Check that a description is well formed and its inputs are of a sensible size.

    Raises:
        ValueError, TypeError, LookupError: It is not.
    """
    if not isinstance(description, dict) or len(description) != 1:
        raise ValueError("a description has one key")
    kind, content = next(iter(description.items()))
    if kind == "tensor":
        shape = content["shape"]
        dtype_from_name(str(content["dtype"]))
        if not all(type(n) is int and n >= 0 for n in shape) or math.prod(shape) > MAX_ELEMENTS:
            raise ValueError(f"{shape!r:.80} is not a shape for an example")
    elif kind == "dict":
        for part in dict(content).values():
            check_description(part)
    elif kind == "tuple":
        for part in list(content):
            check_description(part)
    elif kind != "value" or not (content is None or isinstance(content, bool | int | float | str)):
        raise ValueError(f"{kind!r:.40}: {content!r:.80} cannot be made again")
