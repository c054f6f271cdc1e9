from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("triton")

from moeify.kernels import aot

ROOT = Path(__file__).parents[2]


def run(*arguments, interpret=None):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret is not None:
        environment["TRITON_INTERPRET"] = interpret
    command = [sys.executable, "-m", "moeify.kernels.aot", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_kernels_compile_for_hopper_without_spilling():  # `make test` compiles all of them
    if not aot._cuobjdump().exists():
        pytest.skip("this Triton comes without cuobjdump")
    modules = ("assign_triton", "rows_triton")
    assert {"gate_triton", "experts_triton", *modules} <= set(aot.module_names())
    done = run(*modules)
    assert done.returncode == 0, done.stdout + done.stderr
    names = [line.split()[0] for line in done.stdout.splitlines()[1:]]
    for module in modules:
        assert sum(name.startswith(f"{module}.") for name in names) == len(aot.cases(module))


def test_every_kernel_has_a_case():
    listed, found = set(), set()
    for module in aot.module_names():
        listed |= {case.kernel.__name__ for case in aot.cases(module)}
        found |= {
            n for n in vars(import_module(f"moeify.kernels.{module}")) if n.endswith("_kernel")
        }
    assert listed
    assert found <= listed


def test_interpreted_kernels_are_refused():
    done = run("assign_triton", interpret="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRITON_INTERPRET" in done.stderr


def test_an_unknown_module_is_named():
    done = run("gate")
    assert done.returncode == 2
    assert "no module gate;" in done.stderr
    assert "gate_triton" in done.stderr


def test_spills_large_programs_and_errors_are_not_ok():
    good = aot.AotResult(kernel="m.k", note="E=8", registers=32)
    spilt = aot.AotResult(kernel="m.k", note="E=9", registers=255, spill=8)
    large = aot.AotResult(kernel="m.k", note="E=64", shared=aot.SHARED_LIMIT + 1)
    broken = aot.AotResult(kernel="m.k", note="E=0", error="ValueError: arange")
    assert [r.ok for r in (good, spilt, large, broken)] == [True, False, False, False]
    lines = aot.table([good, spilt, broken]).splitlines()
    assert lines[2].split() == ["m.k", "E=9", "255", "8", "0", "0.0"]
    assert lines[3].split() == ["m.k", "E=0", "failed"]
    assert lines[-1] == "m.k (E=0): ValueError: arange"


def test_a_case_that_does_not_compile_is_a_result(monkeypatch):
    monkeypatch.setattr(aot, "cases", lambda module: [aot.AotCase(kernel=len, types={})])
    found = aot.compile_case("some_triton", 0)
    assert found.kernel == "some_triton.len"
    assert found.error.startswith("AttributeError: ")
