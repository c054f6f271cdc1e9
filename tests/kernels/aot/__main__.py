"""Ahead-of-time compilation of the Triton kernels for a GPU that need not be present.

`cases/` lists representative instances of each kernel. The interpreter that the tests run under
accepts code which the compiler rejects, and knows no registers, so `python -m tests.kernels.aot`
compiles every case for Hopper and fails where one does not compile, spills registers or needs too
much shared memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from tests.kernels.aot.case import list_names
from tests.kernels.aot.compiling import compile_all, cuobjdump, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile all cases, or those of the lists named, and print the table.

    Returns:
        0, or 1 if a case is not ok, or 2 if nothing can be compiled here.
    """
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.aot", description=__doc__)
    parser.add_argument("lists", nargs="*", help="such as gate; all if none is named")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args(arguments)
    refusal = _refusal(options.lists)
    if refusal:
        sys.stderr.write(f"tests.kernels.aot: {refusal}\n")
        return 2
    results = compile_all(options.lists or list_names(), options.jobs)
    sys.stdout.write(table(results) + "\n")
    return 0 if all(result.ok for result in results) else 1


def _refusal(lists: Sequence[str]) -> str:
    unknown = sorted(set(lists) - set(list_names()))
    if unknown:
        return f"no list {', '.join(unknown)}; there are {', '.join(list_names())}"
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        return "TRITON_INTERPRET is set, and interpreted kernels cannot be compiled; unset it"
    try:
        tool = cuobjdump()
    except ImportError as error:
        return f"Triton is not usable here ({error}); install it"
    return "" if tool.exists() else f"{tool} is missing; install Triton's own wheel"


if __name__ == "__main__":
    sys.exit(main())
