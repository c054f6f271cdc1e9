"""Instances of the kernels for the fused experts' parameter gradients."""

from __future__ import annotations

import torch

from moeify.kernels.triton.experts_wgrad import (
    bias_kernel,
    combine_kernel,
    weight_kernel,
    weight_tile,
)
from tests.kernels.aot.case import AotCase, launched


def cases() -> list[AotCase]:
    """Return them with the tiles that launches choose, for large, small and unaligned models."""
    found = []
    for dtype, rows, experts, n, m, gathered in (
        (torch.bfloat16, 8192, 8, 4096, 14336, "left"),
        (torch.bfloat16, 32768, 128, 1536, 2048, "right"),
        (torch.bfloat16, 8192, 8, 4095, 14335, "right"),
        (torch.float32, 4096, 8, 768, 3072, "left"),
        (torch.float32, 4096, 8, 6144, 768, "right"),
        (torch.float32, 100, 8, 33, 65, "left"),
    ):
        name = "fp32" if dtype == torch.float32 else "bf16"
        left = gathered == "left"
        config = weight_tile(rows, experts, dtype, torch.device("cpu"))
        indices = {"order": "*i32", "offsets": "*i32"}
        note = f"{name} {n} x {m}, gathered {gathered}"
        found += [
            launched(
                weight_kernel,
                indices | dict.fromkeys(("left", "right", "out"), f"*{name}"),
                {"K": 2, "N": n, "M": m, "GATHER_LEFT": left, "PRECISION": "ieee", **config},
                note,
            ),
            AotCase(
                kernel=bias_kernel,
                types=indices | dict.fromkeys(("grad", "out"), f"*{name}") | {"weights": "*fp32"},
                constants={"K": 2, "N": n, "GATHERED": left, "BN": 128, "BR": 32},
                num_warps=4,
                num_stages=3,
                note=note,
            ),
        ]
    for name, experts, width, blocks in (("bf16", 128, 4096, 112), ("fp32", 8, 33, 2)):
        types = {"shares": "*fp32", "out": "*fp32", "slots": "*i32", "offsets": "*i32"}
        found.append(
            AotCase(
                kernel=combine_kernel,
                types=types | {"grad": f"*{name}", "down_bias": f"*{name}", "routes": "i32"},
                constants={"K": 2, "OUTPUT": width, "B": blocks, "E": experts, "EP": experts}
                | {"BR": 16, "BO": 128},
                num_stages=3,
                note=f"{name} {width}, {experts} experts",
            )
        )
    return found
