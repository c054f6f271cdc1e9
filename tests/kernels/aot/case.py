"""A kernel with its types and constants fixed, as it is compiled ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class AotCase:
    """One instance of a kernel."""

    kernel: Any  # the `@triton.jit` function
    types: Mapping[str, str]  # of each argument that is not constant: "*bf16", "*i32", "i32"
    constants: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2
    note: str = ""  # what distinguishes the case, for the table


def launched(
    kernel: Any, types: Mapping[str, str], options: Mapping[str, Any], note: str
) -> AotCase:
    """Return the case of a launch with `options`: constants, `num_warps` and `num_stages`."""
    constants = dict(options)
    launch = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in options}
    return AotCase(kernel=kernel, types=types, constants=constants, note=note, **launch)


def list_names() -> list[str]:
    """Return the names of the lists of cases: one file each in `cases/`."""
    return sorted(path.stem for path in Path(__file__).with_name("cases").glob("*.py"))


def cases_of(name: str) -> list[AotCase]:
    """Return the cases of one list, such as "gate"."""
    found: list[AotCase] = import_module(f"tests.kernels.aot.cases.{name}").cases()
    return found
