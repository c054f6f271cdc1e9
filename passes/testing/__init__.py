"""Helpers for tests of passes, moeify's and your own.

A test file of a pass has four kinds of test: the graph before and after (`before_and_after` with a
golden file), a graph on which it must do nothing (`assert_untouched`), a second run that finds
nothing left to do (`assert_idempotent`), and graphs that it must refuse (`assert_requires`). All
run the pass in a manager, with every check that a pipeline makes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from pathlib import Path

from torch.fx import GraphModule

from moeify.errors import PassOrderError
from moeify.passes.infra.base import Pass, PassResult, PlanContext
from moeify.passes.infra.manager import PassManager
from moeify.passes.infra.printer import diff_graphs, print_graph
from moeify.passes.rewrite.facts import CHECKS


def run_pass(pass_: Pass, gm: GraphModule, ctx: PlanContext | None = None) -> PassResult:
    """Run one pass as the manager does, with contract, rules, facts and recompilation.

    Args:
        pass_: The pass.
        gm: The graph to run it on.
        ctx: Its context; None gives one that states the facts that the pass requires. Facts of
            moeify are checked in the graph, whatever is stated.

    Returns:
        What the pass returned.

    Raises:
        PassOrderError: A fact that the pass requires is not stated, or does not hold for `gm`.
        PassError: The pass broke its contract or left a graph that breaks a rule.
    """
    return PassManager([pass_], checks=CHECKS).run(gm, ctx or PlanContext(facts=pass_.requires))


def before_and_after(
    pass_: Pass,
    gm: GraphModule,
    ctx: PlanContext | None = None,
    show: Callable[[GraphModule], str] = print_graph,
) -> str:
    """Run a pass that must find something to do, and return the graph before and after it.

    Args:
        pass_: The pass; it, `gm` and `ctx` are as for `run_pass`.
        gm: The graph to run it on.
        ctx: Its context.
        show: Prints what the pass is about: one block of the graph, say.

    Returns:
        Both texts, for a golden file.

    Raises:
        AssertionError: The pass found nothing to do.
    """
    before = show(gm)
    result = run_pass(pass_, gm, ctx)
    if not result.modified:
        raise AssertionError(f"{pass_.name} found nothing to do in\n{before}")
    return f"before\n{before}\nafter\n{show(result.graph_module)}"


def assert_untouched(pass_: Pass, gm: GraphModule, ctx: PlanContext | None = None) -> None:
    """Run a pass, as `run_pass` does, on a graph in which it must find nothing to do.

    Raises:
        AssertionError: The pass changed something. (A change that it does not report is a
            `PassError` of the manager.)
    """
    before = print_graph(gm, numbers=False)
    result = run_pass(pass_, gm, ctx)
    if result.modified:
        changes = diff_graphs(before, result.graph_module)
        raise AssertionError(f"{pass_.name} must find nothing to do here\n{changes}")


def assert_idempotent(pass_: Pass, gm: GraphModule, ctx: PlanContext | None = None) -> GraphModule:
    """Run a pass twice, as `run_pass` does; the second time it must find nothing to do.

    Returns:
        The module after the pass.

    Raises:
        AssertionError: The second run changed the graph, or returned `modified=True`.
    """
    once: GraphModule = run_pass(pass_, gm, ctx).graph_module
    text = print_graph(once, numbers=False)
    twice = run_pass(pass_, once, ctx)
    changes = diff_graphs(text, twice.graph_module)
    if twice.modified or changes:
        raise AssertionError(
            f"{pass_.name} run twice: modified={twice.modified}, expected False\n{changes}"
        )
    return once


def assert_requires(pass_: Pass, fact: str, gm: GraphModule, ctx: PlanContext | None = None) -> str:
    """Run a pass on a graph for which a fact does not hold; it must refuse, and change nothing.

    Args:
        pass_: The pass.
        fact: The fact.
        gm: A graph for which it does not hold.
        ctx: Its context; None states no fact.

    Returns:
        The message of the error.

    Raises:
        AssertionError: The pass ran, or failed for another reason.
    """
    before = print_graph(gm)
    try:
        run_pass(pass_, gm, ctx or PlanContext())
    except PassOrderError as error:
        message = str(error)
    else:
        raise AssertionError(f"{pass_.name} ran without {str(fact)!r}")
    if f"{pass_.name} requires {str(fact)!r}" not in message:
        raise AssertionError(f"{pass_.name} refuses for another reason: {message}")
    if print_graph(gm) != before:
        raise AssertionError(f"{pass_.name} refused the graph and changed it")
    return message


def assert_golden(text: str, path: str | Path, update: bool = False) -> None:
    """Compare a text with a file.

    Args:
        text: What the code prints now.
        path: The golden file.
        update: Write the file instead.

    Raises:
        AssertionError: The file is missing, or differs; the message holds the diff.
    """
    path = Path(path)
    if not text.endswith("\n"):
        text += "\n"
    if update:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return
    hint = "run pytest with --update-golden, and read the change before you commit it"
    if not path.exists():
        raise AssertionError(f"no golden file {path}; {hint}")
    golden = path.read_text(encoding="utf-8")
    if text != golden:
        diff = difflib.unified_diff(
            golden.splitlines(), text.splitlines(), path.name, "now", lineterm=""
        )
        raise AssertionError("\n".join([f"{path} differs; {hint}", *diff]))
