"""The graph before and after every pass, kept as text for a report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule

from moeify.passes.infra.base import Pass
from moeify.passes.infra.observers import Observer
from moeify.passes.infra.printer import diff_graphs, print_graph
from moeify.passes.infra.report import PassReport


@dataclass(frozen=True, slots=True)
class Stage:
    """One pass."""

    name: str
    summary: str  # in one line without times, which differ from run to run
    before: str
    after: str
    diff: str  # unified; "" if nothing changed


class Stages(Observer):
    """Keeps every stage of a run, in `found`."""

    def __init__(self) -> None:
        self.found: list[Stage] = []
        self._text = ""

    def begin(self, names: Sequence[str], gm: GraphModule) -> None:
        self._text = print_graph(gm, numbers=False)

    def after(self, pass_: Pass, gm: GraphModule, report: PassReport) -> None:
        text = print_graph(gm, numbers=False)
        diff = diff_graphs(self._text, text) if text != self._text else ""
        summary = _summary(report, changed=bool(diff))
        self.found.append(Stage(pass_.name, summary, self._text, text, diff))
        self._text = text


def _summary(report: PassReport, *, changed: bool) -> str:
    if not changed:
        return "changed nothing"
    if not report.ops and report.nodes_before == report.nodes_after:
        return f"{report.nodes_after} nodes, the same calls; only their metadata changed"
    ops = "".join(f", {count:+d} {op}" for op, count in report.ops.items())
    return f"{report.nodes_before} to {report.nodes_after} nodes{ops}"
