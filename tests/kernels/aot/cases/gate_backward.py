"""Instances of the kernels for the gate's backward."""

from __future__ import annotations

import torch

from moeify.kernels.gate import SCORES
from moeify.kernels.triton.gate_backward import (
    grad_logits_kernel,
    grad_tokens_kernel,
    grad_weight_kernel,
    logits_sizes,
    product_sizes,
)
from tests.kernels.aot.case import AotCase, launched


def cases() -> list[AotCase]:
    """Return the kernels as launched for small and large routers."""
    floats = dict.fromkeys(
        "grad_scores grad_logits grad_aux grad_z logits grad_out true_out grad parts".split(),
        "*fp32",
    )
    ints = dict.fromkeys(("ids", "totals"), "*i32")
    sizes = dict.fromkeys(("rows", "width", "experts"), "i32")
    found = [
        AotCase(
            kernel=grad_logits_kernel,
            types=floats | ints | sizes,
            constants={"TOP_K": 2, "COUNTED": 2, "SCORE": score, **logits_sizes(experts)},
            note=f"E={experts} {score}",
        )
        for experts in (8, 128, 512)
        for score in SCORES
    ]
    for experts in (8, 128):
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            blocks = product_sizes(experts, dtype)
            pointers = dict.fromkeys(("tokens", "weight", "grad_tokens"), f"*{name}")
            found += [
                launched(
                    kernel,
                    floats | pointers | sizes,
                    {"input_noise": None, "PRECISION": "ieee", **blocks, **length},
                    f"E={experts} {name}",
                )
                for kernel, length in (
                    (grad_tokens_kernel, {"EXPERTS": experts}),
                    (grad_weight_kernel, {"PART": 1024}),
                )
            ]
    return found
