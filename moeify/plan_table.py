"""The table of a resolved plan. Needs rich, which is imported only when something is rendered."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from moeify.fitted_table import Column, FittedTable
from moeify.selection import shorten
from moeify.units import format_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType

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
    parts += [Text(line) for line in _slices(resolved)]
    dense = resolved.dense_sites
    if dense:
        names = shorten([site.name for site in dense], 6)
        parts.append(Text(f"stay dense ({len(dense)}): {names}"))
    parts += [Text(f"refused: {site.name}: {site.reason}") for site in resolved.refused_sites]
    parts += [Text(note) for note in resolved.notes]
    return Group(*parts)


def _slices(resolved: ResolvedPlan) -> list[str]:
    """Says what share of the hidden neurons tokens use where experts are slices of an MLP."""
    shares: dict[float, list[str]] = {}
    for layer in resolved:
        if layer.init.experts == "split":
            shares.setdefault(layer.active_neurons, []).append(layer.name)
    return [
        f"split: a token uses {share:.1%} of the hidden neurons of {shorten(names, 6)}"
        for share, names in shares.items()
    ]


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


def _table(resolved: ResolvedPlan) -> FittedTable:
    layers = list(resolved)
    spread = resolved.plan.parallel.expert
    columns = [
        Column("site", [layer.name for layer in layers], footer="whole model", names=True),
        Column("widths", [_widths(layer) for layer in layers], spare=1),
        Column("experts", [str(layer.experts) for layer in layers], right=True),
    ]
    if spread > 1:
        ranks = [str(min(spread, layer.experts)) for layer in layers]
        columns.append(Column("ranks", ranks, right=True))
    residual = ["-" if layer.residual == "none" else layer.residual for layer in layers]
    columns += [
        Column("k", [str(layer.top_k) for layer in layers], right=True),
        Column("residual", residual, spare=2 if set(residual) <= {"-"} else 0),
        Column(
            "before",
            [_short(layer.parameters_before) for layer in layers],
            right=True,
            footer=_short(resolved.dense_parameters),
            spare=3,
        ),
        Column(
            "after",
            [_short(layer.parameters_after) for layer in layers],
            right=True,
            footer=_short(resolved.parameters),
        ),
        Column(
            "active",
            [_short(layer.active_parameters) for layer in layers],
            right=True,
            footer=_short(resolved.active_parameters),
        ),
        Column(
            "bytes",
            [format_bytes(layer.bytes_after) for layer in layers],
            right=True,
            footer=format_bytes(resolved.bytes),
        ),
    ]
    return FittedTable(tuple(columns))


def _widths(layer: LayerPlan) -> str:
    site = layer.site
    if layer.expert == "linear":
        return f"{site.d_in}->{site.d_in}->{site.d_out}"
    return f"{site.d_in}->{site.d_ff}->{site.d_out}"


def _short(count: int) -> str:
    """Write a count with four significant digits: 9,999 as it is, then 12.35K, 1.235M, ..."""
    if count < 10_000:
        return f"{count:,}"
    value, unit = count / 1000, "K"
    for larger in "MBT":
        if round(value, 1) < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:,.{2 if value < 100 else 1}f}{unit}"
