"""Measure tile sizes of the grouped Triton kernels on this GPU and keep the best in the table.

    python -m benchmarks.tune --dtype bfloat16 --shape 4096 14336 8

For each product of a layer (up: F x D, down: D x F) and each bucket of rows per expert, every
candidate that compiles without an error is timed on the same random rows; the fastest goes into
`kernels/triton/tile_table.json`, over an older entry for the same device and size.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import torch

TABLE = Path(__file__).parents[1] / "kernels" / "triton" / "tile_table.json"
BUCKETS = (16, 32, 64, 128, 256, 512, 1024)


def candidates(rows: int, dtype: torch.dtype) -> Iterator[object]:
    """Yield tile configurations worth trying for a bucket of rows per expert."""
    from moeify.kernels.triton.tile_config import TileConfig

    wide = dtype == torch.float32
    heights = [bm for bm in (16, 32, 64, 128) if bm <= max(rows, 16)][-2:]
    for bm, bn, bk in itertools.product(heights, (64, 128, 256), (32, 64, 128)):
        if bm * bn > (64 * 64 if wide else 128 * 256):
            continue
        for warps, stages in itertools.product((4, 8), (2, 3, 4, 5)):
            yield TileConfig(bm=bm, bn=bn, bk=bk, warps=warps, stages=stages, group=8)


def fastest(rows: int, experts: int, n: int, k: int, dtype: torch.dtype) -> tuple[object, float]:
    """Return the best configuration for a grouped product, and its milliseconds."""
    from triton.testing import do_bench

    from moeify.kernels.triton import grouped_linear

    torch.manual_seed(0)
    x = torch.randn(rows * experts, k, device="cuda", dtype=dtype)
    weight = torch.randn(experts, n, k, device="cuda", dtype=dtype)
    ends = torch.arange(1, experts + 1, device="cuda", dtype=torch.int32) * rows
    times = {}
    for config in candidates(rows, dtype):
        with mock.patch.object(grouped_linear, "choose", lambda *_, c=config, **__: c):
            try:
                run = lambda: grouped_linear.grouped_linear(x, weight, None, ends)  # noqa: E731
                times[config] = do_bench(run, warmup=5, rep=30)
            except Exception as error:
                print(f"    {config}: {type(error).__name__}")
    best = min(times, key=times.__getitem__)
    return best, times[best]


def main() -> int:
    """Tune the shapes of the command line; return 1 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--shape", type=int, nargs=3, metavar=("D", "F", "E"), required=True)
    parser.add_argument("--buckets", type=int, nargs="+", default=BUCKETS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("there is no CUDA device to tune for")
        return 1
    from moeify.kernels.triton.tile_config import parse_table

    device, dtype = torch.cuda.get_device_name(), getattr(torch, options.dtype)
    width, hidden, experts = options.shape
    for bucket, (n, k) in itertools.product(
        options.buckets, ((2 * hidden, width), (width, hidden))
    ):
        config, took = fastest(bucket, experts, n, k, dtype)
        rate = 2 * bucket * experts * n * k / took / 1e9
        print(f"{bucket:5} rows per expert, {n} x {k}: {took:.3f} ms, {rate:.0f} TFLOP/s {config}")
        key = {"device": device, "dtype": options.dtype, "bucket": bucket, "n": n, "k": k}
        old = json.loads(TABLE.read_text())["entries"]
        entries = [e for e in old if any(e[name] != value for name, value in key.items())]
        text = json.dumps({"entries": [*entries, key | asdict(config)]}, indent=1) + "\n"
        parse_table(text)
        TABLE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
