"""Output of the command line, on standard output: tables for people, JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from moeify.plan.fitted_table import Column, FittedTable

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 120


def make_console(*, quiet: bool = False) -> Console:
    """Return a console on standard output, wide enough for tables if it is not a terminal."""
    from rich.console import Console

    console = Console(quiet=quiet)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(quiet=quiet, width=_PIPE_WIDTH)


def write_json(data: Any) -> None:
    """Print data as indented JSON."""
    import typer

    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def make_table(headers: Mapping[str, str], rows: Iterable[Sequence[object]]) -> FittedTable:
    """Return a table in the style of the plan's; the second column holds names.

    Args:
        headers: Title of each column and its justification, followed by "spare" for those that a
            narrow terminal leaves out.
        rows: Cells, shown with `str`.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    return FittedTable(
        tuple(
            Column(
                title,
                [row[i] for row in cells],
                right=style.startswith("right"),
                names=i == 1,
                spare=i if style.endswith("spare") else 0,
            )
            for i, (title, style) in enumerate(headers.items())
        )
    )


def say(console: Console, text: str) -> None:
    """Print a line without markup or highlighting; only a terminal wraps it."""
    console.print(text, highlight=False, markup=False, soft_wrap=not console.is_terminal)
