"""Run this Python in a process of its own, as a reader of a written folder would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import moeify


def run_python(
    *arguments: str, stdin: str = "", **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python with `arguments` and extra environment variables; moeify can be imported there."""
    root = str(Path(moeify.__path__[0]).resolve().parent)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        # -P: the working directory may be a folder from a stranger; nothing in it is imported.
        [sys.executable, "-P", *arguments],
        input=stdin,
        env={**os.environ, "PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
