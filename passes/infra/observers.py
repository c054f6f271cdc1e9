"""Watch a pipeline: print graphs, time passes, dump every stage, leave passes out.

The manager calls an observer's hooks; the environment can ask for the ones below without a change
to any program:

    MOEIFY_LOGS=passes,graph,timing   a line per pass; the graph where it changed; a table
    MOEIFY_PRINT_AFTER=all|NAME,...   the graph after these passes
    MOEIFY_DISABLE=NAME,...           leave these passes out
    MOEIFY_DUMP=DIR                   each stage as a numbered file, and what changed as a .diff

All text goes to the logger `moeify.passes`.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.fx import GraphModule

from moeify.errors import MoeifyError
from moeify.passes.infra.base import Pass
from moeify.passes.infra.printer import diff_graphs, print_graph
from moeify.passes.infra.report import PassReport

logger = logging.getLogger("moeify.passes")

_LOGS = ("passes", "graph", "timing")


class Observer:
    """Hooks that the manager calls, each doing nothing. Override the ones you need."""

    def begin(self, names: Sequence[str], gm: GraphModule) -> None:
        """Note that a run begins; `names` are its passes in order, `gm` the graph before them."""

    def skips(self, pass_: Pass) -> bool:
        """Return True to leave a pass out."""
        return False

    def before(self, pass_: Pass, gm: GraphModule) -> None:
        """Note that a pass is about to run."""

    def after(self, pass_: Pass, gm: GraphModule, report: PassReport) -> None:
        """Note that a pass has run, and that the graph after it obeys all rules."""

    def failed(self, pass_: Pass, gm: GraphModule) -> str:
        """Return the file to which the graph was written after a fault in a pass, or "".

        Not called for errors in what the user gave. The graph is as the pass left it, and may break
        rules.
        """
        return ""

    def end(self, reports: Sequence[PassReport]) -> None:
        """Note that the run is over, or has failed; `reports` go up to the pass that failed."""


class LogPasses(Observer):
    """Log one line for each pass."""

    def after(self, pass_: Pass, gm: GraphModule, report: PassReport) -> None:
        logger.info("%s", report)


class LogGraphs(Observer):
    """Log the graph at the beginning and after every pass that changed it."""

    def begin(self, names: Sequence[str], gm: GraphModule) -> None:
        logger.info("before all passes\n%s", print_graph(gm))

    def after(self, pass_: Pass, gm: GraphModule, report: PassReport) -> None:
        if report.modified:
            logger.info("after %s\n%s", pass_.name, print_graph(gm))


class PrintAfter(Observer):
    """Log the graph after the named passes, or after `all`."""

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)

    def begin(self, names: Sequence[str], gm: GraphModule) -> None:
        _check_known("print after", self.names - {"all"}, names)

    def after(self, pass_: Pass, gm: GraphModule, report: PassReport) -> None:
        if "all" in self.names or pass_.name in self.names:
            logger.info("after %s\n%s", pass_.name, print_graph(gm))


class Timing(Observer):
    """Log a table of times at the end, the slowest pass first."""

    def end(self, reports: Sequence[PassReport]) -> None:
        total = sum(report.seconds for report in reports)
        rows = [(r.name, r.seconds) for r in sorted(reports, key=lambda r: -r.seconds)]
        rows.append(("total", total))
        width = max(len(name) for name, _ in rows)
        lines = [
            f"{name:<{width}}  {seconds * 1e3:9.1f} ms  {seconds / total if total else 0:4.0%}"
            for name, seconds in rows
        ]
        logger.info("time by pass\n%s", "\n".join(lines))


class Dump(Observer):
    """Write each stage to a file: `00-capture.txt`, `01-find-mlps.txt`, and `01-find-mlps.diff`.

    Where a pass fails, `02-lower-squares.failed.txt` is the graph as it left it. Files of an
    earlier run under the same names are overwritten. A second run with the same object
    continues the numbering.

    Args:
        folder: Where to write; made if missing.
        first: Name of the stage before the first pass.
    """

    def __init__(self, folder: str | Path, *, first: str = "capture") -> None:
        self.folder = Path(folder)
        self.first = first
        self._number = 0
        self._text = ""

    def begin(self, names: Sequence[str], gm: GraphModule) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._text = print_graph(gm, numbers=False)
        self._write(self.first, ".txt", print_graph(gm))
        self._number += 1

    def after(self, pass_: Pass, gm: GraphModule, report: PassReport) -> None:
        text = print_graph(gm, numbers=False)
        self._write(pass_.name, ".txt", print_graph(gm))
        self._write(pass_.name, ".diff", diff_graphs(self._text, text))
        self._text = text
        self._number += 1

    def failed(self, pass_: Pass, gm: GraphModule) -> str:
        return str(self._write(pass_.name, ".failed.txt", print_graph(gm)))

    def _write(self, stage: str, suffix: str, text: str) -> Path:
        stem = "".join(c if c.isalnum() or c in "-_." else "_" for c in stage)
        path = self.folder / f"{self._number:02d}-{stem}{suffix}"
        path.write_text(text, encoding="utf-8")
        return path


class DisableByName(Observer):
    """Leave the named passes out. The manager refuses if a later pass needs what they provide."""

    def __init__(self, *names: str) -> None:
        self.names = frozenset(names)

    def begin(self, names: Sequence[str], gm: GraphModule) -> None:
        _check_known("disable", self.names, names)

    def skips(self, pass_: Pass) -> bool:
        return pass_.name in self.names


def observers_from_env(environ: Mapping[str, str] | None = None) -> list[Observer]:
    """Make the observers that the environment asks for.

    Args:
        environ: Variables to read; None reads those of the process.

    Returns:
        The observers, none if no variable is set. Where they log and no handler is configured,
        `moeify.passes` gets one that writes to standard error.

    Raises:
        MoeifyError: `MOEIFY_LOGS` names something that does not exist. A pass that does not exist
            is an error when the run begins.
    """
    env = os.environ if environ is None else environ
    logs, print_after, disable = (
        [name.strip() for name in env.get(key, "").split(",") if name.strip()]
        for key in ("MOEIFY_LOGS", "MOEIFY_PRINT_AFTER", "MOEIFY_DISABLE")
    )
    unknown = [name for name in logs if name not in _LOGS]
    if unknown:
        raise MoeifyError(
            f"MOEIFY_LOGS: no log named {', '.join(unknown)}; there are {', '.join(_LOGS)}"
        )
    makers: dict[str, type[Observer]] = {"passes": LogPasses, "graph": LogGraphs, "timing": Timing}
    observers: list[Observer] = [makers[name]() for name in dict.fromkeys(logs)]
    if print_after:
        observers.append(PrintAfter(*print_after))
    if observers:
        _configure_logging()
    if disable:
        observers.append(DisableByName(*disable))
    if env.get("MOEIFY_DUMP"):
        observers.append(Dump(env["MOEIFY_DUMP"]))
    return observers


def _check_known(what: str, asked: frozenset[str], names: Sequence[str]) -> None:
    unknown = sorted(asked - set(names))
    if unknown:
        raise MoeifyError(
            f"cannot {what} {', '.join(unknown)}: no such pass; there are {', '.join(names)}"
        )


class _Stderr(logging.Handler):
    """Write to whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(self.format(record) + "\n")


def _configure_logging() -> None:
    if not logger.hasHandlers():
        logger.addHandler(_Stderr())
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
