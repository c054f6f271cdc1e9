"""Compile kernels for a GPU that need not be present, and read the resources they use."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tests.kernels.aot.case import AotCase, cases_of

CAPABILITY = 90
"""Compute capability that is compiled for: Hopper."""
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a program can have there."""


@dataclass(frozen=True, kw_only=True)
class AotResult:
    """What one case uses on the GPU, or why it does not compile."""

    kernel: str  # list and function
    note: str
    registers: int = 0  # per thread
    spill: int = 0  # bytes of stack and local memory per thread; more than 0 is a defect
    shared: int = 0  # bytes of shared memory per program
    seconds: float = 0.0  # to compile; near 0 from Triton's cache
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the case compiles, without spilling, and fits."""
        return not self.error and not self.spill and self.shared <= SHARED_LIMIT


def compile_case(name: str, index: int) -> AotResult:
    """Compile the case at `index` in `cases_of(name)`; failures are in the result, not raised."""
    case = cases_of(name)[index]
    kernel = f"{name}.{case.kernel.__name__}"
    start = time.perf_counter()
    try:
        compiled = _compile(case)
        registers, spill = _usage(compiled.asm["cubin"])
    except Exception as error:
        return AotResult(kernel=kernel, note=case.note, error=_last_line(error))
    return AotResult(
        kernel=kernel,
        note=case.note,
        registers=registers,
        spill=spill,
        shared=compiled.metadata.shared,
        seconds=time.perf_counter() - start,
    )


def compile_all(lists: Sequence[str], jobs: int = 2) -> list[AotResult]:
    """Compile every case of `lists` in `jobs` processes, in order."""
    work = [(name, index) for name in lists for index in range(len(cases_of(name)))]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        return list(pool.map(compile_case, *zip(*work, strict=True))) if work else []


def table(results: Sequence[AotResult]) -> str:
    """Return the results as aligned text, one line a case, and the errors below."""
    rows = [("kernel", "note", "registers", "spill bytes", "shared memory", "seconds")]
    rows += [
        (r.kernel, r.note, "failed", "", "", "")
        if r.error
        else (r.kernel, r.note, str(r.registers), str(r.spill), str(r.shared), f"{r.seconds:.1f}")
        for r in results
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines + [f"{r.kernel} ({r.note}): {r.error}" for r in results if r.error])


def _compile(case: AotCase) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    parameters = case.kernel.params
    signature = {
        p.name: "constexpr" if p.name in case.constants else case.types[p.name] for p in parameters
    }
    # As in a launch with aligned tensors and with widths that are multiples of 16.
    aligned = {
        (p.num,): [["tt.divisibility", 16]]
        for p in parameters
        if signature[p.name].startswith("*")
        or (signature[p.name] in ("i32", "i64") and not p.do_not_specialize)
    }
    source = ASTSource(case.kernel, signature, dict(case.constants), aligned)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=options)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Return the registers, and the bytes of stack and local memory, of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump()), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def cuobjdump() -> Path:
    from triton.backends import nvidia

    return Path(nvidia.__path__[0]) / "bin" / "cuobjdump"


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
