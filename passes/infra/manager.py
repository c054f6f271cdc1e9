"""Run passes in the order of their facts, enforce their contracts, and notify observers.

For each pass: check what it requires, run it, compare what it changed with what it reports, verify
the graph (lint included), check what it provides, recompile, and notify the observers. An exception
is raised unchanged, with notes that name the pass and those before it. A fault inside a pass comes
with the graph as well; an error that the user has to fix (`InputError`) does not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch.fx import GraphModule

from moeify.errors import InputError, PassError, PassOrderError
from moeify.passes.infra.base import Pass, PassResult, PlanContext
from moeify.passes.infra.observers import Observer
from moeify.passes.infra.order import order_passes
from moeify.passes.infra.printer import print_graph
from moeify.passes.infra.report import PassReport, count_nodes, count_ops, diff_ops
from moeify.passes.infra.snapshot import Changes, Snapshot
from moeify.passes.infra.verifier import DEFAULT_RULES, Check, Rule, verify_graph

__all__ = ["PassManager", "PassReport", "order_passes"]

_NOTE_LINES = 40


class PassManager:
    """Passes that run as one.

    Args:
        passes: In any order; see `order_passes`. What no pass here provides must hold before.
        observers: Notified about every pass; see `moeify.passes.infra.observers`.
        rules: What must hold for the graph after every pass.
        checks: Functions that tell whether a fact holds for a graph. A fact without one holds if
            `ctx.facts` or a pass that ran declares it.

    Attributes:
        passes: The passes in the order in which they run.
        requires: Facts that must hold before the first pass.
        reports: One report for each pass of the latest run.
        facts: The facts that hold after the latest run.

    Raises:
        PassOrderError: The passes cannot be ordered.
        TypeError: Something in `passes` is not a pass.

    Example:
        >>> import torch
        >>> from moeify.passes.infra.base import PlanContext
        >>> gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
        >>> PassManager([]).run(gm, PlanContext()).modified
        False
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        observers: Sequence[Observer] = (),
        rules: Sequence[Rule] = DEFAULT_RULES,
        checks: Mapping[str, Check] | None = None,
    ) -> None:
        for p in passes:
            _check_is_pass(p)
        self.observers = tuple(observers)
        self.rules = tuple(rules)
        self.checks = dict(checks or {})
        self.requires: frozenset[str] = _external_facts(passes)
        self.passes = tuple(order_passes(passes, self.requires))
        self.reports: list[PassReport] = []
        self.facts: frozenset[str] = frozenset()

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        """Run all passes.

        Args:
            gm: The module whose graph is to be rewritten; may be changed in place.
            ctx: Plan and mesh; `ctx.facts` are the facts that hold for `gm`.

        Returns:
            The module to continue with, and whether any pass changed it.

        Raises:
            PassOrderError: A required fact does not hold, or only a disabled pass provides it.
            PassError: A pass broke its contract or left a graph that breaks a rule.
            MoeifyError: An observer names a pass that does not exist.
        """
        names = [p.name for p in self.passes]
        for observer in self.observers:
            observer.begin(names, gm)
        try:
            return self._run_all(gm, ctx)
        finally:
            for observer in self.observers:
                observer.end(self.reports)

    def _run_all(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        self.reports, self.facts = [], ctx.facts
        disabled = {p.name for p in self.passes if any(ob.skips(p) for ob in self.observers)}
        self._check_declared(ctx.facts, disabled)
        modified = False
        before: list[str] = []
        for p in self.passes:
            step = replace(ctx, facts=self.facts)
            if p.name in disabled:
                self._skip(p, gm, step)
                continue
            try:
                self._check_required(p, gm, step, disabled)
                snapshot = Snapshot.of(gm)
                result, seconds = self._call(p, gm, step)
                gm = result.graph_module
                self._finish(p, result, step, snapshot, seconds)
            except Exception as error:
                self._annotate(error, p, before, gm)
                raise
            modified |= result.modified
            before.append(p.name)
        return PassResult(gm, modified)

    def _check_declared(self, facts: frozenset[str], disabled: set[str]) -> None:
        """Check before anything runs that each pass will have its facts that have no check."""
        for p in self.passes:
            if p.name in disabled:
                continue
            for fact in sorted(p.requires - facts - self.checks.keys()):
                blame = [q.name for q in self.passes if q.name in disabled and fact in q.provides]
                if blame:
                    raise PassOrderError(
                        f"{p.name} requires {str(fact)!r}, which only the disabled "
                        f"{' and '.join(blame)} provides; disable {p.name} as well"
                    )
                raise PassOrderError(
                    f"{p.name} requires {str(fact)!r}, which does not hold for this graph and "
                    f"which no pass provides before it; known facts: "
                    f"{', '.join(sorted(facts)) or 'none'}"
                )
            facts |= p.provides

    def _check_required(
        self, p: Pass, gm: GraphModule, ctx: PlanContext, disabled: set[str]
    ) -> None:
        for fact, problems in self._violations(p.requires, gm, ctx):
            raise PassOrderError(
                f"{p.name} requires {str(fact)!r}, which does not hold: {problems}"
                + self._provider(p, fact, disabled)
            )

    def _violations(
        self, facts: frozenset[str], gm: GraphModule, ctx: PlanContext
    ) -> Iterator[tuple[str, str]]:
        """Yield (fact, its problems) for the facts that do not hold."""
        for fact in sorted(facts & self.checks.keys()):
            if problems := self.checks[fact](gm, ctx):
                yield fact, _listed(problems)

    def _provider(self, p: Pass, fact: str, disabled: set[str]) -> str:
        """Name the pass that would provide a fact, and why it has not."""
        makers = [q.name for q in self.passes if fact in q.provides and q is not p]
        if not makers:
            return "; no pass here provides it"
        if all(name in disabled for name in makers):
            return f"; {' and '.join(makers)} provides it, and is disabled: disable {p.name}, too"
        return f"; {' and '.join(makers)} provided it, and a pass between has undone it"

    def _skip(self, p: Pass, gm: GraphModule, ctx: PlanContext) -> None:
        """Leave a pass out; what it provides may hold anyway, where there was nothing to do."""
        self.facts |= {
            fact for fact in p.provides if fact in self.checks and not self.checks[fact](gm, ctx)
        }
        count = count_nodes(gm)
        self.reports.append(PassReport(p.name, False, 0.0, count, count, skipped=True))

    def _call(self, p: Pass, gm: GraphModule, ctx: PlanContext) -> tuple[PassResult, float]:
        for observer in self.observers:
            observer.before(p, gm)
        start = time.perf_counter()
        result = p.run(gm, ctx)
        seconds = time.perf_counter() - start
        _check_result(p, result)
        return result, seconds

    def _finish(
        self, p: Pass, result: PassResult, ctx: PlanContext, before: Snapshot, seconds: float
    ) -> None:
        """Hold a pass to its contract, recompile what it changed, and report it."""
        gm = result.graph_module
        changes = before.compare(gm)
        _check_changes(p, result, changes)
        facts = ctx.facts | p.provides
        verify_graph(gm, replace(ctx, facts=facts), self.rules)
        self._check_provided(p, gm, ctx)
        if result.modified:
            for module in gm.modules():
                if isinstance(module, GraphModule):
                    module.recompile()
        report = PassReport(
            p.name,
            result.modified,
            seconds,
            before.nodes,
            count_nodes(gm),
            diff_ops(before.ops, count_ops(gm)),
            analysis=bool(changes.notes),
        )
        self.facts = facts
        self.reports.append(report)
        for observer in self.observers:
            observer.after(p, gm, report)

    def _check_provided(self, p: Pass, gm: GraphModule, ctx: PlanContext) -> None:
        for fact, problems in self._violations(p.provides, gm, ctx):
            raise PassError(
                f"{p.name} provides {str(fact)!r}, which does not hold after it: {problems}"
            )

    def _annotate(self, error: Exception, p: Pass, before: Sequence[str], gm: GraphModule) -> None:
        """Note on an exception where it happened, and the graph unless the message suffices."""
        after = ", ".join(before) or "no other pass"
        error.add_note(f"while running pass {p.name!r}, after {after}")
        if isinstance(error, InputError | PassOrderError):
            return
        written = [where for ob in self.observers if (where := ob.failed(p, gm))]
        if written:
            error.add_note(f"the graph at this point is in {', '.join(written)}")
            return
        lines = print_graph(gm).splitlines()
        if len(lines) > _NOTE_LINES:
            half = _NOTE_LINES // 2
            left_out = f"  ... {len(lines) - 2 * half} lines; MOEIFY_DUMP=dir writes all ..."
            lines = [*lines[:half], left_out, *lines[-half:]]
        error.add_note("\n".join(["the graph at this point:", *lines]))


def _listed(problems: Sequence[str], most: int = 3) -> str:
    more = f"; and {len(problems) - most} more" if len(problems) > most else ""
    return "; ".join(problems[:most]) + more


def _check_is_pass(p: object) -> None:
    if isinstance(p, type):
        raise TypeError(f"{p.__name__} is a class; give an instance: {p.__name__}()")
    if not isinstance(p, Pass):
        members = ("name", "requires", "provides", "run")
        lacks = [member for member in members if not hasattr(p, member)]
        raise TypeError(f"{type(p).__name__} is not a pass: it lacks {', '.join(lacks)}")


def _external_facts(passes: Sequence[Pass]) -> frozenset[str]:
    """Return the facts that some pass requires and no other pass provides."""
    return frozenset(
        str(fact)
        for p in passes
        for fact in p.requires
        if not any(fact in q.provides for q in passes if q is not p)
    )


def _check_result(p: Pass, result: object) -> None:
    if not isinstance(result, PassResult):
        raise PassError(f"{p.name} returned {type(result).__name__}; return a PassResult")
    if not isinstance(result.graph_module, GraphModule):
        kind = type(result.graph_module).__name__
        raise PassError(f"{p.name} returned a {kind} for the graph; return a GraphModule")


def _check_changes(p: Pass, result: PassResult, changes: Changes) -> None:
    """Compare what a pass reports with what it did."""
    if changes and not result.modified:
        what = changes.program or changes.notes
        raise PassError(f"{p.name} changed {what} and returned modified=False; return True")
    if result.modified and not changes:
        raise PassError(f"{p.name} changed nothing and returned modified=True; return False")
    if changes.program and changes.notes:
        raise PassError(
            f"{p.name} changed {changes.program} and also {changes.notes}: an analysis writes on "
            "nodes, a transformation changes the program, and no pass does both; make it two"
        )
