"""`moeify report`: what is asked for on the command line, as a page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moeify.cli.output import say
from moeify.reporting.page import gather, write_page
from moeify.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console

    from moeify.plan.plan import Plan


def report_on(
    source: str, out: Path, run: Path | None, plan: Plan | None, console: Console
) -> dict[str, Any]:
    """Write a page, say what is not in it, and return that as data.

    Args:
        source: Folder of a model, or file of a run.
        out: Page to write.
        run: File of a run, beside a model.
        plan: For a dense model.
        console: Where to print.

    Raises:
        MoeifyError: There is no model or run, it is damaged, or the page cannot be written.
    """
    facts, done = gather(source, run, plan)
    written = write_page(facts, done, out)
    say(console, f"{out}: {format_bytes(written)}")
    for text in facts.missing:
        say(console, f"not in it: {text}")
    return {"out": str(out), "bytes": written, "missing": facts.missing}
