"""Instances of the kernels for assigning routes to rows."""

from __future__ import annotations

from moeify.kernels.triton.assign import (
    BLOCK_R,
    SMALL,
    assign_small_kernel,
    bin_count,
    count_kernel,
    drop_kernel,
    place_kernel,
    scan_kernel,
    small_sizes,
)
from tests.kernels.aot.case import AotCase


def cases() -> list[AotCase]:
    """Return the kernels as launched for few and many experts."""
    ints = dict.fromkeys(
        "ids slots order offsets block_counts before totals kept".split(), "*i32"
    ) | dict.fromkeys("routes tokens experts capacity blocks".split(), "i32")
    found = [
        AotCase(
            kernel=assign_small_kernel,
            types=ints | {"priority": "*fp32"},
            constants={
                "TOP_K": 2,
                "CAPPED": order != "dropless",
                "BINS": bin_count(experts),
                "BLOCK_R": sizes["BLOCK_R"],
                "BLOCK_C": sizes["BLOCK_C"],
            }
            | ({} if order == "priority" else {"priority": None}),
            num_warps=sizes["num_warps"],
            note=f"R<={sizes['BLOCK_R']} E={experts} {order}",
        )
        for routes, experts, order in (
            (16, 8, "dropless"),
            (128, 8, "priority"),
            (SMALL, 64, "dropless"),
            (SMALL, 64, "position"),
            (SMALL, 512, "priority"),
        )
        for sizes in [small_sizes(routes, order != "dropless")]
    ]
    for bins in (16, 128, 1024):
        block = {"BLOCK_R": BLOCK_R, "BINS": bins}
        ranked = {"permutation": None, "TOP_K": 8, **block}
        scan = {"BINS": bins, "BLOCK_B": 128, "BLOCK_E": 16}
        found += [
            AotCase(
                kernel=kernel, types=ints, constants=constants, num_warps=warps, note=f"E<{bins}"
            )
            for kernel, constants, warps in (
                (count_kernel, ranked | {"RANKED": True}, 4),
                (scan_kernel, scan, 4),
                (drop_kernel, ranked, 8),
                (place_kernel, block, 8),
            )
        ]
    return found
