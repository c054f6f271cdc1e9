"""Settings shared by all tests: determinism, golden files, and the closing table of models."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

# Before anything imports transformers: no network, no warnings about it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Code of custom exports is copied there; each process has a place of its own.
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="moeify-modules-")
# Before torch: a worker among others has one thread, and so have the processes that it starts.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

atexit.register(shutil.rmtree, os.environ["HF_MODULES_CACHE"], ignore_errors=True)
if not torch.cuda.is_available():  # before anything imports triton: its kernels are interpreted
    os.environ.setdefault("TRITON_INTERPRET", "1")

Row = dict[str, Any]
_ZOO = "zoo"  # the user property of a test's report that holds a row of the closing table
_EXPORTS = "exports"  # the same, of the second one


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden files from what the code prints now",
    )
    parser.addoption("--slow", action="store_true", help="run the tests that are marked slow too")


def pytest_configure() -> None:
    os.environ.pop("COLUMNS", None)  # readline in pytest's own process leaves one to the workers
    settings.register_profile("moeify", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("moeify")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """Keep a file's tests in one worker, for their shared state; the zoo's fill the gaps."""
    if config.getoption("dist") != "loadscope":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # hands out large scopes first, single tests last
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return nodeid if file == "tests/test_zoo.py" else file

    return Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all but every n-th case of a `thin(n)` test slow."""
    seen: dict[str, int] = {}
    for item in items:
        marker = item.get_closest_marker("thin")
        if marker is None:
            continue
        name = item.nodeid.partition("[")[0]
        seen[name] = seen.get(name, -1) + 1
        if seen[name] % marker.args[0]:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("slow: --slow runs it")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Compare a text with `golden/NAME` beside the test file: `golden(text, "capture.txt")`."""
    from moeify.passes.testing import assert_golden

    folder = request.path.parent / "golden"
    update = bool(request.config.getoption("--update-golden"))

    def check(text: str, name: str) -> None:
        assert_golden(text, folder / name, update=update)

    return check


@pytest.fixture
def export_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a row to the table of exports: `export_row(model="gpt2", kind="custom")`."""

    def add(**columns: Any) -> None:
        request.node.user_properties.append((_EXPORTS, columns))

    return add


@pytest.fixture
def zoo_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a row to the table at the end of the run: `zoo_row(model="gpt2", sites=2)`."""

    def add(**columns: Any) -> None:
        request.node.user_properties.append((_ZOO, columns))

    return add


def _table(rows: list[Row]) -> list[str]:
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([_cell(row.get(key, "")) for key in keys] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(keys))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    kinds = ("passed", "failed")
    ended = [report for kind in kinds for report in terminalreporter.stats.get(kind, ())]
    ended.sort(key=lambda report: report.nodeid)
    for name in (_ZOO, _EXPORTS):
        rows = [row for report in ended for key, row in report.user_properties if key == name]
        if rows:
            terminalreporter.section(name)
            for line in _table(rows):
                terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent
