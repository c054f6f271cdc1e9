"""Settings shared by all tests: determinism, golden files, and the closing table of models."""

from __future__ import annotations

import os

# Before anything imports transformers: no network, no warnings about it.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

Row = dict[str, Any]
_ZOO = pytest.StashKey[list[Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden",
        action="store_true",
        help="rewrite the golden files from what the code prints now",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ZOO] = []
    torch.set_num_threads(2)
    settings.register_profile("moeify", deadline=None, derandomize="CI" in os.environ)
    settings.load_profile("moeify")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


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
def zoo_row(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Add a row to the table at the end of the run: `zoo_row(model="gpt2", sites=2)`."""
    rows = request.config.stash[_ZOO]

    def add(**columns: Any) -> None:
        rows.append(columns)

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


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    rows = config.stash.get(_ZOO, [])
    if rows:
        terminalreporter.section("zoo")
        for line in _table(rows):
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return Path(__file__).resolve().parent.parent
