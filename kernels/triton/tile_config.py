"""Tile sizes of the grouped Triton kernels: measured ones where there are any, else a heuristic.

`tile_table.json` holds what was measured, as `{"entries": [...]}`. An entry is an object with
exactly these keys:

- `device`: the name `torch.cuda.get_device_name` gives, such as "NVIDIA H200";
- `dtype`: "float32", "float16" or "bfloat16";
- `bucket`: rows per expert, as `bucket` rounds them;
- `n`, `k`: output and input width of the product;
- `bm`, `bn`, `bk`, `warps`, `stages`, `group`: the fields of `TileConfig`.

Sizes depend on the bucket and never on the exact number of rows, so that a changing batch compiles
a handful of variants and no more.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from moeify.units import dtype_name

_TABLE = Path(__file__).with_name("tile_table.json")
_LARGEST_BUCKET = 1024
_HOPPER_SHARED = 228 * 1024
_DTYPES = ("float32", "float16", "bfloat16")

Key = tuple[str, str, int, int, int]


@dataclass(frozen=True, kw_only=True)
class TileConfig:
    """How a grouped kernel cuts its work."""

    bm: int  # rows of a tile
    bn: int  # columns of a tile
    bk: int  # step in depth
    warps: int  # per program
    stages: int  # loads in flight
    group: int  # row tiles that share a column tile before the next one starts

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if type(value) is not int or value < 1:
                raise ValueError(f"{field.name}: {value!r} is not a positive integer")
        for name in ("bm", "bn", "bk", "warps"):
            value = getattr(self, name)
            if value & (value - 1):
                raise ValueError(f"{name}: {value} is not a power of two")
        if min(self.bm, self.bn, self.bk) < 16:
            raise ValueError(
                f"a tile of {self.bm} x {self.bn} x {self.bk}: each must be at least 16"
            )

    def launch_options(self) -> dict[str, int]:
        """Return the arguments of a launch that the configuration decides."""
        return {
            "BM": self.bm,
            "BN": self.bn,
            "BK": self.bk,
            "GROUP": self.group,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def programs(self, itemsize: int, shared: int) -> int:
        """Return about how many programs fit a multiprocessor with `shared` bytes of memory."""
        threads = 32 * self.warps
        registers = min(255, 80 + 2 * self.bm * self.bn // threads)
        needed = self.stages * (self.bm + self.bn) * self.bk * itemsize
        return max(1, min(65536 // (threads * registers), shared // needed))


def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory of a multiprocessor; Hopper's for other devices."""
    if device.type != "cuda":
        return _HOPPER_SHARED
    size: int = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return size


def fitting_stages(most: int, step: int, shared: int) -> int:
    """Return how many loads of `step` bytes fit three quarters of `shared`, 1 to `most`."""
    return max(1, min(most, shared * 3 // 4 // step))


def bucket(rows: int, experts: int) -> int:
    """Return the average rows per expert, rounded up to a power of two between 16 and 1024."""
    average = -(-rows // max(experts, 1))
    return min(max(16, 1 << max(average - 1, 0).bit_length()), _LARGEST_BUCKET)


def choose(
    rows: int,
    experts: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    lean: bool = False,
) -> TileConfig:
    """Return the tile sizes of a grouped product [rows, k] x [experts, n, k].

    `lean` leaves registers to a long epilogue: at most 64 accumulators a thread, not 128. A device
    that is not CUDA gets the heuristic.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    shape = (bucket(rows, experts), n, k)
    return _choose(name, shared_memory(device), dtype_name(dtype), *shape, lean)


def parse_table(text: str) -> dict[Key, TileConfig]:
    """Return the measured configurations of a table by device, dtype, bucket, n and k.

    Raises:
        ValueError: An entry has other keys, or a value that is not allowed.
    """
    document = json.loads(text)
    if not isinstance(document, dict) or not isinstance(document.get("entries"), list):
        raise ValueError('tile table: not an object with a list "entries"')
    table: dict[Key, TileConfig] = {}
    for number, entry in enumerate(document["entries"]):
        try:
            key, config = _parse_entry(entry)
        except ValueError as error:
            raise ValueError(f"tile table: entry {number}: {error}") from None
        if key in table:
            raise ValueError(f"tile table: entry {number}: {key} appears twice")
        table[key] = config
    return table


def _parse_entry(entry: Any) -> tuple[Key, TileConfig]:
    key_types = {"device": str, "dtype": str, "bucket": int, "n": int, "k": int}
    names = [field.name for field in fields(TileConfig)]
    if not isinstance(entry, Mapping) or set(entry) != {*key_types, *names}:
        raise ValueError(f"the keys must be {', '.join([*key_types, *names])}")
    for name, kind in key_types.items():
        if type(entry[name]) is not kind:
            raise ValueError(f"{name}: {entry[name]!r} is not of type {kind.__name__}")
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"dtype: {entry['dtype']!r} is not one of {', '.join(_DTYPES)}")
    if entry["bucket"] != bucket(entry["bucket"], 1):
        raise ValueError(f"bucket: {entry['bucket']} is not a bucket")
    key = (entry["device"], entry["dtype"], entry["bucket"], entry["n"], entry["k"])
    return key, TileConfig(**{name: entry[name] for name in names})


@functools.cache
def _table() -> dict[Key, TileConfig]:
    return parse_table(_TABLE.read_text(encoding="utf-8"))


@functools.cache
def _choose(
    device: str, shared: int, dtype: str, rows: int, n: int, k: int, lean: bool
) -> TileConfig:
    measured = _table().get((device, dtype, rows, n, k))
    return measured or _heuristic(shared, dtype, rows, n, k, lean)


def _heuristic(shared: int, dtype: str, rows: int, n: int, k: int, lean: bool) -> TileConfig:
    """Return sizes that compile without spills and fit into the shared memory."""
    wide = dtype == "float32"  # no tensor cores unless in TF32: small tiles, many threads
    itemsize = 4 if wide else 2
    bm = min(rows, 64 if wide else 128)
    bn = _fitting(n, 64 if wide else 128 if bm < 128 or lean else 256)
    bk = _fitting(k, 32 if wide else 64 if bm > 32 else 128)
    if n * itemsize % 16 or k * itemsize % 16:  # masked, unaligned loads take registers
        bm, bn, bk = min(bm, 64), min(bn, 64), min(bk, 32)
    while bn > 64 and fitting_stages(2, (bm + bn) * bk * itemsize, shared) < 2:
        bn //= 2
    stages = fitting_stages(3 if wide else 4, (bm + bn) * bk * itemsize, shared)
    warps = 8 if bm * bn >= (64 * 64 if wide else 128 * 128) else 4
    return TileConfig(bm=bm, bn=bn, bk=bk, warps=warps, stages=stages, group=8)


def _fitting(width: int, most: int) -> int:
    """Return the power of two that covers `width`, between 16 and `most`."""
    return min(most, max(16, 1 << max(width - 1, 0).bit_length()))
