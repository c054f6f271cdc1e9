"""Activations that the fused experts compute, with their derivatives, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from moeify.kernels.precision import accumulation_dtype


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


def _identity(x: Tensor) -> Tensor:
    return x


FUNCTIONS: Final[Mapping[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "silu": F.silu,
    "relu": F.relu,
    "relu2": _relu2,
    "identity": _identity,
}
"""The activations of the `experts` op by name."""

FUSED = tuple(FUNCTIONS)
"""Their names; kernels know them by their position here."""


def activate(hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Return the activated hidden values: [R, F] from [R, F], or from [R, 2F] if gated."""
    if not gated:
        return _value(hidden, activation)
    gate, up = hidden.chunk(2, dim=1)
    return _value(gate, activation) * up


def activate_backward(grad: Tensor, hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Return the gradient of `hidden`, given that of the activated values [R, F]."""
    return _backward_with(_slope, grad, hidden, activation, gated)


def activate_backward_formula(grad: Tensor, hidden: Tensor, activation: str, gated: bool) -> Tensor:
    """Return what `activate_backward` returns, by differentiable calls."""
    return _backward_with(_slope_formula, grad, hidden, activation, gated)


def _backward_with(
    slope: Callable[[Tensor, Tensor, str], Tensor],
    grad: Tensor,
    hidden: Tensor,
    activation: str,
    gated: bool,
) -> Tensor:
    if not gated:
        return slope(grad, hidden, activation)
    gate, up = hidden.chunk(2, dim=1)
    return torch.cat([slope(grad * up, gate, activation), grad * _value(gate, activation)], dim=1)


def _value(x: Tensor, activation: str) -> Tensor:
    if activation not in FUNCTIONS:
        raise _not_fused(activation)
    return FUNCTIONS[activation](x)


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
            raise _not_fused(activation)
    return result


def _slope_formula(grad: Tensor, x: Tensor, activation: str) -> Tensor:
    if activation != "silu":
        return _slope(grad, x, activation)
    wide = x.to(accumulation_dtype(x.dtype))  # torch cannot differentiate its `silu_backward`
    share = torch.sigmoid(wide)
    return (grad * (share * (1 + wide * (1 - share)))).to(grad.dtype)


def _not_fused(activation: str) -> ValueError:
    return ValueError(f"activation: {activation!r} is not fused; use one of {', '.join(FUSED)}")
