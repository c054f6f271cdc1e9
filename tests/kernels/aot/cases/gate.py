"""Instances of the kernels for the gate."""

from __future__ import annotations

import torch

from moeify.kernels.triton.gate import gate_kernel, gate_sizes, gate_sums_kernel, sum_sizes
from tests.kernels.aot.case import AotCase, launched


def cases() -> list[AotCase]:
    """Return the kernels as launched for small and large routers."""
    gates = [
        _gate_case(rows, experts, top_k, score, noise, *dtypes)
        for rows, experts, top_k, score, noise, *dtypes in (
            (1, 8, 2, "softmax", "none", "bf16", "bf16"),
            (1, 128, 8, "softmax", "none", "bf16", "bf16"),
            (1, 512, 8, "sigmoid", "none", "bf16", "bf16", "fp32"),
            (4096, 8, 2, "softmax", "none", "bf16", "bf16"),
            (4096, 64, 8, "softmax", "none", "bf16", "bf16"),
            (4096, 128, 8, "softmax", "none", "bf16", "bf16"),
            (4096, 256, 8, "sigmoid", "none", "bf16", "bf16", "fp32"),
            (4096, 512, 512, "softmax", "gumbel", "bf16", "bf16", "fp32", "bf16"),
            (1, 8, 1, "softmax", "none", "bf16", "fp32"),
            (4096, 64, 8, "sigmoid", "gumbel", "bf16", "bf16", "fp32", "fp32"),
            (4096, 512, 1, "softmax", "rsample", "bf16", "fp32"),
            (4096, 8, 1, "softmax", "rsample", "bf16", "fp32", "", "fp32"),
            (4096, 8, 2, "softmax", "none", "fp32", "fp32"),
            (4096, 128, 8, "softmax", "gumbel", "fp32", "fp32", "fp32", "fp32"),
            (4096, 512, 8, "sigmoid", "none", "fp32", "fp32", "fp32"),
        )
    ]
    sums = [
        AotCase(
            kernel=gate_sums_kernel,
            types={
                "block_counts": "*i32",
                **dict.fromkeys(("block_shares", "block_sums"), "*fp32"),
                "counts_out": "*i32",
                **dict.fromkeys(("aux_out", "z_out", "entropy_out"), "*fp32"),
                **dict.fromkeys(("rows", "blocks", "experts"), "i32"),
            },
            constants={"COUNTED": 2, "BLOCK_B": sizes["BLOCK_B"], "BLOCK_E": padded},
            num_warps=sizes["num_warps"],
            note=f"E={padded}",
        )
        for padded in (16, 128, 512)
        for sizes in [sum_sizes(padded)]
    ]
    return gates + sums


def _gate_case(
    rows: int,
    experts: int,
    top_k: int,
    score: str,
    noise: str,
    tokens: str,
    weight: str,
    bias: str = "",
    input_noise: str = "",
) -> AotCase:
    left = "fp32" if input_noise else tokens
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    sizes = gate_sizes(rows, experts, dtypes[left], dtypes[weight])
    pointers = {
        "tokens": tokens,
        "weight": weight,
        "bias": bias,
        "input_noise": input_noise,
        "logit_noise": "" if noise == "none" else "fp32",
        **dict.fromkeys(("scores_out", "logits_out", "block_shares", "block_sums"), "fp32"),
        **dict.fromkeys(("ids_out", "block_counts"), "i32"),
    }
    return launched(
        gate_kernel,
        {
            **{name: f"*{kind}" for name, kind in pointers.items() if kind},
            **dict.fromkeys(("rows", "experts"), "i32"),
        },
        {
            **{name: None for name, kind in pointers.items() if not kind},
            "WIDTH": 4096,
            "TOP_K": top_k,
            "SCORE": score,
            "NOISE": noise,
            "FIRST_ONLY": noise != "none",
            "PRECISION": "ieee",
            **sizes,
        },
        f"T={rows} E={experts} K={top_k} {tokens} {weight} {noise}",
    )
