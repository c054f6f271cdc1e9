"""Precision rules that every op shares: what to accumulate in, and how to keep autocast out.

Autocast rewrites the torch calls inside an op's body too, so a router that must stay in float32
has to switch it off there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to accumulate `dtype` values in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocast_enabled(device_type: str) -> bool:
    """Tell whether autocast is on for `device_type`; a device without autocast never has it on."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def without_autocast(tensor: Tensor) -> AbstractContextManager[object]:
    """Return a context in which autocast leaves operations on `tensor`'s device alone."""
    device_type = tensor.device.type
    if not autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
