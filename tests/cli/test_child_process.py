"""Child processes find moeify, and import nothing from the working directory."""

from __future__ import annotations

import pytest

from moeify.cli.child_process import run_python


@pytest.mark.parametrize("how", ["-c", "-m"])
def test_nothing_of_the_working_directory_is_imported(how, tmp_path, monkeypatch):
    (tmp_path / "planted.py").write_text("print('ran')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = run_python(how, "import planted" if how == "-c" else "planted")
    assert done.returncode == 1
    assert "No module named" in done.stderr
    assert "ran" not in done.stdout


def test_moeify_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run_python("-c", "import moeify; print(moeify.__version__)")
    assert done.returncode == 0, done.stderr
