"""Run passes in the order of their facts, check the graph after each, and tell observers.

The manager is a pass itself: what it requires is what its passes cannot get from each other, what
it provides is what holds after the last of them. A manager can thus be part of another.

For each pass: run, verify (lint included), recompile, then tell the observers. If something fails,
the exception is raised as it is, with notes that name the pass, the passes before it, and print
the graph.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch.fx import GraphModule

from moeify.errors import MoeifyError, PassError, PassOrderError
from moeify.passes.base import Pass, PassResult, PlanContext
from moeify.passes.observers import Observer
from moeify.passes.order import order_passes
from moeify.passes.printer import print_graph
from moeify.passes.report import PassReport, count_nodes, count_ops, diff_ops
from moeify.passes.verifier import DEFAULT_RULES, Rule, verify_graph

__all__ = ["PassManager", "PassReport", "order_passes"]

_NOTE_LINES = 200


class PassManager:
    """Passes that run as one.

    Args:
        passes: In any order; see `order_passes`. What no pass here provides must hold before.
        name: Name of the manager as a pass.
        observers: Told about every pass; see `moeify.passes.observers`.
        rules: What must hold for the graph after every pass.
        disabled: Names of passes to leave out.

    Attributes:
        requires: Facts that must hold before the first pass.
        provides: Facts that hold after the last pass because of one of them.
        invalidates: Facts that no longer hold after the last pass.
        reports: One report for each pass of the latest run.
        facts: The facts that hold after the latest run.

    Raises:
        PassOrderError: The passes cannot be ordered.
        TypeError: Something in `passes` is no pass.

    Example:
        >>> import torch
        >>> from moeify.passes.base import PlanContext
        >>> gm = torch.fx.symbolic_trace(torch.nn.Linear(2, 2))
        >>> PassManager([]).run(gm, PlanContext()).modified
        False
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        *,
        name: str = "pipeline",
        observers: Sequence[Observer] = (),
        rules: Sequence[Rule] = DEFAULT_RULES,
        disabled: frozenset[str] = frozenset(),
    ) -> None:
        for p in passes:
            _check_is_pass(p)
        self.name = name
        self.observers = tuple(observers)
        self.rules = tuple(rules)
        self.disabled = disabled
        self.requires: frozenset[str] = _external_facts(passes)
        self.passes = tuple(order_passes(passes, self.requires))
        self.provides, self.invalidates = _composed(self.passes)
        self.reports: list[PassReport] = []
        self.facts: frozenset[str] = frozenset()

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        """Run all passes.

        Args:
            gm: The module whose graph is to be rewritten; may be changed in place.
            ctx: Plan and mesh; `ctx.facts` are the facts that hold for `gm`.

        Returns:
            The module to go on with, and whether any pass changed it.

        Raises:
            PassOrderError: A required fact does not hold, or only a disabled pass provides it.
            PassError: A pass broke its contract or left a graph that breaks a rule.
            MoeifyError: `disabled`, or an observer, names a pass that does not exist.
        """
        names = list(_names(self.passes))
        unknown = sorted(self.disabled - set(names))
        if unknown:
            raise MoeifyError(
                f"cannot disable {', '.join(unknown)}: no such pass; there are {', '.join(names)}"
            )
        for observer in self.observers:
            observer.begin(names, gm)
        try:
            return self._run_all(gm, ctx, self.observers, self.disabled)
        finally:
            for observer in self.observers:
                observer.end(self.reports)

    def _run_all(
        self,
        gm: GraphModule,
        ctx: PlanContext,
        observers: tuple[Observer, ...],
        disabled: frozenset[str],
    ) -> PassResult:
        self.reports = []
        self.facts = ctx.facts
        disabled |= {p.name for p in self.passes if any(ob.skips(p) for ob in observers)}
        self._check_facts(ctx.facts, disabled)
        modified = False
        before: list[str] = []
        for p in self.passes:
            if p.name in disabled:
                count = count_nodes(gm)
                self.reports.append(PassReport(p.name, False, 0.0, count, count, skipped=True))
                continue
            step = replace(ctx, facts=self.facts)
            stage = _Stage.of(gm)
            try:
                result, seconds = _apply(p, gm, step, observers, disabled, stage)
                gm = result.graph_module
                self._finish(p, result, step, observers, stage, seconds)
            except Exception as error:
                _annotate(error, p, before, gm)
                raise
            modified |= result.modified
            before.append(p.name)
        return PassResult(gm, modified)

    def _finish(
        self,
        p: Pass,
        result: PassResult,
        ctx: PlanContext,
        observers: tuple[Observer, ...],
        stage: _Stage,
        seconds: float,
    ) -> None:
        """Verify and recompile what a pass returned, and tell about it."""
        gm = result.graph_module
        facts = (ctx.facts - p.invalidates) | p.provides
        facts = p.facts if isinstance(p, PassManager) else facts
        verify_graph(gm, replace(ctx, facts=facts), self.rules)
        if result.modified:
            for module in gm.modules():
                if isinstance(module, GraphModule):
                    module.recompile()
        changes = diff_ops(stage.ops, count_ops(gm))
        report = PassReport(p.name, result.modified, seconds, stage.nodes, count_nodes(gm), changes)
        self.facts = facts
        self.reports.append(report)
        for observer in observers:
            observer.after(p, gm, report)

    def _check_facts(self, facts: frozenset[str], disabled: frozenset[str]) -> None:
        """Walk through the passes that will run, and see that each has its facts."""
        for p in self.passes:
            if p.name in disabled:
                continue
            for fact in sorted(p.requires - facts):
                blame = [q.name for q in self.passes if q.name in disabled and fact in q.provides]
                if blame:
                    raise PassOrderError(
                        f"{p.name} requires {str(fact)!r}, which only the disabled "
                        f"{' and '.join(blame)} provides; disable {p.name} as well"
                    )
                raise PassOrderError(
                    f"{p.name} requires {str(fact)!r}, which does not hold for this graph and "
                    f"which no pass of {self.name!r} provides before it; known facts: "
                    f"{', '.join(sorted(facts)) or 'none'}"
                )
            facts = (facts - p.invalidates) | p.provides


@dataclass(frozen=True, slots=True)
class _Stage:
    """A graph before a pass, as far as it is compared with the graph after it."""

    ops: Counter[str]
    nodes: int
    text: str

    @classmethod
    def of(cls, gm: GraphModule) -> _Stage:
        return cls(count_ops(gm), count_nodes(gm), print_graph(gm, meta=False))


def _apply(
    p: Pass,
    gm: GraphModule,
    ctx: PlanContext,
    observers: tuple[Observer, ...],
    disabled: frozenset[str],
    stage: _Stage,
) -> tuple[PassResult, float]:
    """Run one pass, and see that it kept its contract."""
    for observer in observers:
        observer.before(p, gm)
    start = time.perf_counter()
    if isinstance(p, PassManager):
        result = p._run_all(gm, ctx, (*observers, *p.observers), disabled | p.disabled)
    else:
        result = p.run(gm, ctx)
    seconds = time.perf_counter() - start
    _check_result(p, result, stage.text)
    return result, seconds


def _check_is_pass(p: object) -> None:
    if isinstance(p, type):
        raise TypeError(f"{p.__name__} is a class; give an instance: {p.__name__}()")
    if not isinstance(p, Pass):
        members = ("name", "requires", "provides", "invalidates", "run")
        lacks = [member for member in members if not hasattr(p, member)]
        raise TypeError(f"{type(p).__name__} is no pass: it lacks {', '.join(lacks)}")


def _external_facts(passes: Sequence[Pass]) -> frozenset[str]:
    """Facts that some pass requires and no other pass provides."""
    return frozenset(
        str(fact)
        for p in passes
        for fact in p.requires
        if not any(fact in q.provides for q in passes if q is not p)
    )


def _composed(ordered: Sequence[Pass]) -> tuple[frozenset[str], frozenset[str]]:
    """What holds, and what no longer holds, after all of `ordered`."""
    provides: frozenset[str] = frozenset()
    invalidates: frozenset[str] = frozenset()
    for p in ordered:
        provides = (provides - p.invalidates) | p.provides
        invalidates = (invalidates | p.invalidates) - p.provides
    return provides, invalidates


def _names(passes: Sequence[Pass]) -> Iterator[str]:
    """Names of all passes, those of nested managers after the manager's own."""
    for p in passes:
        yield p.name
        if isinstance(p, PassManager):
            yield from _names(p.passes)


def _check_result(p: Pass, result: object, before: str) -> None:
    if not isinstance(result, PassResult):
        raise PassError(f"{p.name} returned {type(result).__name__}; return a PassResult")
    if not isinstance(result.graph_module, GraphModule):
        kind = type(result.graph_module).__name__
        raise PassError(f"{p.name} returned a {kind} for the graph; return a GraphModule")
    if not result.modified and print_graph(result.graph_module, meta=False) != before:
        raise PassError(f"{p.name} changed the graph and returned modified=False; return True")


def _annotate(error: Exception, p: Pass, before: Sequence[str], gm: GraphModule) -> None:
    """Add to an exception where it happened: the pass, the ones before it, and the graph."""
    error.add_note(f"while running pass {p.name!r}, after {', '.join(before) or 'no other pass'}")
    if any("the graph at this point:" in note for note in getattr(error, "__notes__", ())):
        return
    lines = print_graph(gm).splitlines()
    if len(lines) > _NOTE_LINES:
        half = _NOTE_LINES // 2
        left_out = f"  ... {len(lines) - 2 * half} lines; MOEIFY_DUMP=dir writes all ..."
        lines = [*lines[:half], left_out, *lines[-half:]]
    error.add_note("\n".join(["the graph at this point:", *lines]))
