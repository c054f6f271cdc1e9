"""The fused experts on a CUDA device: Triton or torch's grouped matmul.

A block that was lowered on another device arrives here with that device's choice; it then gets what
`lowering.choose` says for this one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moeify.kernels import experts_grouped_mm
from moeify.kernels.choose import Workload, choose
from moeify.kernels.triton import experts as experts_triton
from moeify.kernels.triton import experts_backward as backward_triton


def experts(tokens: Tensor, weights: Tensor | None, up: Tensor, *rest: Any) -> Any:
    """Run `experts.experts_reference`; see there for arguments and results."""
    _, down, _, _, _, _, activation, *_, kernel = rest
    match _kernel(kernel, tokens, down, activation):
        case "triton":
            return experts_triton.experts(tokens, weights, up, *rest)
        case "grouped_mm":
            return experts_grouped_mm.experts(tokens, weights, up, *rest)
    return NotImplemented


def experts_backward(grad: Tensor, tokens: Tensor, *rest: Any) -> Any:
    """Run `experts.experts_backward_reference`; see there for arguments and results."""
    _, _, down, _, _, _, _, _, activation, *_, kernel = rest
    match _kernel(kernel, tokens, down, activation):
        case "triton":
            return backward_triton.experts_backward(grad, tokens, *rest)
        case "grouped_mm":
            return experts_grouped_mm.experts_backward(grad, tokens, *rest)
    return NotImplemented


def _kernel(asked: str, tokens: Tensor, down: Tensor, activation: str) -> str:
    if asked in ("reference", "triton", "grouped_mm"):
        return asked
    widths = (tokens.shape[1], down.shape[2], down.shape[1])
    work = Workload(device="cuda", dtype=tokens.dtype, widths=widths, activation=activation)
    return choose(work).kernel
