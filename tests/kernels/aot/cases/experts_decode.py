"""Instances of the kernels for the fused experts with few tokens."""

from __future__ import annotations

import torch
import triton

from moeify.kernels.elementwise import FUSED
from moeify.kernels.triton.experts_decode import activate_kernel, output_kernel, weight_block
from tests.kernels.aot.case import AotCase


def cases() -> list[AotCase]:
    """Return them with the tiles that launches choose, for large, small and unaligned models."""
    found = []
    for dtype, experts, top_k, d, f in (
        (torch.bfloat16, 8, 2, 4096, 14336),
        (torch.bfloat16, 128, 8, 2048, 768),
        (torch.bfloat16, 512, 8, 33, 65),
        (torch.float32, 8, 2, 768, 3072),
        (torch.float32, 8, 1, 33, 65),
    ):
        name = "fp32" if dtype == torch.float32 else "bf16"
        shared = {"E": experts, "EP": triton.next_power_of_2(experts), "TOP_K": top_k}
        shared |= {"F": f, "stride_k": 1}
        types = {"slots": "*i32", "offsets": "*i32", "stride_e": "i32", "stride_n": "i32"}
        types |= dict.fromkeys(("tokens", "up", "bias", "down", "out"), f"*{name}")
        types |= {"activated": "*fp32", "weights": "*fp32"}
        for gated in (False, True):
            bn, bk = weight_block(16, d, dtype)
            sizes = {"D": d, "ACT": FUSED.index("gelu"), "GATED": gated, "BN": bn, "BK": bk}
            note = f"{name} {d} x {f}{' gated' if gated else ''}"
            found.append(
                AotCase(kernel=activate_kernel, types=types, constants=shared | sizes, note=note)
            )
        bn, bk = weight_block(8, f, dtype)
        sizes = {"N": d, "BN": bn, "BK": bk}
        note = f"{name} {f} x {d}"
        found.append(
            AotCase(kernel=output_kernel, types=types, constants=shared | sizes, note=note)
        )
    return found
