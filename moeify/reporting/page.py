"""`report`: one page that shows a model, its plan, its training and what every pass did.

The page is a single file that loads nothing. It says what is not known, and makes nothing up.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from moeify.atomic_file import replace_file
from moeify.capture.capture import ExampleInputs
from moeify.errors import MoeifyError
from moeify.plan.plan import Plan
from moeify.reporting.data import Facts, of_folder, of_model, of_run
from moeify.reporting.html import page, short
from moeify.reporting.run import Run, read_run
from moeify.reporting.sections import sections

_STATE = "trainer_state.json"


def report(
    model: nn.Module | str | os.PathLike[str] | None,
    path: str | os.PathLike[str],
    run: str | os.PathLike[str] | None = None,
    *,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    example_inputs: ExampleInputs | None = None,
) -> Path:
    """Write a report as one HTML file that loads nothing.

    Args:
        model: A converted model (only read), a dense one with `plan`, the folder of either, or None
            for a run alone.
        path: The page; replaced if it exists, all or nothing.
        run: Lines of `moeify.RunLog`, or a Trainer's `trainer_state.json`; None looks for one of
            those in the model's folder.
        plan: For a dense model: what it would become.
        example_inputs: For a dense model in memory; made from a Hugging Face config if None.

    Returns:
        The page's path.

    Raises:
        MoeifyError: There is no model or run, it is damaged, or the page cannot be written.
        PlanError: The plan does not fit the model.

    Example:
        >>> import tempfile, torch
        >>> from moeify import moeify
        >>> nn = torch.nn
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> moe = {"layers": [{"select": "all", "experts": 4}]}
        >>> model = moeify(nn.Sequential(mlp), moe, example_inputs=torch.randn(4, 8))
        >>> page = report(model, os.path.join(tempfile.mkdtemp(), "report.html"))
        >>> page.read_text().count("<script")
        0
    """
    chosen = None if plan is None else Plan.of(plan)
    if model is None or isinstance(model, str | os.PathLike):
        if model is None and run is None:
            raise MoeifyError("there is nothing to report on: give a model, a run, or both")
        source = run if model is None else model
        facts, done = gather(str(source), None if model is None else run, chosen)
    else:
        facts = of_model(model, chosen, example_inputs)
        done = None if run is None else read_run(Path(run))
    write_page(facts, done, Path(path))
    return Path(path)


def gather(
    source: str, run: str | os.PathLike[str] | None, plan: Plan | None
) -> tuple[Facts, Run | None]:
    """Read the folder of a model, with a run and a plan if given, or the file of a run."""
    start = Path(source)
    if start.is_dir():
        within = start / _STATE
        models = any((start / name).is_file() for name in ("config.json", "moeify.json"))
        if not models and within.is_file():
            start = within
        else:
            found = Path(run) if run is not None else within if within.is_file() else None
            return of_folder(start, plan), None if found is None else read_run(found)
    if run is not None or plan is not None:
        what = "a run" if start.is_file() else "not a folder"
        raise MoeifyError(f"{start}: is {what}; give a model's folder first, then --run or --plan")
    if not start.exists():
        raise MoeifyError(f"{start}: there is no such folder or file; moeify downloads nothing")
    done = read_run(start)
    return of_run(done), done


def write_page(facts: Facts, run: Run | None, path: Path) -> int:
    """Write the page, all or nothing, and return its size in bytes."""
    if path.is_dir():
        raise MoeifyError(f"{path}: is a folder; give a file, such as report.html in it")
    if not path.parent.is_dir():
        raise MoeifyError(f"{path.parent}: is not a folder; make it first")
    title = f"moeify report: {short(facts.model or facts.source, 80)}"
    data = page(title, *sections(facts, run)).encode("utf-8")
    replace_file(path, data)
    return len(data)
