"""Tables that fit the terminal: names break at dots, and columns that matter least are left out.

Needs rich, which is imported only when something is rendered.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.table import Table

_SHORTEST = 24
"""Least width of a column of long names, before columns are left out for it."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table."""

    title: str
    cells: Sequence[str]
    right: bool = False  # flush right
    footer: str = ""
    names: bool = False  # dotted names, which may take several lines
    spare: int = 0  # left out where there is no room, the highest first; 0 never

    @property
    def width(self) -> int:
        """Width of its widest text."""
        return max(map(len, (self.title, self.footer, *self.cells)))


@dataclass(frozen=True, slots=True)
class FittedTable:
    """A table that rich prints."""

    columns: tuple[Column, ...]  # at most one with names

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Table]:
        """Yield a table no wider than the console."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        chosen = list(self.columns)
        room = _room(chosen, options.max_width)
        while room < _needed(chosen) and any(column.spare for column in chosen):
            chosen.remove(max(chosen, key=lambda column: column.spare))
            room = _room(chosen, options.max_width)
        footer = any(column.footer for column in chosen)
        table = Table(
            box=box.SIMPLE_HEAD, show_footer=footer, pad_edge=False, collapse_padding=True
        )
        for column in chosen:
            table.add_column(
                column.title,
                Text(column.footer),
                justify="right" if column.right else "left",
                overflow="fold" if column.names else "ellipsis",
                no_wrap=not column.names,
            )
        for row in zip(*(column.cells for column in chosen), strict=True):
            # Text, not str: rich would read brackets in a name as markup.
            table.add_row(
                *(
                    Text(broken(cell, room) if column.names else cell)
                    for cell, column in zip(row, chosen, strict=True)
                )
            )
        yield table


def _room(columns: Sequence[Column], width: int) -> int:
    """Return the width that is left for names."""
    others = sum(column.width for column in columns if not column.names)
    return width - others - 2 * len(columns)


def _needed(columns: Sequence[Column]) -> int:
    return min(_SHORTEST, max((column.width for column in columns if column.names), default=0))


def broken(name: str, width: int) -> str:
    """Break a dotted name into lines of at most `width`, after dots where there are any.

    Example:
        >>> print(broken("encoder.block.0.layer.1.DenseReluDense", 24))
        encoder.block.0.layer.1.
        DenseReluDense
    """
    lines = [""]
    for position, part in enumerate(name.split(".")):
        piece = part if position == 0 else f".{part}"
        if lines[-1] and len(lines[-1]) + len(piece) + 1 > width and len(name) > width:
            lines[-1] += "." if position else ""
            piece = piece.removeprefix(".")
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)
