"""How the command line writes: tables for people, JSON for programs, both on standard output."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_PIPE_WIDTH = 120


def make_console(*, quiet: bool = False) -> Console:
    """Return a console on standard output, wide enough for tables where it is no terminal."""
    from rich.console import Console

    console = Console(quiet=quiet)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(quiet=quiet, width=_PIPE_WIDTH)


def write_json(data: Any) -> None:
    """Print data as indented JSON."""
    import typer

    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def make_table(headers: Mapping[str, str], rows: Iterable[Sequence[object]]) -> Table:
    """Return a table in the style of the plan's.

    Args:
        headers: Title of each column and its justification; the second column holds names.
        rows: Cells, shown with `str`.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for position, (title, justify) in enumerate(headers.items()):
        names = position == 1  # the one column that may take several lines
        table.add_column(
            title,
            justify="right" if justify == "right" else "left",
            overflow="fold" if names else "ellipsis",
            no_wrap=not names,
        )
    for row in rows:
        # Text, not str: rich would read brackets in a name as markup.
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def say(console: Console, text: str) -> None:
    """Print a line as it is: no markup, no colours for numbers, no wrapping."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def size(count: int) -> str:
    """Write a number of bytes for people.

    Example:
        >>> size(90868376)
        '86.7 MiB'
    """
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
