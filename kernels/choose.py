"""Which implementation of the experts a block gets, and why.

The choice is a pure function of what is known when a model is converted: device, dtype, widths,
activation. Token counts are not known then; within one implementation they decide tile sizes and
the few-token path. A choice holds on devices that can run it: a model that is moved to another
device runs there what `auto` would have chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from moeify.kernels.elementwise import FUSED
from moeify.kernels.operands import FLOATS
from moeify.units import dtype_name

KERNELS: Final = ("auto", "reference", "cpu", "triton", "grouped_mm")
"""What a plan may ask for. `reference` is plain torch op by op; `cpu` the C++ kernels and oneDNN;
`triton` the fused Triton kernels; `grouped_mm` torch's grouped matmul with our gather and combine.
"""

LARGE_EXPERT: Final = 4096 * 4096
"""Elements of a projection from which vendor matmuls are ahead of Triton's on Hopper: there torch's
grouped matmul took 10.2 ms where a plain Triton kernel took 11.5 (VeOmni pull request 460)."""


@dataclass(frozen=True, slots=True)
class Choice:
    """An implementation and the reason for it."""

    kernel: str  # a name of `KERNELS`, never "auto"
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What is known of a block's experts."""

    device: str  # a device type
    dtype: torch.dtype
    widths: tuple[int, ...]  # of all matmul operands: model, expert and output width
    activation: str | None  # None for a module of the model
    dropout: bool = False


def refusal(kernel: str, work: Workload) -> str | None:
    """Return why `kernel` cannot run this work on any device, or None."""
    if kernel in ("auto", "reference"):
        return None
    if work.activation not in FUSED:
        what = "a module of the model's own" if work.activation is None else work.activation
        return f"the activation is {what}, which is not fused"
    if kernel == "triton" and work.dtype not in FLOATS:
        return f"Triton has no matmul for {dtype_name(work.dtype)}"
    if kernel == "grouped_mm":
        if work.dtype not in FLOATS:
            return f"torch's grouped matmul has no {dtype_name(work.dtype)}"
        odd = [w for w in work.widths if w * work.dtype.itemsize % 16]
        if odd:
            name = dtype_name(work.dtype)
            return f"rows of width {odd[0]} are not a multiple of 16 bytes in {name}"
    return None


def choose(work: Workload, asked: str = "auto") -> Choice:
    """Return the implementation for some work, given the plan's choice.

    Raises:
        ValueError: What the plan asks for cannot run this work on any device.
    """
    if asked != "auto":
        reason = refusal(asked, work)
        if reason is not None:
            raise ValueError(f"kernel {asked!r} cannot run here: {reason}; use auto")
        return Choice(asked, "the plan asks for it")
    if (reason := refusal("cpu", work)) is not None:
        return Choice("reference", reason)
    fused = "fused in evaluation; dropout unfuses training" if work.dropout else "fused"
    if work.device == "cuda":
        if (reason := refusal("triton", work)) is not None:
            return Choice("reference", reason)
        large = work.widths[0] * work.widths[1] >= LARGE_EXPERT and work.dtype == torch.bfloat16
        if large and refusal("grouped_mm", work) is None:
            return Choice("grouped_mm", "large bfloat16 experts: the vendor's matmul")
        return Choice("triton", f"{dtype_name(work.dtype)} on CUDA, {fused}")
    if work.device in ("cpu", "meta"):
        return Choice("cpu", f"{dtype_name(work.dtype)} on {work.device}, {fused}")
    return Choice("reference", f"no kernels for {work.device}")
