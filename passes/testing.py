"""Helpers for tests of passes, ours and yours."""

from __future__ import annotations

import difflib
from pathlib import Path

from torch.fx import GraphModule

from moeify.passes.base import Pass, PassResult, PlanContext
from moeify.passes.manager import PassManager
from moeify.passes.printer import diff_graphs, print_graph


def run_pass(pass_: Pass, gm: GraphModule, ctx: PlanContext | None = None) -> PassResult:
    """Run one pass as the manager does, with contract, rules and recompilation.

    Args:
        pass_: The pass.
        gm: The graph to run it on.
        ctx: Its context; None gives one in which the facts that the pass requires hold.

    Returns:
        What the pass returned.

    Raises:
        PassOrderError: `ctx` lacks a fact that the pass requires.
        PassError: The pass broke its contract or left a graph that breaks a rule.
    """
    return PassManager([pass_]).run(gm, ctx or PlanContext(facts=pass_.requires))


def assert_idempotent(pass_: Pass, gm: GraphModule, ctx: PlanContext | None = None) -> GraphModule:
    """Run a pass twice; the second time it must find nothing to do.

    Args:
        pass_: The pass.
        gm: The graph to run it on.
        ctx: Its context; None gives one in which the facts that the pass requires hold.

    Returns:
        The module after the pass.

    Raises:
        AssertionError: The second run changed the graph or said so.
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
