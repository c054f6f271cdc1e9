"""The pictures of a report, as SVG without scripts: the pyramid, heat maps and curves.

Heat maps have eight steps of one hue, so that they can be read without telling colours apart; one
path per step holds all its cells, which keeps a large map small. A `label` describes a picture for
screen readers.

Shapes: E experts.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import Final

from moeify.reporting.data import Row
from moeify.reporting.html import Element, el, short

LOAD_EDGES: Final = (0.1, 0.4, 0.7, 0.9, 1.1, 1.5, 2.5)
SHARE_EDGES: Final = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
ENTROPY_EDGES: Final = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95)
WIDTH: Final = 336
_MOST_POINTS: Final = 200


def legend(edges: Sequence[float], unit: str) -> Element:
    """Make the key of a heat map, for the numbers between its eight steps."""
    texts = [
        f"below {edges[0]:g}",
        *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)),
        f"{edges[-1]:g} and more",
    ]
    items = [el("li", el("span", cls=f"sw h{i}"), text) for i, text in enumerate(texts)]
    items.append(el("li", el("span", cls="sw"), "nothing logged"))
    return el("ul", *items, cls="key", aria_label=unit)


def heat(
    rows: Sequence[Sequence[float | None]],
    edges: Sequence[float],
    *,
    label: str,
    left: tuple[str, str],
    bottom: tuple[str, str],
) -> Element:
    """Draw a heat map, the first row on top; `left` and `bottom` name its ends."""
    count, wide = len(rows), max(map(len, rows))
    cell = min(14.0, max(2.0, 200 / count))
    width, height = WIDTH - 34, max(cell * count, 14)
    paths: list[list[str]] = [[] for _ in range(len(edges) + 1)]
    for y, row in enumerate(rows):
        start = 0
        for value, group in itertools.groupby(_step(value, edges) for value in row):
            length = len(list(group))
            if value is not None:
                paths[value].append(f"M{start} {y + 0.5:g}h{length}")
            start += length
    cells = [el("path", cls=f"h{i}", d="".join(d)) for i, d in enumerate(paths) if d]
    inner = el(
        "svg",
        el("rect", width=wide, height=count, cls="none"),
        *cells,
        x=34,
        y=2,
        width=width,
        height=f"{height:g}",
        viewBox=f"0 0 {wide} {count}",
        preserveAspectRatio="none",
    )
    texts = [_text(30, 11, left[0], "end")]
    if count > 1 and height > 26:
        texts.append(_text(30, height + 1, left[1], "end"))
    low = height + 16
    ends = [_text(34, low, bottom[0]), _text(WIDTH, low, bottom[1], "end")]
    texts += ends if wide > 1 else ends[:1]
    return _svg(label, WIDTH, height + 22, inner, *texts, cls="heat")


def curve(
    points: Sequence[tuple[float, float]],
    *,
    label: str,
    band: Sequence[tuple[float, float, float]] = (),
) -> Element:
    """Draw a curve over steps, at least one value of it finite; the others leave a gap.

    The band is (step, least, most), drawn behind it.
    """
    shown = points if len(points) <= _MOST_POINTS else _thinned(points)
    values = [y for _, y in shown if math.isfinite(y)]
    values += [y for _, *both in band for y in both if math.isfinite(y)]
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    bottom, top = low - margin, high + margin
    first, last = points[0][0], points[-1][0]
    across, down = WIDTH - 62, 118

    def place(x: float, y: float) -> tuple[float, float]:
        share = (x - first) / (last - first) if last > first else 0.5
        # Halves, so that the difference of two huge numbers stays finite.
        return 54 + share * across, 6 + down * (top / 2 - y / 2) / (top / 2 - bottom / 2)

    parts = [el("path", cls="axis", d=f"M54 6v{down}h{across}")]
    for value in dict.fromkeys((low, high)):
        y = place(first, value)[1]
        parts.append(_text(50, y + 4, _tick(value), "end"))
        parts.append(el("path", cls="axis", d=f"M51 {y:.1f}h3"))
    edge = [(x, least, most) for x, least, most in band if math.isfinite(least + most)]
    if len(edge) > 1:
        outline = [place(x, most) for x, _, most in edge]
        outline += [place(x, least) for x, least, _ in reversed(edge)]
        parts.append(
            el("polygon", cls="band", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in outline))
        )
    for _, group in itertools.groupby(shown, lambda point: math.isfinite(point[1])):
        run = [place(x, y) for x, y in group if math.isfinite(y)]
        if len(run) > 1:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
            parts.append(el("polyline", cls="curve", points=line))
        if run and (len(run) == 1 or len(shown) <= 24):
            parts += [el("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r=2.4, cls="dot") for x, y in run]
    parts.append(_text(54, down + 22, f"step {first:g}" if last > first else ""))
    parts.append(_text(WIDTH - 8, down + 22, f"step {last:g}", "end"))
    return _svg(label, WIDTH, down + 28, *parts)


def pyramid(rows: Sequence[Row], label: str) -> Element:
    """Draw layers, in execution order from the top, by experts."""
    names = _labels([row.name for row in rows])
    most = max((row.experts for row in rows), default=1) or 1
    one = min(26.0, 176 / (most + 1))
    pitch, middle = 18, 196
    parts: list[Element] = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        top = 4 + number * pitch
        width = one * max(row.experts, 1)
        left = middle - width / 2
        group = el("g", el("title", _sentence(row)))
        group.append(_text(0, top + 10, name, cls="name"))
        if row.state == "moe":
            gap = 1.0 if one >= 3 else 0.0
            d = "".join(
                f"M{left + i * one:.2f} {top}h{one - gap:.2f}v12h-{one - gap:.2f}z"
                for i in range(row.experts)
            )
            if not gap:
                d = f"M{left:.2f} {top}h{width:.2f}v12h-{width:.2f}z"
            group.append(el("path", cls="moe", d=d))
            if row.residual != "none":
                wide = max(one - 1, 5.0)
                rest = {"x": f"{left - wide - 3:.2f}", "y": top + 0.5, "width": f"{wide:.2f}"}
                group.append(el("rect", cls="rest", height=11, **rest))
            text = f"{row.experts} · k{row.top_k}"
        else:
            wide = max(width - 1, 12.0)
            box = {"x": f"{middle - wide / 2:.2f}", "y": top, "width": f"{wide:.2f}"}
            group.append(el("rect", cls=row.state, height=12, **box))
            text = row.state
        group.append(_text(WIDTH, top + 10, text, "end"))
        parts.append(group)
    return _svg(label, WIDTH, 6 + len(rows) * pitch, *parts)


def pyramid_key() -> Element:
    """Make the key of the pyramid."""

    def swatch(cls: str, text: str) -> Element:
        box = el("rect", x=1, y=1, width=14, height=11, cls=cls)
        return el("li", el("svg", box, width=16, height=13, aria_hidden="true"), text)

    return el(
        "ul",
        swatch("moe", "expert"),
        swatch("rest", "dense branch of a residual"),
        swatch("dense", "stays dense"),
        swatch("refused", "cannot be converted"),
        cls="key",
    )


def _svg(label: str, width: float, height: float, *parts: Element, cls: str = "") -> Element:
    return el(
        "svg",
        *parts,
        cls=cls or None,
        role="img",
        aria_label=label,
        width=f"{width:g}",
        height=f"{height:g}",
        viewBox=f"0 0 {width:g} {height:g}",
    )


def _text(x: float, y: float, text: str, anchor: str = "start", cls: str | None = None) -> Element:
    where = None if anchor == "start" else anchor
    return el("text", text, x=f"{x:g}", y=f"{y:.1f}", text_anchor=where, cls=cls)


def _step(value: float | None, edges: Sequence[float]) -> int | None:
    if value is None or not math.isfinite(value):
        return None
    return bisect.bisect_right(edges, value)


def _tick(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.2g}"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbours; a value that is not finite makes its average not finite."""
    found = []
    for i in range(_MOST_POINTS):
        start, stop = (len(points) * j // _MOST_POINTS for j in (i, i + 1))
        part = points[start:stop]
        steps = [x for x, _ in part]
        found.append((steps[len(steps) // 2], sum(y / len(part) for _, y in part)))
    return found


def _labels(names: Sequence[str]) -> list[str]:
    """Leave out the parts that all names begin or end with."""
    parts = [name.split(".") for name in names]
    fewest = min((len(part) for part in parts), default=1)
    head = tail = 0
    while len(parts) > 1 and head < fewest - 1 and len({p[head] for p in parts}) == 1:
        head += 1
    while len(parts) > 1 and head + tail < fewest - 1 and len({p[-1 - tail] for p in parts}) == 1:
        tail += 1
    return [short(".".join(part[head : len(part) - tail]), 15) for part in parts]


def _sentence(row: Row) -> str:
    name = short(row.name)
    if row.state != "moe":
        return f"{name}: {row.state}"
    rest = "" if row.residual == "none" else f", residual {row.residual}"
    return f"{name}: {row.experts} experts, {row.top_k} per token{rest}"
