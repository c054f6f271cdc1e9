"""Sizes and dtypes as text, and one version."""

from __future__ import annotations

import subprocess
import sys
import tomllib

import pytest
import torch

import moeify as mf
from moeify.units import dtype_from_name, dtype_name, format_bytes, parse_bytes
from moeify.version import __version__


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (90868376, "86.7 MiB"),
        (5 * 1024**3, "5.0 GiB"),
        (2048 * 1024**4, "2048.0 TiB"),
    ],
)
def test_bytes_are_written_in_binary_units(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [(7, 7), ("7", 7), ("5GB", 5 * 10**9), ("512MiB", 512 << 20), (" 1.5 kb ", 1500), ("8B", 8)],
)
def test_bytes_are_read(text, count):
    assert parse_bytes(text, "max_shard_size") == count


@pytest.mark.parametrize("text", ["", "5 apples", "-1", 0, -3, True, "0GB"])
def test_what_is_not_a_size_is_refused(text):
    with pytest.raises(
        ValueError, match=r"max_shard_size: .* is not a size; use a number of bytes or text such as"
    ):
        parse_bytes(text, "max_shard_size")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.float8_e4m3fn])
def test_dtypes_survive_their_names(dtype):
    assert dtype_from_name(dtype_name(dtype)) is dtype
    assert "." not in dtype_name(dtype)


@pytest.mark.parametrize("name", ["float31", "nn", "", "torch.float32"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="is not a dtype of torch"):
        dtype_from_name(name)


def test_units_import_no_torch(repo):
    code = "import moeify.units, moeify.version, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=repo).returncode == 0


def test_there_is_one_version(repo):
    project = tomllib.loads((repo / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {
        "attr": "moeify.version.__version__"
    }
    assert mf.__version__ == __version__


def test_dtypes_are_named_in_one_place(repo):
    copies = [
        f"{path.parent.name}/{path.name}"
        for folder in ("moeify", "passes", "kernels")
        for path in (repo / folder).rglob("*.py")
        if "dtype).removeprefix(" in path.read_text() or "dtype)[6:]" in path.read_text()
    ]
    assert copies == ["moeify/units.py"]
