"""Instances of the kernels for the grouped products."""

from __future__ import annotations

import torch
import triton

from moeify.kernels.triton.grouped_linear import gradient_kernel, gradient_tile, product_kernel
from moeify.kernels.triton.tile_config import TileConfig, choose
from tests.kernels.aot.case import AotCase, launched


def cases() -> list[AotCase]:
    """Return them with the tiles that launches choose, for large, small and unaligned models."""
    found = []
    for dtype, rows, experts, n, k in (
        (torch.bfloat16, 32768, 128, 2048, 768),
        (torch.bfloat16, 8192, 8, 4096, 14336),
        (torch.bfloat16, 1024, 64, 33, 65),
        (torch.float32, 4096, 8, 768, 3072),
        (torch.float32, 100, 8, 33, 65),
    ):
        name = "fp32" if dtype == torch.float32 else "bf16"
        config = choose(rows, experts, n, k, dtype, torch.device("cpu"))
        for weighted in (False, True):
            found.append(_product_case(name, config, experts, n, k, weighted))
        tile = gradient_tile(rows, experts, torch.empty(0, dtype=dtype))
        values = dict.fromkeys(("grad", "rows", "grad_weight", "grad_bias"), f"*{name}")
        found.append(
            launched(
                gradient_kernel,
                values | {"offsets": "*i32"},
                {"K": k, "N": n, "PRECISION": "ieee", **tile},
                f"{name} {n} x {k}",
            )
        )
    return found


def _product_case(
    name: str, config: TileConfig, experts: int, n: int, k: int, weighted: bool
) -> AotCase:
    types = {
        **dict.fromkeys(("rows", "weight", "bias", "out"), f"*{name}"),
        "offsets": "*i32",
        **dict.fromkeys(("row_count", "m_tiles", "stride_e", "stride_n"), "i32"),
    }
    if weighted:
        types |= {"row_weights": "*fp32", "order": "*i32"}
    return launched(
        product_kernel,
        types,
        {
            **({} if weighted else {"row_weights": None, "order": None}),
            "stride_k": 1,
            "E": experts,
            "EP": triton.next_power_of_2(experts),
            "K": k,
            "N": n,
            "SCATTER": weighted,
            "ZERO_TAIL": not weighted,
            "PRECISION": "ieee",
            **config.launch_options(),
        },
        f"{name} {n} x {k}{' weighted' if weighted else ''}",
    )
