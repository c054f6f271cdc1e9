"""The parts of a report's page, in their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from moeify.reporting.charts import pyramid, pyramid_key
from moeify.reporting.data import Facts
from moeify.reporting.graphs import Stage
from moeify.reporting.html import Element, el, fill, scrolled, short, table
from moeify.reporting.run import Run
from moeify.reporting.training import training
from moeify.units import format_bytes
from moeify.version import __version__

_MOST_ROWS: Final = 400  # layers that are drawn and listed
_GRAPH_BYTES: Final = 1_000_000
_PLAN_LINES: Final = 2000
_LINE: Final = 260


def sections(facts: Facts, run: Run | None) -> list[Element]:
    """Return the elements of the page's body."""
    parts = [
        ("size", "Parameters", _size(facts)),
        ("layers", "Layers and experts", _layers(facts)),
        ("training", "Training", training(run, facts.rows)),
        ("plan", "Plan", _plan(facts)),
        ("passes", "Passes and graphs", _passes(facts)),
    ]
    links = [el("li", el("a", title, href=f"#{key}")) for key, title, _ in parts]
    body = el("main", _missing(facts, run), id="content", tabindex="-1")
    for key, title, children in parts:
        head = el("h2", title, id=f"{key}-title")
        body.append(el("section", head, *children, id=key, aria_labelledby=f"{key}-title"))
    title = short(facts.model or "A run", 120)
    return [
        el("a", "Skip to the content", href="#content", cls="skip"),
        el(
            "header",
            el("h1", f"{title}: moeify report"),
            el("p", f"{facts.kind}, from {short(facts.source, 300)}", cls="soft"),
        ),
        el("nav", el("ul", *links), aria_label="Parts of the page"),
        body,
        el("footer", f"Written by moeify {__version__}. This page loads nothing."),
    ]


def _missing(facts: Facts, run: Run | None) -> Element | None:
    missing = [*facts.missing, *([] if run else ["training: no run was given"])]
    notes = [*facts.notes, *(run.notes if run else [])]
    if not missing and not notes:
        return None
    box = el("div", cls="miss")
    for title, texts in (("Not on this page", missing), ("Notes", notes)):
        if texts:
            items = [el("li", short(text, 600)) for text in texts[:40]]
            if len(texts) > 40:
                items.append(el("li", f"and {len(texts) - 40} more"))
            fill(box, el("strong", title), el("ul", *items))
    return box


def _size(facts: Facts) -> list[Element]:
    if facts.total is None:
        return [el("p", "Not known: see the note above.")]
    tiles = []
    for name, value in (
        ("Dense model", facts.dense),
        ("Total", facts.total),
        ("Active per token", facts.active),
    ):
        if value is None:
            continue
        small = f"{value:,}" if value >= 1000 else ""
        if name != "Dense model" and facts.dense:
            small += f" = {value / facts.dense:.2f} x dense"
        tiles.append(el("div", el("dt", name), el("dd", _count(value), el("small", small))))
    if facts.size is not None:
        tiles.append(el("div", el("dt", "Bytes"), el("dd", format_bytes(facts.size))))
    moe = sum(row.state == "moe" for row in facts.rows)
    dense = f"{len(facts.rows) - moe} stay dense" if facts.whole else "dense ones not known"
    tiles.append(el("div", el("dt", "MoE layers"), el("dd", str(moe), el("small", dense))))
    return [el("dl", *tiles, cls="tiles")]


def _count(value: int) -> str:
    number = float(value)
    for unit in ("", "K", "M", "B"):
        if number < 999.5:
            return f"{number:.0f}" if not unit else f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:,.3g} T"


def _layers(facts: Facts) -> list[Element]:
    if not facts.rows:
        return [el("p", "Not known: see the note above.")]
    rows = facts.rows[:_MOST_ROWS]
    moe = [row for row in facts.rows if row.state == "moe"]
    counts = sorted({row.experts for row in moe})
    spread = " to ".join(str(count) for count in dict.fromkeys([*counts[:1], *counts[-1:]]))
    label = f"Layers by experts: {len(moe)} MoE layers of {spread} experts"
    if facts.whole:
        label += f", {len(facts.rows) - len(moe)} other MLPs in place"
    listed = []
    for row in rows:
        is_moe = row.state == "moe"
        what = "-" if not is_moe or row.residual == "none" else row.residual
        listed.append(
            [
                short(row.name, 60),
                row.state,
                row.widths,
                what,
                row.start or "-",
                str(row.experts) if is_moe else "-",
                str(row.top_k) if is_moe else "-",
                f"{row.before:,}",
                f"{row.after:,}",
                f"{row.active:,}",
            ]
        )
    headers = "layer,state,widths,residual,start,experts,k,before,after,active".split(",")
    picture = el(
        "figure",
        el("figcaption", label + ", the first on top."),
        pyramid_key(),
        scrolled(label, pyramid(rows, label)),
    )
    found = [
        el("div", picture, table("Parameters by layer", headers, listed, numbers=5), cls="two")
    ]
    refused = [el("li", f"{short(r.name)}: {short(r.why)}") for r in facts.rows if r.why]
    if refused:
        found += [el("p", "Cannot be converted:"), el("ul", *refused[:40])]
    if len(rows) < len(facts.rows):
        cut = f"Only the first {_MOST_ROWS} of {len(facts.rows)} layers are shown."
        found.append(el("p", cut, cls="soft"))
    return found


def _plan(facts: Facts) -> list[Element]:
    if facts.plan is None:
        return [el("p", "Not known: see the note above.")]
    lines, cut = _cut(facts.plan.rstrip("\n").split("\n"), _PLAN_LINES, 100_000)
    block = el("pre", el("code", "\n".join(lines)), tabindex=0, role="region", aria_label="Plan")
    return [block, *cut]


def _passes(facts: Facts) -> list[Element]:
    if not facts.stages:
        return [el("p", "The graphs are not known: see the note above.")]
    texts = [text for stage in facts.stages for text in _texts(stage).values()]
    room = _GRAPH_BYTES // max(len(texts), 1)
    found = [el("p", "Passes in the order in which they ran; + and - mark changed lines.")]
    for number, stage in enumerate(facts.stages, 1):
        head = el("h3", f"{number}. {short(stage.name)}")
        found += [head, el("p", short(stage.summary, 600))]
        for title, text in _texts(stage).items():
            found.append(_text(f"{title} {short(stage.name)}", title, text, room))
    return found


def _texts(stage: Stage) -> dict[str, str]:
    """Return what is shown of a pass; empty if it changed nothing."""
    if not stage.diff:
        return {}
    return {"Diff of": stage.diff, "Graph before": stage.before, "Graph after": stage.after}


def _text(label: str, title: str, text: str, room: int) -> Element:
    whole = text.rstrip("\n").split("\n")
    lines, cut = _cut(whole, 4000, room)
    code = el("pre", tabindex=0, role="region", aria_label=label)
    if title.startswith("Diff"):
        for line, kind in _marked(lines):
            code.append(el("span", line + "\n", cls=kind))
    else:
        code.append(el("code", "\n".join(lines)))
    return el("details", el("summary", f"{label}, {len(whole)} lines"), *cut, code)


def _marked(lines: list[str]) -> Iterator[tuple[str, str | None]]:
    for line in lines:
        head = line.startswith(("+++", "---", "@@"))
        yield line, "at" if head else {"+": "add", "-": "del"}.get(line[:1])


def _cut(lines: list[str], most: int, room: int) -> tuple[list[str], list[Element]]:
    """Return as many lines as there is room for, and a notice if some are left out."""
    kept: list[str] = []
    for line in lines[:most]:
        shown = short(line, _LINE)
        room -= len(shown.encode("utf-8", "replace")) + 34
        if room < 0:
            break
        kept.append(shown)
    if len(kept) == len(lines):
        return kept, []
    return kept, [
        el("p", f"Only the first {len(kept)} of {len(lines)} lines are shown.", cls="soft")
    ]
