"""The table of a resolved plan. Needs rich, which is imported only when something is rendered."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from moeify.selection import shorten

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from moeify.resolve import LayerPlan, ResolvedPlan

_WIDTH = 120


def render(resolved: ResolvedPlan) -> RenderableType:
    """Makes what rich prints.

    Args:
        resolved: The resolved plan.

    Returns:
        A table of the layers, and lines on the sites that stay dense.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_table(resolved)]
    dense = resolved.dense_sites
    if dense:
        names = shorten([site.name for site in dense], 6)
        parts.append(Text(f"stay dense ({len(dense)}): {names}"))
    parts += [Text(f"refused: {site.name}: {site.reason}") for site in resolved.refused_sites]
    parts += [Text(note) for note in resolved.notes]
    return Group(*parts)


def plain_text(resolved: ResolvedPlan) -> str:
    """Renders without colours, 120 columns wide.

    Args:
        resolved: The resolved plan.

    Returns:
        The text.
    """
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=_WIDTH, color_system=None, force_terminal=False)
    console.print(render(resolved))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n")


def _table(resolved: ResolvedPlan) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_footer=True, pad_edge=False, collapse_padding=True)
    before, after = _short(resolved.dense_parameters), _short(resolved.parameters)
    active, size = _short(resolved.active_parameters), _bytes(resolved.bytes)
    table.add_column("site", Text("whole model"), overflow="fold")
    table.add_column("widths", no_wrap=True)
    table.add_column("experts", justify="right", no_wrap=True)
    spread = resolved.plan.parallel.expert
    if spread > 1:
        table.add_column("ranks", justify="right", no_wrap=True)
    table.add_column("k", justify="right")
    table.add_column("residual", no_wrap=True)
    table.add_column("before", before, justify="right", no_wrap=True)
    table.add_column("after", after, justify="right", no_wrap=True)
    table.add_column("active", active, justify="right", no_wrap=True)
    table.add_column("bytes", size, justify="right", no_wrap=True)
    for layer in resolved:
        table.add_row(
            # Text, not str: rich would read brackets in a name as markup.
            Text(layer.name),
            _widths(layer),
            str(layer.experts),
            *([str(min(spread, layer.experts))] if spread > 1 else []),
            str(layer.top_k),
            "-" if layer.residual == "none" else layer.residual,
            _short(layer.parameters_before),
            _short(layer.parameters_after),
            _short(layer.active_parameters),
            _bytes(layer.bytes_after),
        )
    return table


def _widths(layer: LayerPlan) -> str:
    site = layer.site
    if layer.expert == "linear":
        return f"{site.d_in}->{site.d_in}->{site.d_out}"
    return f"{site.d_in}->{site.d_ff}->{site.d_out}"


def _short(count: int) -> str:
    """Writes a count with four significant digits: 9,999 as it is, then 12.35K, 1.235M, ..."""
    if count < 10_000:
        return f"{count:,}"
    return _scaled(count, 1000, ("", "K", "M", "B", "T"))


def _bytes(count: int) -> str:
    return _scaled(count, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(count: int, base: int, units: tuple[str, ...]) -> str:
    value, power = float(count), 0
    while round(value, 1) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    if power == 0:
        return f"{count}{units[0]}"
    digits = 2 if value < 100 else 1
    return f"{value:,.{digits}f}{units[power]}"
