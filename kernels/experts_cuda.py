"""The fused experts on a CUDA device: Triton or torch's grouped matmul.

A block that was lowered on another device arrives here with that device's choice; it then gets what
`choose.choose` says for this one.
"""

from __future__ import annotations

from typing import Any

from moeify.kernels import experts_grouped_mm
from moeify.kernels.choose import Workload, choose
from moeify.kernels.experts import BackwardCall, ExpertsCall
from moeify.kernels.triton import experts as experts_triton
from moeify.kernels.triton import experts_backward as backward_triton


def experts(*args: Any) -> Any:
    """Run `experts_reference` by the implementation that suits the call."""
    match _kernel(ExpertsCall(*args)):
        case "triton":
            return experts_triton.experts(*args)
        case "grouped_mm":
            return experts_grouped_mm.experts(*args)
    return NotImplemented


def experts_backward(*args: Any) -> Any:
    """Run `experts_backward_reference` by the implementation that suits the call."""
    match _kernel(BackwardCall(*args)):
        case "triton":
            return backward_triton.experts_backward(*args)
        case "grouped_mm":
            return experts_grouped_mm.experts_backward(*args)
    return NotImplemented


def _kernel(call: ExpertsCall | BackwardCall) -> str:
    if call.kernel in ("reference", "triton", "grouped_mm"):
        return call.kernel
    widths = (call.tokens.shape[1], call.down.shape[2], call.down.shape[1])
    dtype, activation = call.tokens.dtype, call.activation
    return choose(Workload(device="cuda", dtype=dtype, widths=widths, activation=activation)).kernel
