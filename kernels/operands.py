"""What implementations of ops check in their operands, and how they prepare them."""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

FLOATS: Final = (torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of the faster kernels; float64 is left to the references."""


def contiguous(*operands: Any) -> tuple[Any, ...]:
    """Return the operands with every tensor contiguous."""
    return tuple(x.contiguous() if isinstance(x, Tensor) else x for x in operands)
