"""The picture: time over the dense MLP against tokens, a panel per number of experts.

    python -m benchmarks.picture results.json layer.png mode=forward threads=1 top_k=2

Cases that differ in more than experts and tokens are rows of panels; the arguments after the files
select among them.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROW = ("device", "mode", "dtype", "threads", "top_k", "width", "hidden")
HIDDEN = ("dense", "dense_compiled", "moeify_reference")
OURS = {"moeify": "#c1121f", "moeify_compiled": "#f4845f"}
MARKS = "osv^D<>pPX*hd"


def draw(results: dict[str, Any], path: Path, only: Mapping[str, str] | None = None) -> None:
    """Draw the layers of a file of results.

    Args:
        results: What `benchmarks.layer` writes.
        path: The PNG.
        only: Fields that a case must have, as text; all cases if None.

    Raises:
        ValueError: There is nothing to draw.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    panels = _panels(results, only or {})
    if not panels:
        raise ValueError("the results hold no layer with times over the dense MLP")
    rows = sorted({row for row, _ in panels}, key=str)
    columns = sorted({experts for _, experts in panels})
    names = sorted({name for panel in panels.values() for name in panel})
    styles = {name: _style(name, i) for i, name in enumerate(names)}
    tokens = sorted({t for panel in panels.values() for p in panel.values() for t, _ in p})
    size = (max(4.2 * len(columns), 9), 3.4 * len(rows) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey="row")
    for (row, experts), panel in panels.items():
        axis = axes[rows.index(row), columns.index(experts)]
        for name, points in sorted(panel.items()):
            axis.plot(*zip(*sorted(points), strict=True), label=name, **styles[name])
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(tokens, [str(count) for count in tokens])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_title(f"E {experts}", fontsize=9)
        axis.grid(alpha=0.3, linewidth=0.4)
    for i, row in enumerate(rows):
        said = dict(zip(ROW, row, strict=True))
        axes[i, 0].set_ylabel(
            f"{said['mode']} {said['dtype']}, K {said['top_k']}, {said['threads']} thread(s)\n"
            f"D {said['width']}, F {said['hidden']}, time / dense MLP",
            fontsize=8,
        )
    for axis in axes[-1]:
        axis.set_xlabel("tokens")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
    shown = [name for name in names if name in lines]
    figure.legend(
        [lines[name] for name in shown],
        shown,
        loc="outside lower center",
        ncols=min(len(shown), 5 if len(columns) < 3 else 7),
        fontsize=8,
    )
    machine = results["machine"]
    where = machine.get("gpu", machine["cpu"])
    figure.suptitle(f"{where}, torch {machine.get('torch', '?')}; below 1 is faster", fontsize=9)
    figure.savefig(path, dpi=130)


def _panels(
    results: dict[str, Any], only: Mapping[str, str]
) -> dict[tuple[Any, int], dict[str, list[tuple[int, float]]]]:
    """Return points (T, ratio) by contestant, by row of panels and number of experts."""
    panels: dict[Any, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for found in results["cases"].values():
        case = found["case"]
        if any(str(case[field]) != value for field, value in only.items()):
            continue
        for name, facts in found.get("contestants", {}).items():
            if "over_dense" in facts and name not in HIDDEN:
                ratio = sum(facts["over_dense"]) / len(facts["over_dense"])
                row = tuple(case[field] for field in ROW)
                panels[row, case["experts"]][name].append((case["tokens"], ratio))
    return panels


def _style(name: str, position: int) -> dict[str, Any]:
    ours = name in OURS
    return {
        "color": OURS.get(name, f"C{position % 10}"),
        "marker": MARKS[position % len(MARKS)],
        "linewidth": 2.2 if ours else 1.0,
        "markersize": 5 if ours else 4,
        "linestyle": "--" if name.endswith(("_compiled", "_graphed")) else "-",
        "zorder": 3 if ours else 2,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.picture", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("png", type=Path)
    parser.add_argument("only", nargs="*", help="field=value of the cases to draw")
    options = parser.parse_args(arguments)
    only = dict(word.split("=", 1) for word in options.only)
    draw(json.loads(options.results.read_text()), options.png, only)


if __name__ == "__main__":
    main()
