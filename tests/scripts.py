"""Runs a script as `python SCRIPT` does, in a process forked from one that has imported torch."""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.distributed.ranks import SERVER


def run_script(path: Path, arguments: Sequence[str] = (), timeout: float = 300.0) -> str:
    """Run `path` as `__main__`, which starts in no time, and return what it printed.

    Raises:
        AssertionError: It failed or was still running; says what it printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = SERVER.Process(target=_run, args=(path, arguments, out, err), daemon=True)
        process.start()
        process.join(timeout)
        process.kill()
        process.join()
        assert process.exitcode == 0, (process.exitcode, err.read_text()[-6000:])
        return out.read_text()


def _run(path: Path, arguments: Sequence[str], out: Path, err: Path) -> None:
    for number, file in ((1, out), (2, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
