"""The training section of a report: losses, and what every router did over the steps.

Shapes: E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from moeify.reporting.charts import ENTROPY_EDGES, LOAD_EDGES, SHARE_EDGES, curve, heat, legend
from moeify.reporting.data import Row
from moeify.reporting.html import Element, el, figure, short, table
from moeify.reporting.run import Run

_CELLS: Final = 60_000
_COLUMNS: Final = 64
_MOST_MAPS: Final = 96
_MOST_CURVES: Final = 24
_HIDDEN: Final = frozenset({"epoch", "total_flos"})
_LOADS: Final = ("load_max", "load_min")

Points = Sequence[tuple[int, float]]


def training(run: Run | None, rows: Sequence[Row]) -> list[Element]:
    """Return the section; `rows` are the model's MLPs, for the order of the layers."""
    if run is None:
        return [el("p", "No run was given: pass a run log, or a trainer_state.json.")]
    steps = run.steps
    if not steps:
        return [el("p", "The run has no steps yet.")]
    order = {row.name: i for i, row in enumerate(rows)}
    layers = sorted(
        run.facts.keys() | run.counts.keys(), key=lambda n: (order.get(n, len(order)), n)
    )
    text = f"{len(steps)} logged steps, {steps[0]} to {steps[-1]}, from {short(run.where, 300)}."
    found = [el("p", text), *_other_layers(layers, rows), *_curves(run)]
    if not layers:
        return [*found, el("p", "The run logged nothing about routers.")]
    return [*found, *_loads(run, layers), *_shares(run, layers, rows), _last(run, layers)]


def _other_layers(layers: Sequence[str], rows: Sequence[Row]) -> list[Element]:
    """Warn if the run has other layers than the model."""
    known = {row.name for row in rows if row.state == "moe"}
    other = [name for name in layers if name not in known]
    if not known or not other:
        return []
    names = ", ".join(short(name, 60) for name in other[:4])
    text = f"{len(other)} layers of the run are not among the model's MoE layers: {names}"
    return [el("p", f"{text}. Is it another model's run?", cls="miss")]


def _curves(run: Run) -> list[Element]:
    names = [name for name in run.numbers if name not in _HIDDEN]
    names.sort(key=lambda name: ("loss" not in name, name != "loss"))
    charts = [_curve(short(name, 80), run.numbers[name]) for name in names[:_MOST_CURVES]]
    found = [el("h3", "Losses and other numbers"), el("div", *charts, cls="charts")]
    if not names:
        return [el("h3", "Losses"), el("p", "None were logged.")]
    if len(names) > _MOST_CURVES:
        left = ", ".join(short(name, 60) for name in names[_MOST_CURVES:][:40])
        found.append(el("p", f"Only {_MOST_CURVES} of {len(names)} are drawn; not: {left}"))
    return found


def _curve(name: str, points: Points, band: Sequence[tuple[int, float, float]] = ()) -> Element:
    finite = [y for _, y in points if math.isfinite(y)]
    wrong = len(points) - len(finite)
    if not finite:
        return el("figure", el("figcaption", el("b", name), f": none of {wrong} values is finite"))
    text = f": {finite[0]:.4g} at first, {finite[-1]:.4g} at last, lowest {min(finite):.4g}"
    if wrong:
        text += f"; not finite: {wrong} of {len(points)}"
    return figure(curve(points, label=f"{name} over steps{text}", band=band), el("b", name), text)


def _loads(run: Run, layers: Sequence[str]) -> list[Element]:
    """Draw the load of every expert over the steps, or of each layer's fullest one."""
    head = el("h3", "Expert load")
    counted = [name for name in layers if name in run.counts]
    if not counted:
        text = (
            "The load of single experts was not logged (a trainer_state.json does not hold it: use "
            "RouterCallback(run_log=...)). Shown is the fullest expert of each layer."
        )
        title = "Load of the fullest expert over its even share"
        picture = _layer_map(run, layers, "load_max", LOAD_EDGES, title)
        if picture is None:
            return [head, el("p", "Not logged.")]
        return [head, el("p", text), legend(LOAD_EDGES, "Load over the even share"), picture]
    shown = counted[:_MOST_MAPS]
    cells = sum(len(run.counts[name][0][1]) for name in shown)
    columns = max(4, min(_COLUMNS, _CELLS // max(cells, 1)))
    text = (
        "Routes of each expert before dropping, over its even share (1 is even). A picture per "
        "layer: experts from top to bottom, steps from left to right."
    )
    figures = [_load(name, run, columns) for name in shown]
    found = [head, el("p", text), legend(LOAD_EDGES, "Load over the even share")]
    found.append(el("div", *figures, cls="heats"))
    if len(shown) < len(counted):
        found.append(el("p", f"Only the first {len(shown)} of {len(counted)} layers are drawn."))
    return found


def _load(name: str, run: Run, columns: int) -> Element:
    row = run.counts[name]
    many = len(row[0][1])
    wide = min(columns, len(row))
    bins = [[0.0] * many for _ in range(wide)]
    for i, (_, counts) in enumerate(row):
        place = bins[i * wide // len(row)]
        for expert, count in enumerate(counts):
            place[expert] += count
    shares = [_over_even(counts) for counts in bins]
    tall = min(many, 256)
    cells = [
        [_fullest(share[e * many // tall : (e + 1) * many // tall]) for share in shares]
        for e in range(tall)
    ]
    last = _over_even(row[-1][1])
    most = _fullest(last)
    peak = "nothing" if most is None else f"{most:.2f}"
    text = f"{many} experts; fullest at last: {peak}"
    if wide < len(row):
        text += f"; {len(row)} logs in {wide} columns, summed"
    if tall < many:
        text += f"; the fullest of about {many / tall:.0f} experts in a row"
    picture = heat(
        cells,
        LOAD_EDGES,
        label=f"Load of {many} experts of {short(name, 80)} over steps; {text}",
        left=("0", str(many - 1)),
        bottom=(f"step {row[0][0]}", f"step {row[-1][0]}"),
    )
    return figure(picture, el("b", short(name, 80)), f": {text}")


def _over_even(counts: Sequence[float]) -> list[float | None]:
    total = math.fsum(counts)
    return [count / total * len(counts) if total else None for count in counts]


def _fullest(values: Sequence[float | None]) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _shares(run: Run, layers: Sequence[str], rows: Sequence[Row]) -> list[Element]:
    """Draw the dropped fraction and the entropy over the steps."""
    experts = {row.name: row.experts for row in rows if row.state == "moe"}
    experts |= {name: len(row[0][1]) for name, row in run.counts.items()}
    scales = {name: 1 / math.log(experts[name]) for name in layers if experts.get(name, 0) > 1}
    found: list[Element] = []
    for key, title, text, scale in (
        ("dropped", "Dropped routes", "Fraction of the routes whose expert was full.", None),
        (
            "entropy",
            "Router entropy",
            "Mean entropy per token, as a share of its maximum, log E; 1 is undecided.",
            scales,
        ),
    ):
        known = [n for n in layers if key in run.facts.get(n, {}) and (scale is None or n in scale)]
        edges = SHARE_EDGES if key == "dropped" else ENTROPY_EDGES
        found.append(el("h3", title))
        if not known:
            why = "" if scale is None or scale else " with the number of experts"
            found.append(el("p", f"Not logged{why}."))
            continue
        factors = scale or dict.fromkeys(known, 1.0)
        mean, band = _mean(run, known, key, factors)
        chart = _curve(f"{title}, mean and range over {len(known)} layers", mean, band)
        picture = _layer_map(run, known, key, edges, title, factors)
        charts = el("div", chart, picture, cls="charts")
        found += [el("p", text), legend(edges, title), charts]
    return found


def _mean(
    run: Run, layers: Sequence[str], key: str, factors: dict[str, float]
) -> tuple[list[tuple[int, float]], list[tuple[int, float, float]]]:
    by_step: dict[int, list[float]] = {}
    for name in layers:
        for step, value in run.facts[name][key]:
            by_step.setdefault(step, []).append(value * factors[name])
    steps = sorted(by_step)
    mean = [(step, sum(by_step[step]) / len(by_step[step])) for step in steps]
    some = steps if len(steps) <= 200 else [steps[i * len(steps) // 200] for i in range(200)]
    return mean, [(step, min(by_step[step]), max(by_step[step])) for step in some]


def _layer_map(
    run: Run,
    layers: Sequence[str],
    key: str,
    edges: Sequence[float],
    title: str,
    factors: dict[str, float] | None = None,
) -> Element | None:
    """Draw layers by steps; None if nothing was logged."""
    rows, ends, cut = _grid(run, layers, key, factors)
    if not rows:
        return None
    sides = ("0", str(len(rows) - 1))
    picture = heat(rows, edges, label=f"{title}, layers by steps", left=sides, bottom=ends)
    return figure(picture, f"Layers by steps, the first on top{cut}.")


def _grid(
    run: Run, layers: Sequence[str], key: str, factors: dict[str, float] | None
) -> tuple[list[list[float | None]], tuple[str, str], str]:
    """Return layers by columns of steps, first and last step, and a note of what was averaged."""
    known = [name for name in layers if key in run.facts.get(name, {})]
    steps = sorted({step for name in known for step, _ in run.facts[name][key]})
    if not steps:
        return [], ("", ""), ""
    wide = min(_COLUMNS, len(steps))
    column = {step: i * wide // len(steps) for i, step in enumerate(steps)}
    grid: list[list[float | None]] = []
    for name in known[:400]:
        factor = 1.0 if factors is None else factors[name]
        bins: list[list[float]] = [[] for _ in range(wide)]
        for step, value in run.facts[name][key]:
            if math.isfinite(value):
                bins[column[step]].append(value * factor)
        grid.append([sum(values) / len(values) if values else None for values in bins])
    cut = f"; {len(steps)} logs in {wide} columns, averaged" if wide < len(steps) else ""
    cut += f"; the first 400 of {len(known)} layers" if len(known) > 400 else ""
    return grid, (f"step {steps[0]}", f"step {steps[-1]}"), cut


def _last(run: Run, layers: Sequence[str]) -> Element:
    rows = []
    for name in layers[:400]:
        facts = run.facts.get(name, {})
        counts = run.counts.get(name)
        if counts:
            shares = [share for share in _over_even(counts[-1][1]) if share is not None]
            loads = [f"{pick(shares):.2f}" if shares else "-" for pick in (max, min)]
        else:
            loads = [f"{facts[k][-1][1]:.2f}" if k in facts else "-" for k in _LOADS]
        others = [f"{facts[k][-1][1]:.3f}" if k in facts else "-" for k in ("entropy", "dropped")]
        rows.append([short(name), *loads, *others])
    headers = ["layer", "fullest expert", "emptiest expert", "entropy (nats)", "dropped"]
    return table("What was logged last; loads over the even share", headers, rows, numbers=1)
