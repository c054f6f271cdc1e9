from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

from moeify import kernels
from tests.kernels.aot import compiling
from tests.kernels.aot.case import AotCase, cases_of, list_names

ROOT = Path(__file__).parents[2]


def run(*arguments, interpret=None):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    command = [sys.executable, "-m", "tests.kernels.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def kernel_id(kernel):
    return kernel.fn.__module__, kernel.fn.__name__


def kernels_of_the_library():
    """Module and name of each kernel that a module of `moeify.kernels` defines."""
    found = set()
    for folder in map(Path, kernels.__path__):
        for path in folder.rglob("*.py"):
            if "@triton.jit" not in path.read_text():
                continue
            parts = path.relative_to(folder).with_suffix("").parts
            module = import_module(".".join((kernels.__name__, *parts)))
            named = [value for name, value in vars(module).items() if name.endswith("_kernel")]
            found |= set(map(kernel_id, named))
    return found


@pytest.mark.thin(2)
@pytest.mark.parametrize("lists", [("rows",), ("assign", "rows")], ids="+".join)
def test_kernels_compile_for_hopper_without_spilling(lists):  # `make test` compiles all of them
    if not compiling.cuobjdump().exists():
        pytest.skip("this Triton comes without cuobjdump")
    assert {"gate", "experts", *lists} <= set(list_names())
    done = run(*lists)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    for name in lists:
        assert sum(kernel.startswith(f"{name}.") for kernel in names) == len(cases_of(name))


def test_every_kernel_has_a_case():
    listed = {kernel_id(case.kernel) for name in list_names() for case in cases_of(name)}
    assert listed
    assert kernels_of_the_library() == listed


def test_interpreted_kernels_are_refused():
    done = run("assign", interpret="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRITON_INTERPRET" in done.stderr


def test_an_unknown_list_is_named():
    done = run("gates")
    assert done.returncode == 2
    assert "no list gates;" in done.stderr
    assert "gate_backward" in done.stderr


def test_spills_large_programs_and_errors_are_not_ok():
    good = compiling.AotResult(kernel="m.k", note="E=8", registers=32)
    spilt = compiling.AotResult(kernel="m.k", note="E=9", registers=255, spill=8)
    large = compiling.AotResult(kernel="m.k", note="E=64", shared=compiling.SHARED_LIMIT + 1)
    broken = compiling.AotResult(kernel="m.k", note="E=0", error="ValueError: arange")
    assert [r.ok for r in (good, spilt, large, broken)] == [True, False, False, False]
    lines = compiling.table([good, spilt, broken]).splitlines()
    assert lines[2].split() == ["m.k", "E=9", "255", "8", "0", "0.0"]
    assert lines[3].split() == ["m.k", "E=0", "failed"]
    assert lines[-1] == "m.k (E=0): ValueError: arange"


def test_a_case_that_does_not_compile_is_a_result(monkeypatch):
    monkeypatch.setattr(compiling, "cases_of", lambda name: [AotCase(kernel=len, types={})])
    found = compiling.compile_case("some", 0)
    assert found.kernel == "some.len"
    assert found.error.startswith("AttributeError: ")
