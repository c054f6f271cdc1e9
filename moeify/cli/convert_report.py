"""What `moeify convert` prints: the plan, notes, a progress bar, and the result."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich import progress as bars
from rich.console import Console

from moeify.cli.convert_check import Verdict
from moeify.cli.output import say
from moeify.errors import MoeifyError
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.selection import shorten
from moeify.storage.writer import Advance
from moeify.units import format_bytes


@contextmanager
def progress(total: int) -> Iterator[Advance | None]:
    """Show bytes, speed and time left on a terminal; show nothing elsewhere."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (
        bars.TextColumn("writing"),
        bars.BarColumn(bar_width=None),
        bars.DownloadColumn(binary_units=True),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def print_job(resolved: ResolvedPlan | None, report: Mapping[str, Any], console: Console) -> None:
    """Print what is to be written."""
    if resolved is not None:
        console.print(resolved)
    for note in grouped(report["notes"]):
        say(console, f"note: {note}")
    for warning in report["warnings"]:
        say(console, f"warning: {warning}")
    if report["not_in_source"]:
        names = shorten(report["not_in_source"], 4)
        say(console, f"warning: the source lacks {names}; drawn at random")


def grouped(notes: Iterable[str]) -> list[str]:
    """Join `not A: reason` and `not B: reason` into `not A, B: reason`."""
    found: dict[tuple[bool, str], list[str]] = {}
    for note in notes:
        name, colon, reason = note.removeprefix("not ").partition(": ")
        refusal = note.startswith("not ") and bool(colon)
        found.setdefault((refusal, reason if refusal else note), []).append(name)
    return [f"not {', '.join(n)}: {r}" if refusal else r for (refusal, r), n in found.items()]


def print_dry(report: Mapping[str, Any], console: Console) -> None:
    """Print what a dry run found; raise if the disk is too small."""
    needed, free = report["bytes"], report["free_bytes"]
    say(
        console,
        f"would write {format_bytes(needed)} of the kind `{report['kind']}` to {report['out']}; "
        f"{format_bytes(free)} are free there; nothing was written",
    )
    if needed > free:
        raise MoeifyError(f"{report['out']}: {needed:,} bytes are needed and {free:,} are free")


def print_done(report: Mapping[str, Any], verdict: Verdict, console: Console) -> None:
    """Print what was written."""
    if verdict.difference is None:
        say(console, f"NOT compared with the source: {verdict.reason}")
    else:
        word = "" if verdict.promised else "; this plan does not promise the same numbers"
        say(
            console,
            f"step 0: outputs differ by {verdict.difference:.1e} on {verdict.inputs} inputs in a "
            f"fresh process (relative to the source{word})",
        )
    seconds = report["seconds"]
    say(
        console,
        f"prepare {seconds['prepare']:.1f} s, write {seconds['write']:.1f} s, "
        f"verify {seconds['verify']:.1f} s, peak memory {format_bytes(report['peak_memory'])}; "
        f"{format_bytes(report['bytes'])} of the kind `{report['kind']}` in {report['out']}",
    )
