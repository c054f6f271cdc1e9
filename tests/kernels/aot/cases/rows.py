"""Instances of the kernels for moving rows."""

from __future__ import annotations

from moeify.kernels.triton.rows import (
    choice_block,
    combine_backward_kernel,
    combine_kernel,
    combine_weights_backward_kernel,
    combine_weights_kernel,
    dispatch_kernel,
    row_block,
)
from tests.kernels.aot.case import AotCase


def cases() -> list[AotCase]:
    """Return the kernels as launched for narrow and wide models."""
    found = []
    index = dict.fromkeys(("order", "slots"), "*i32")
    sizes = dict.fromkeys(("rows", "routes", "width"), "i32")
    wide = ("tokens", "hidden", "out", "grad", "grad_hidden")
    narrow = dict.fromkeys(("weights", "grad_weights", "scores"), "*fp32")
    for width, kind in ((64, "bf16"), (4096, "bf16"), (4096, "fp32")):
        types = dict.fromkeys(wide, f"*{kind}") | narrow | index | sizes
        rows, columns = row_block(width)
        for kernel, block in (
            (dispatch_kernel, "BLOCK_R"),
            (combine_kernel, "BLOCK_T"),
            (combine_backward_kernel, "BLOCK_R"),
        ):
            constants = {"TOP_K": 8, block: rows, "BLOCK_D": columns}
            if kernel is combine_backward_kernel:
                constants["WIDTH"] = width
            note = f"D={width} {kind}"
            found.append(AotCase(kernel=kernel, types=types, constants=constants, note=note))
    for top_k, mode in ((1, "straight_through"), (8, "sum"), (512, "straight_through")):
        types = dict.fromkeys(("out", "grad"), "*fp32") | narrow | index | sizes
        rows, columns = choice_block(top_k)
        blocks = {"TOP_K": top_k, "BLOCK_T": rows, "BLOCK_K": columns}
        note = f"K={top_k}"
        weighing = blocks | {"COMBINE": mode}
        found += [
            AotCase(kernel=combine_weights_kernel, types=types, constants=weighing, note=note),
            AotCase(
                kernel=combine_weights_backward_kernel,
                types=types,
                constants=blocks | {"NORMALIZED": True},
                note=note,
            ),
        ]
    return found
