"""A kernel with its types and constants fixed, as it is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One instance of a kernel.

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


def list_names() -> list[str]:
    """Return the names of the lists of cases: one file each in `cases/`."""
    return sorted(path.stem for path in Path(__file__).with_name("cases").glob("*.py"))


def cases_of(name: str) -> list[AotCase]:
    """Return the cases of one list, such as "gate"."""
    found: list[AotCase] = import_module(f"tests.kernels.aot.cases.{name}").cases()
    return found
