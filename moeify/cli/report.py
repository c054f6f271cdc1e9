"""`moeify report`: write the page and name what it lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from moeify.cli.output import say
from moeify.plan.plan import Plan
from moeify.reporting.page import gather, write_page
from moeify.units import format_bytes


def report_on(
    source: str, out: Path, run: Path | None, plan: Plan | None, console: Console
) -> dict[str, Any]:
    """Write a page about a model's folder or a run's file, and return what it lacks as data."""
    facts, done = gather(source, run, plan)
    written = write_page(facts, done, out)
    say(console, f"{out}: {format_bytes(written)}")
    for text in facts.missing:
        say(console, f"not in it: {text}")
    return {"out": str(out), "bytes": written, "missing": facts.missing}
