"""The page and the picture of the study: every number and every verdict is from the results."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.findings_claims import MARGIN, Claim, judge, values, verdicts
from benchmarks.findings_study import BASELINE, DENSE, TEACHER, Size, contestants

PANELS: Final = {
    "Upcycling": (BASELINE, "copy", "noise", "drop", "scratch"),
    "Where the experts are": ("first half", "second half", "copy"),
    "Top-2, residual, pyramid": ("copy", "top-2", "residual", TEACHER),
    "Students": (TEACHER, "student", "student KD", "student staged"),
    "Tight capacity; the weight of top-1": (
        "tight random",
        "tight position",
        "copy",
        "probability",
    ),
}
WHERE: Final = ("copy", "top-2", "residual", TEACHER)
"""Contestants that the dense model is drawn against, by FLOPs and by time."""


def page(results: dict[str, Any], file: Path) -> str:
    """Return the page in Markdown.

    Args:
        results: What `benchmarks.findings` writes.
        file: Where they are; the picture lies beside it.
    """
    size, machine = Size(**results["size"]), results["machine"]
    seeds = len({run["seed"] for run in results["jobs"]})
    text, rows = results["text"], verdicts(results)
    counts = {row["verdict"]: 0 for row in rows}
    for row in rows:
        counts[row["verdict"]] += 1
    said = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    step = f"{size.tokens_per_step:,}"
    tokens = f"{size.steps * size.tokens_per_step:,}"
    before = f"{size.dense_steps * size.tokens_per_step:,}"
    return _wrapped(f"""# The papers' findings, measured

Made by `python -m benchmarks.findings --page {file.name}` from
[the results](../benchmarks/results/{file.name}); nothing here is written by hand. The study itself:

```sh
pip install '.[study]'
python -m benchmarks.findings --size {size.name} --seeds {seeds} --out FOLDER
```

Size `{size.name}`: a GPT-2 of {size.layers} layers and width {size.width} over bytes, context
{size.context}. It is trained on {before} tokens; every contestant goes on from there for {tokens}
more, in {size.steps} steps, with the same text in the same order (`scratch` starts anew and takes
both). {seeds} seeds: of weights, order of text, routing.

The text is what ships with Python {machine["python"]}: {text["train_files"]:,} files to train on,
{text["train_bytes"] / 1e6:.1f} MB, of which a contestant reads a part. {text["held_out_files"]}
files are held out whole, by a hash of their path; {text["identical_left_out"]} copies and
{text["near_identical_left_out"]} near-copies are left out. Losses are nats per held-out byte, over
{size.held_out:,} bytes, without dropping.

Measured on {_machine(machine)}.

## Findings

Of {len(rows)}: {said}.

Differences are first minus second, paired by seed (times: by timed round of one machine), with
their 95% t interval. *Reproduced*: the interval lies on the finding's side of zero; *not
reproduced*: on the other; else *within noise*. "On par" means above by less than {MARGIN:.0%}. Each
is tested alone: of twenty true nulls, one would come out wrongly on either side.

{_findings(rows)}

## Contestants

{_contestants(results, size)}

± is the standard deviation over seeds. Active: the parameters that one token uses. FLOPs of
training, per token, the teacher's with them. Time: the median training step of {step} tokens,
alone on the machine, on two threads; of `student staged` a step with the teacher.

![Held-out loss of all contestants]({_picture(file)})

## Where MoE loses

{_where(results)}

## Size

{_sizes(results)}

## What this does not say

- {_millions(results)} parameters and {tokens} tokens are far from the papers' sizes, where experts
  have seen enough of their own tokens to differ. Findings may turn with scale.
{_tuned(size)}- All contestants have one learning rate and one batch, which may suit some better.
- Optimizers start anew after conversion, also the dense model's; the one of `scratch` does not.
- Students start from the kept layers of the converted dense model and see the tokens that their
  teacher saw after conversion; the paper's start from nothing. Their teacher is fully trained.
- The tight runs train at a capacity that drops routes and are evaluated without dropping.
""")


def draw(results: dict[str, Any], path: Path) -> None:
    """Draw mean held-out losses: a panel per question; MoE and dense by FLOPs and time."""
    from matplotlib.figure import Figure

    runs: dict[str, list[dict[str, Any]]] = {}
    for run in results["jobs"]:
        runs.setdefault(run["job"], []).append(run)
    figure = Figure(figsize=(17, 8), layout="constrained")
    axes = list(figure.subplots(2, 4).flat)
    size = Size(**results["size"])
    for axis, (title, names) in zip(axes, PANELS.items(), strict=False):
        for name in names:
            shift = -size.dense_steps if name == "scratch" else 0
            _line(axis, runs.get(name, []), 1.0, shift)
        axis.set(title=title, xlabel="steps after the dense model's")
    budgets = (("flops", 1e-12 * size.tokens_per_step, "TFLOPs of training"), ("seconds", 1, "s"))
    for axis, (metric, unit, label) in zip(axes[len(PANELS) :], budgets, strict=False):
        for name in (BASELINE, *WHERE):
            cost = results["costs"].get(name, {}).get(metric)
            if cost:
                _line(axis, runs.get(name, []), unit * statistics.median(cost), 0)
        what = "active FLOPs" if metric == "flops" else "time on this machine"
        axis.set(title=f"Loss against {what}", xlabel=label)
    for axis in figure.axes:
        if not axis.lines:
            axis.set_axis_off()
            continue
        axis.set_ylabel("held-out loss, nats per byte")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def _line(axis: Any, runs: Sequence[dict[str, Any]], scale: float, shift: int) -> None:
    """Draw a contestant's mean over seeds, with their range behind it, from step 0 on."""
    if not runs:
        return
    columns = list(zip(*(run["curve"] for run in runs), strict=True))
    at = [scale * (column[0]["step"] + shift) for column in columns]
    losses = [[point["loss"] for point in column] for column in columns]
    kept = [i for i, x in enumerate(at) if x >= 0]
    x = [at[i] for i in kept]
    (line,) = axis.plot(
        x, [statistics.mean(losses[i]) for i in kept], marker=".", label=runs[0]["job"]
    )
    low, high = [min(losses[i]) for i in kept], [max(losses[i]) for i in kept]
    axis.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _wrapped(text: str) -> str:
    """Wrap paragraphs and the points of lists; all else stays as it is."""
    parts = []
    for part in text.split("\n\n"):
        if part.startswith("- "):
            points = part.rstrip().removeprefix("- ").split("\n- ")
            part = "\n".join(
                f"- {textwrap.fill(' '.join(p.split()), 100, subsequent_indent='  ')}"
                for p in points
            )
        elif part[0] not in "#`|!":
            part = textwrap.fill(part, 100, break_long_words=False, break_on_hyphens=False)
        parts.append(part)
    return "\n\n".join(parts).rstrip() + "\n"


def _findings(rows: list[dict[str, Any]]) -> str:
    lines = ["| finding | source | first, second | difference | verdict |", "|---|---|---|---|---|"]
    for row in rows:
        gap = "-"
        if "half_width" in row:
            unit = " s per step" if row["metric"] == "step_seconds" else ""
            gap = f"{row['difference']:+.4f} ± {row['half_width']:.4f}{unit}"
        elif "difference" in row:
            gap = f"{row['difference']:+,.0f} parameters"
        pair = "; ".join(f"`{name}`" for name in row["pair"])
        cells = (row["claim"], row["source"], pair, gap, f"**{row['verdict']}**")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _contestants(results: dict[str, Any], size: Size) -> str:
    lines = [
        "| contestant | | steps | loss at step 0 | loss | parameters | active | MFLOPs | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    known = contestants(size)
    for name in dict.fromkeys(run["job"] for run in results["jobs"]):
        run = next(r for r in results["jobs"] if r["job"] == name)
        what = known[name].what if name in known else "what all but `scratch` start from"
        losses = values(results, name, "loss")
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        first = statistics.mean(values(results, name, "first_loss"))
        times = values(results, name, "step_seconds")
        ms = f"{1000 * statistics.median(times):.0f}" if times else "-"
        cells = (
            f"`{name}`",
            what,
            f"{run['steps']:,}",
            f"{first:.4f}",
            f"{statistics.mean(losses):.4f}{spread}",
            f"{run['parameters']:,}",
            f"{run['active_parameters']:,}",
            f"{run['train_flops_per_token'] / 1e6:.2f}",
            ms,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _where(results: dict[str, Any]) -> str:
    """Return what MoE pays and gains against the dense model at equal tokens, FLOPs and time."""
    costs = results["costs"]
    lines = [
        f"Against `{BASELINE}`, the dense model at equal tokens:",
        "",
        "| contestant | loss | verdict | FLOPs per token | time per step |",
        "|---|---|---|---|---|",
    ]
    for name in (*WHERE, "copy, equal FLOPs", "copy, equal time"):
        pair = [values(results, each, "loss") for each in (name, BASELINE)]
        if not all(pair) or len(pair[0]) != len(pair[1]):
            continue
        said = judge(Claim("", "", name, BASELINE), *pair)
        word = {"reproduced": "ahead", "not reproduced": "behind"}
        ratio = {
            metric: statistics.median(costs[name][metric])
            / statistics.median(costs[BASELINE][metric])
            for metric in ("flops", "seconds")
        }
        gap = f"{said['difference']:+.4f} ± {said['half_width']:.4f}" if "n" in said else "-"
        verdict = word.get(said["verdict"], said["verdict"])
        lines.append(
            f"| `{name}` | {gap} | {verdict} | {ratio['flops']:.2f}x | {ratio['seconds']:.2f}x |"
        )
    return "\n".join([*lines, "", _budgets(results)])


def _budgets(results: dict[str, Any]) -> str:
    said = []
    for name, what in (("copy, equal FLOPs", "active FLOPs"), ("copy, equal time", "time")):
        runs = [run for run in results["jobs"] if run["job"] == name]
        if runs:
            said.append(f"{runs[0]['steps']:,} steps for equal {what}")
    size = Size(**results["size"])
    return (
        f"The dense model takes {size.steps:,} steps; `copy` gets {' and '.join(said)}, each a run "
        "of its own with a learning rate that falls over its own steps."
    )


def _sizes(results: dict[str, Any]) -> str:
    names = ("copy", TEACHER, "student")
    found = {name: values(results, name, "parameters") for name in names}
    if not all(found.values()):
        return "Not all of standard MoE, PR-MoE and student were run."
    standard, pyramid, student = (found[name][0] for name in names)
    return (
        f"Standard MoE has {standard:,.0f} parameters, PR-MoE {pyramid:,.0f} "
        f"({standard / pyramid:.2f}x smaller), its student {student:,.0f} "
        f"({standard / student:.2f}x smaller than standard MoE). At the paper's shapes it is 3.7x: "
        "[students](students.md#what-it-saves)."
    )


def _tuned(size: Size) -> str:
    if size.name != "tiny":
        return ""
    return (
        "- The batch (8, not 16) and the learning rate (2e-3, not 3e-3) were chosen by the losses\n"
        "  of `continued`, `copy` and `drop` on the held-out text, for one seed.\n"
    )


def _millions(results: dict[str, Any]) -> str:
    counts = values(results, DENSE, "parameters")
    return f"{counts[0] / 1e6:.2f} million" if counts else "few"


def _machine(machine: dict[str, str]) -> str:
    what = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "moeify"))
    return f"{what}, {machine['memory_gib']} GiB; Python {machine['python']}, {versions}"


def _picture(file: Path) -> str:
    return f"../benchmarks/results/{file.with_suffix('.png').name}"
