"""Compiled libraries: only this user's own, and only as they were built."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from moeify.kernels.cpu import cache, compile

SOURCE = 'extern "C" long answer() { return %d; }'

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    cache.folder.cache_clear()
    yield tmp_path / "cache" / "moeify" / "kernels"
    cache.folder.cache_clear()


@pytest.fixture
def builds(monkeypatch):
    """The libraries that were built."""
    seen: list[Path] = []
    real = cache._build

    def build(source: str, library: Path) -> None:
        seen.append(library)
        real(source, library)

    monkeypatch.setattr(cache, "_build", build)
    return seen


def answer(number: int) -> int:
    found = cache.load(SOURCE % number).answer
    found.restype = ctypes.c_int64
    return found()


def test_a_library_is_built_once_into_a_private_folder(home, builds):
    assert [answer(1), answer(1), answer(2)] == [1, 1, 2]
    assert len(builds) == 2
    assert {path.parent for path in builds} == {home}
    assert home.stat().st_mode & 0o077 == 0
    assert home.parent.stat().st_mode & 0o077 == 0
    assert sorted(p.suffix for p in home.iterdir()) == sorted([".lock", ".sha256", ".so"] * 2)


@pytest.mark.parametrize("damage", ["empty", "half", "other", "no digest", "empty digest"])
def test_what_is_not_whole_is_built_again(damage, home, builds):
    number = 10 + len(damage)
    cache._build(SOURCE % number, library := _path_of(SOURCE % number))
    if damage == "empty":
        library.write_bytes(b"")
    elif damage == "half":
        library.write_bytes(library.read_bytes()[:4000])
    elif damage == "other":  # a library that works, and was not built here from this source
        cache._build(SOURCE % 99, other := home / "other.so")
        other.replace(library)
    elif damage == "no digest":
        library.with_suffix(".sha256").unlink()
    else:
        library.with_suffix(".sha256").write_text("")
    builds.clear()
    assert answer(number) == number
    assert builds == [library]


def _path_of(source: str) -> Path:
    key = cache.hashlib.sha256("\0".join([source, *cache._facts()]).encode()).hexdigest()[:32]
    return cache.folder() / f"{key}.so"


def _open(folder: Path) -> None:
    folder.chmod(0o777)


def _open_above(folder: Path) -> None:
    folder.parent.chmod(0o770)


def _link(folder: Path) -> None:
    folder.rename(folder.parent / "elsewhere")
    folder.symlink_to("elsewhere")


def _a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


@pytest.mark.parametrize("spoil", [_open, _open_above, _link, _a_file])
def test_a_folder_that_others_can_write_to_is_not_read(spoil, home, builds, caplog):
    assert answer(20) == 20
    spoil(home)
    cache.folder.cache_clear()
    builds.clear()
    assert answer(20) == 20
    assert len(builds) == 1
    assert builds[0].parent != home
    assert builds[0].parent.stat().st_mode & 0o077 == 0
    assert "every process compiles its own" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_not_read(home, builds, caplog):
    assert answer(21) == 21
    os.chown(home, 12345, 12345)
    cache.folder.cache_clear()
    assert answer(21) == 21
    assert builds[-1].parent != home
    assert "belongs to another user" in caplog.text


def test_without_a_home_each_process_has_its_own(tmp_path, monkeypatch, builds):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    cache.folder.cache_clear()
    assert answer(22) == 22
    assert builds[0].parent.name.startswith("moeify-")
    cache.folder.cache_clear()


def _compiler(folder: Path, script: str) -> Path:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def _start(number: int, home: Path, compiler: Path | None = None) -> subprocess.Popen[str]:
    code = f"""
        import ctypes
        from moeify.kernels.cpu import cache
        print(cache.load({SOURCE % number!r}).answer())
    """
    environment = {**os.environ, "XDG_CACHE_HOME": str(home.parent.parent)}
    if compiler is not None:
        environment["CXX"] = str(compiler)
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_a_compiler_that_is_killed_leaves_nothing_behind(home, tmp_path):
    # It has written a part of the library, and takes its parent with it.
    script = 'for a; do case $a in *.so) printf "\\177ELF" > "$a";; esac; done; kill -9 $PPID'
    died = _start(30, home, _compiler(tmp_path, script))
    died.communicate()
    assert died.returncode == -9
    assert not list(home.glob("*.so"))
    after = _start(30, home)
    assert after.communicate()[0] == "30\n"
    assert len(list(home.glob("*.so"))) == 1


def test_a_compiler_that_fails_is_told_and_tried_again(home, tmp_path, caplog, monkeypatch):
    broken = str(_compiler(tmp_path, "echo error: no space left >&2; exit 1"))
    compile.library.cache_clear()
    try:
        with monkeypatch.context() as patch:
            patch.setattr(cache, "cpp_command", lambda source, target: [broken])
            assert compile.library("rows") is None
        assert "no space left" in caplog.text
        compile.library.cache_clear()
        assert compile.library("rows") is not None
    finally:
        compile.library.cache_clear()


def test_two_processes_build_once(home, tmp_path):
    log = tmp_path / "log"
    compiler = _compiler(tmp_path, f'echo "$@" >> {log}; exec g++ "$@"')
    processes = [_start(40, home, compiler) for _ in range(2)]
    assert [p.communicate()[0] for p in processes] == ["40\n", "40\n"]
    assert log.read_text().count("main.cpp") == 1


def test_a_library_without_a_function_is_told(caplog):
    if compile.library("rows") is None:
        pytest.skip("kernels are off")
    assert compile.function("rows", "no_such_function", "pl") is None
    assert "has no no_such_function" in caplog.text
