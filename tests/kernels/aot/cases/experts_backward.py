"""Instances of the kernels for the fused experts' backward."""

from __future__ import annotations

import torch
import triton

from moeify.kernels.elementwise import FUSED
from moeify.kernels.triton.experts_backward import down_backward_kernel, down_backward_tile
from tests.kernels.aot.case import AotCase, launched


def cases() -> list[AotCase]:
    """Return them with the tiles that launches choose, for large, small and unaligned models."""
    found = []
    for dtype, rows, experts, depth, width, act, gated in (
        (torch.bfloat16, 8192, 8, 4096, 14336, "silu", True),
        (torch.bfloat16, 32768, 128, 2048, 768, "gelu", True),
        (torch.bfloat16, 8192, 64, 2048, 8192, "gelu_tanh", False),
        (torch.bfloat16, 64, 64, 33, 65, "quick_gelu", True),
        (torch.bfloat16, 8192, 8, 4095, 14335, "gelu", True),
        (torch.float32, 4096, 8, 768, 3072, "gelu", False),
        (torch.float32, 4096, 8, 768, 3072, "silu", True),
        (torch.float32, 100, 8, 33, 65, "relu2", True),
    ):
        name = "fp32" if dtype == torch.float32 else "bf16"
        config = down_backward_tile(rows, experts, width, depth, dtype, torch.device("cpu"))
        sizes = {"K": 2, "OUTPUT": depth, "E": experts, "EP": triton.next_power_of_2(experts)}
        values = ("grad", "down", "hidden", "grad_hidden", "activated")
        floats = ("weights", "shares")
        found.append(
            launched(
                down_backward_kernel,
                {
                    **dict.fromkeys(values, f"*{name}"),
                    **dict.fromkeys(floats, "*fp32"),
                    **dict.fromkeys(("order", "offsets"), "*i32"),
                    **dict.fromkeys(("stride_e", "stride_o"), "i32"),
                },
                sizes
                | {"stride_f": 1, "F": width, "ACT": FUSED.index(act), "GATED": gated}
                | {"PRECISION": "ieee", **config.launch_options()},
                f"{name} {depth} x {width} {act}{' gated' if gated else ''}",
            )
        )
    return found
