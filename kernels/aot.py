"""Ahead-of-time compilation of the Triton kernels for a GPU that need not be there.

Each `*_triton` module lists representative instances of its kernels in `aot_cases()`. The
interpreter that the tests run under accepts code which the compiler rejects, and knows no
registers, so `python -m moeify.kernels.aot` compiles every case for Hopper and fails where one
does not compile, spills registers or needs too much shared memory.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

CAPABILITY = 90
"""Compute capability that is compiled for: Hopper."""
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a program can have there."""


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One kernel with its types and constants fixed.

    Args:
        kernel: The `@triton.jit` function.
        types: Triton type of each argument that is not constant: "*bf16", "*i32", "i32", "fp32".
        constants: Value of each `tl.constexpr` argument.
        num_warps: Warps per program.
        num_stages: Depth of software pipelining.
        note: What distinguishes the case, for the table.
    """

    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class AotResult:
    """What one case takes on the GPU, or why it does not compile.

    Args:
        kernel: Module and function.
        note: The case's.
        registers: Per thread.
        spill: Bytes of stack and local memory per thread; more than 0 is a defect.
        shared: Bytes of shared memory per program.
        seconds: Time to compile; near 0 from Triton's cache.
        error: Why it does not compile, or "".
    """

    kernel: str
    note: str
    registers: int = 0
    spill: int = 0
    shared: int = 0
    seconds: float = 0.0
    error: str = ""

    @property
    def ok(self) -> bool:
        """Whether the case compiles, without spilling, and fits."""
        return not self.error and not self.spill and self.shared <= SHARED_LIMIT


def module_names() -> list[str]:
    """Return the names of the `*_triton` modules of this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*_triton.py"))


def cases(module: str) -> list[AotCase]:
    """Return the cases of one module, such as "gate_triton"; none of one that only has parts."""
    listed = getattr(importlib.import_module(f"moeify.kernels.{module}"), "aot_cases", list)
    found: list[AotCase] = listed()
    return found


def compile_case(module: str, index: int) -> AotResult:
    """Compile the case at `index` in `cases(module)`; failures are in the result, not raised."""
    case = cases(module)[index]
    kernel = f"{module}.{case.kernel.__name__}"
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


def compile_all(modules: Sequence[str], jobs: int = 2) -> list[AotResult]:
    """Compile every case of `modules` in `jobs` processes, in order."""
    work = [(name, index) for name in modules for index in range(len(cases(name)))]
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile the cases of all modules, or of those named, and print the table.

    Returns:
        0, or 1 if a case is not ok, or 2 if nothing can be compiled here.
    """
    parser = argparse.ArgumentParser(prog="python -m moeify.kernels.aot", description=__doc__)
    parser.add_argument("modules", nargs="*", help="such as gate_triton; all if none is named")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    refusal = _refusal(options.modules)
    if refusal:
        sys.stderr.write(f"moeify.kernels.aot: {refusal}\n")
        return 2
    results = compile_all(options.modules or module_names(), options.jobs)
    sys.stdout.write(table(results) + "\n")
    return 0 if all(result.ok for result in results) else 1


def _refusal(modules: Sequence[str]) -> str:
    unknown = sorted(set(modules) - set(module_names()))
    if unknown:
        return f"no module {', '.join(unknown)}; there are {', '.join(module_names())}"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it"
    try:
        tool = _cuobjdump()
    except ImportError as error:
        return f"Triton is not usable here ({error}); install it"
    return "" if tool.exists() else f"{tool} is missing; install Triton's own wheel"


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
        command = [str(_cuobjdump()), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no usage: {text!r}")
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def _cuobjdump() -> Path:
    from triton.backends import nvidia

    return Path(nvidia.__path__[0]) / "bin" / "cuobjdump"


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"


if __name__ == "__main__":
    sys.exit(main())
