"""Activations that the fused experts compute, with their derivatives, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED = ("gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "relu2", "identity")
"""Names of `moeify.nn.activations` that the `experts` op knows; their order is their number."""


def activate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Return the activated hidden values: [R, F] from [R, F], or from [R, 2F] if gated."""
    if not gated:
        return _value(hidden, activation)
    gate, up = hidden.chunk(2, dim=1)
    return _value(gate, activation) * up


def activate_backward(grad: Tensor, hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Return the gradient of `hidden`, given that of the activated values [R, F]."""
    if not gated:
        return _slope(grad, hidden, activation)
    gate, up = hidden.chunk(2, dim=1)
    return torch.cat([_slope(grad * up, gate, activation), grad * _value(gate, activation)], dim=1)


def _value(x: Tensor, activation: str) -> Tensor:
    match activation:
        case "gelu":
            return F.gelu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "quick_gelu":
            return x * torch.sigmoid(1.702 * x)
        case "silu":
            return F.silu(x)
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case "identity":
            return x
    raise ValueError(f"activation: {activation!r} is not fused; use one of {', '.join(FUSED)}")


def _slope(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    """Return `grad` times the derivative of the activation at `x`."""
    result: Tensor
    match activation:
        case "gelu":
            result = torch.ops.aten.gelu_backward(grad, x)
        case "gelu_tanh":
            result = torch.ops.aten.gelu_backward(grad, x, approximate="tanh")
        case "quick_gelu":
            share = torch.sigmoid(1.702 * x)
            result = grad * share * (1 + 1.702 * x * (1 - share))
        case "silu":
            result = torch.ops.aten.silu_backward(grad, x)
        case "relu":
            result = torch.ops.aten.threshold_backward(grad, x, 0)
        case "relu2":
            result = grad * 2 * F.relu(x)
        case "identity":
            result = grad
        case _:
            raise ValueError(
                f"activation: {activation!r} is not fused; use one of {', '.join(FUSED)}"
            )
    return result
