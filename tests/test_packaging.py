"""The wheel holds every module, and only `moeify` at the top level."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

FOLDERS = {"moeify": "moeify", "passes": "moeify/passes", "kernels": "moeify/kernels"}


def _setuptools_version() -> int:
    try:
        return int(version("setuptools").split(".")[0])
    except PackageNotFoundError:
        return 0


def _modules(repo: Path) -> set[str]:
    """Return every module of the tree by its name in a wheel; `rglob` does not follow links."""
    return {
        f"{target}/{path.relative_to(repo / folder)}"
        for folder, target in FOLDERS.items()
        for path in (repo / folder).rglob("*.py")
        if not any(parent.is_symlink() for parent in path.parents)
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """Names of the files in a wheel built from a copy of the sources, without the network."""
    if _setuptools_version() < 77:
        pytest.skip("building needs setuptools>=77 in this environment; install the dev extra")
    repo = Path(__file__).resolve().parent.parent
    source = tmp_path_factory.mktemp("source") / "moeify"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(repo / name, source)
    for folder in FOLDERS:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(repo / folder, source / folder, symlinks=True, ignore=ignore)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def test_every_module_is_in_the_wheel(wheel, repo):
    packed = {name for name in wheel if name.endswith(".py")}
    assert packed == _modules(repo)
    assert "moeify/py.typed" in wheel


def test_only_moeify_is_at_the_top_level(wheel):
    top = {name.split("/")[0] for name in wheel}
    assert {name for name in top if not name.endswith(".dist-info")} == {"moeify"}


def test_kernels_is_no_regular_package(wheel, repo):
    assert not (repo / "kernels" / "__init__.py").exists()
    assert "moeify/kernels/__init__.py" not in wheel


def test_the_licence_is_in_the_wheel(wheel):
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


@pytest.mark.parametrize("name", ["passes", "kernels"])
def test_links_are_relative(repo, name):
    link = repo / "moeify" / name
    assert link.is_symlink()
    assert link.readlink() == Path("..", name)


def test_what_kernels_read_is_in_the_wheel(wheel, repo):
    beside = {p.name for p in (repo / "kernels").rglob("*") if p.suffix in (".cpp", ".h", ".json")}
    packed = {name.rpartition("/")[2] for name in wheel}
    assert len(beside) > 5
    assert beside <= packed


def test_import_is_light(repo):
    code = "import moeify, sys; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr or "`import moeify` imports torch"
