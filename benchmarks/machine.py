"""The hardware that numbers were measured on, and the best that it can do.

A ratio means little without its ceilings, and a ceiling without its processor: `F.linear` may reach
half of what oneDNN does (AMD) or all of it (Intel). So both are measured in the run itself.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

PACKAGES = (
    "torch transformers moeify safetensors triton deepspeed liger_kernel scattermoe numpy".split()
)
INSTRUCTION_SETS = "avx2 avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16 asimd sve".split()
ENVIRONMENT = (
    "OMP_NUM_THREADS OMP_PROC_BIND KMP_AFFINITY MKL_NUM_THREADS THP_MEM_ALLOC_ENABLE "
    "LD_PRELOAD ONEDNN_MAX_CPU_ISA MOEIFY_NATIVE"
).split()
CORES = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []


def describe() -> dict[str, str]:
    """Return processor, caches, cores, memory and versions."""
    fields = _cpu_fields()
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    found = {
        "cpu": f"{fields.get('model name', platform.processor())} "
        f"(family {fields.get('cpu family', '?')}, model {fields.get('model', '?')})",
        "instructions": " ".join(name for name in INSTRUCTION_SETS if name in flags),
        "caches": ", ".join(f"{name} {size // 1024} KiB" for name, size in _caches().items()),
        "cores": str(os.cpu_count()),
        "memory_gib": str(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**30),
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{card.name}, {card.total_memory // 2**30} GiB, CUDA {torch.version.cuda}"
    return found | versions() | environment()


def versions() -> dict[str, str]:
    """Return the versions of torch, of this package and of the peers that are installed."""
    found = {name: _version(name) for name in PACKAGES}
    return {name: value for name, value in found.items() if value}


def label(name: str) -> str:
    """Return a contestant's name in results: DeepSpeed's includes the version, as there are two."""
    version = versions().get("deepspeed") if name.startswith("deepspeed") else None
    return name.replace("deepspeed", f"deepspeed-{version}") if version else name


def environment() -> dict[str, str]:
    """Return the variables that change times: threads, allocator, instruction sets."""
    return {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}


def require(device: str) -> None:
    """Raise SystemExit if there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device here")


def pin(threads: int) -> None:
    """Use that many threads, on as many cores, for the rest of the process."""
    if sys.platform == "linux":
        os.sched_setaffinity(0, CORES[:threads])
    torch.set_num_threads(threads)


def available_bytes(device: str) -> int:
    """Return the free memory of the device."""
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def ceilings(device: str, dtype: torch.dtype, size: int = 2**30) -> dict[str, float]:
    """Measure the best matmul rate, through `F.linear` and oneDNN, and the rate of reading.

    Args:
        device: "cpu" or "cuda".
        dtype: Of the matmuls.
        size: Bytes to read: several times the last cache.

    Returns:
        `linear_gflops`, `onednn_gflops` (CPU only), `read_gbs` and `gemv_gbs` (a matrix-vector
        product, read once), with the threads in use.
    """
    side = 8192 if device == "cuda" else 1024
    x, w = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    big = torch.ones(size // dtype.itemsize, device=device, dtype=dtype).view(-1, 4096)
    words = big.view(torch.int64)
    vector = big[:1].clone()
    flops = 2.0 * side**3
    with torch.no_grad():
        gemv = _best(lambda: F.linear(vector, big), device)
        read = min(gemv, *(_best(op, device) for op in (words.sum, words.amax)))
        found = {
            "linear_gflops": flops / _best(lambda: F.linear(x, w), device) / 1e9,
            "read_gbs": big.nbytes / read / 1e9,
            "gemv_gbs": big.nbytes / gemv / 1e9,
        }
        if device == "cpu" and torch.backends.mkldnn.enabled:
            onednn = torch.ops.mkldnn._linear_pointwise
            taken = _best(lambda: onednn(x, w, None, "none", [], ""), device)
            found["onednn_gflops"] = flops / taken / 1e9
    return found


def stopwatch(device: str) -> Callable[[Callable[[], object]], float]:
    """Return what times one call, in seconds: the wall clock, or CUDA events on the stream."""
    return _timed_on_cuda if device == "cuda" else _timed


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    result = call()
    taken = time.perf_counter() - started
    del result  # freeing is not part of the call
    return taken


def _timed_on_cuda(call: Callable[[], object]) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    result = call()
    end.record()
    torch.cuda.synchronize()
    del result
    return float(start.elapsed_time(end)) / 1000


def _best(call: Callable[[], object], device: str) -> float:
    """Return the median of the faster half: a ceiling is what undisturbed calls reach."""
    clock = stopwatch(device)
    times = sorted(clock(call) for _ in range(12))
    return statistics.median(times[:6])


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _cpu_fields() -> dict[str, str]:
    pairs = (line.split(":", 1) for line in _lines(Path("/proc/cpuinfo")) if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _caches() -> dict[str, int]:
    """Return the bytes of each cache of the first core, by name."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_text(folder / name) for name in ("level", "type", "size"))
        if kind != "Instruction" and size.endswith("K"):
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size[:-1]) * 1024
    return found


def _text(path: Path) -> str:
    return path.read_text().strip() if path.exists() else ""


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []
