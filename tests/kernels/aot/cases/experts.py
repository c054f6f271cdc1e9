"""Instances of the kernels for the fused experts' forward."""

from __future__ import annotations

import torch
import triton

from moeify.kernels.elementwise import FUSED
from moeify.kernels.triton.experts import lean_epilogue, sum_kernel, up_kernel
from moeify.kernels.triton.tile_config import choose
from tests.kernels.aot.case import AotCase, launched


def cases() -> list[AotCase]:
    """Return them with the tiles that launches choose, for large, small and unaligned models."""
    found = []
    for dtype, rows, experts, top_k, d, f in (
        (torch.bfloat16, 32768, 128, 8, 2048, 768),
        (torch.bfloat16, 8192, 8, 2, 4096, 14336),
        (torch.bfloat16, 512, 8, 2, 4096, 14336),
        (torch.bfloat16, 256, 8, 2, 4096, 14336),
        (torch.bfloat16, 1024, 64, 1, 33, 65),
        (torch.float32, 4096, 8, 2, 768, 3072),
        (torch.float32, 100, 8, 1, 33, 65),
    ):
        name = "fp32" if dtype == torch.float32 else "bf16"
        for activation, gated in (("gelu", False), ("gelu", True), ("silu", True)):
            found.append(_up_case(name, rows, experts, top_k, d, f, activation, gated))
        found.append(
            AotCase(
                kernel=sum_kernel,
                types={"rows": f"*{name}", "slots": "*i32", "out": f"*{name}"},
                constants={"TOP_K": top_k, "WIDTH": d, "BO": min(triton.next_power_of_2(d), 1024)},
                note=f"{name} {d}",
            )
        )
    return found


def _up_case(
    name: str,
    rows: int,
    experts: int,
    top_k: int,
    d: int,
    f: int,
    activation: str,
    gated: bool,
) -> AotCase:
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    lean = lean_epilogue(activation, gated)
    config = choose(rows, experts, f * (1 + gated), d, dtype, torch.device("cpu"), lean=lean)
    return launched(
        up_kernel,
        {
            **dict.fromkeys(("tokens", "up", "bias", "activated", "hidden"), f"*{name}"),
            **dict.fromkeys(("order", "offsets"), "*i32"),
            **dict.fromkeys(("row_count", "m_tiles", "stride_e", "stride_n"), "i32"),
        },
        {
            "stride_k": 1,
            "E": experts,
            "EP": triton.next_power_of_2(experts),
            "TOP_K": top_k,
            "D": d,
            "F": f,
            "ACT": FUSED.index(activation),
            "GATED": gated,
            "PRECISION": "ieee",
            **config.launch_options(),
        },
        f"{name} {d} x {f} {'gated ' if gated else ''}{activation}",
    )
