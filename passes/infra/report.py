"""What the manager reports about one pass: whether it changed anything, how, in what time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch.fx import GraphModule

from moeify.passes.infra.printer import target_name


@dataclass(frozen=True, slots=True)
class PassReport:
    """One pass of one run.

    Args:
        name: The pass.
        modified: It changed something.
        seconds: How long it ran, without verification.
        nodes_before: Number of nodes before it, nested graphs included.
        nodes_after: Number of nodes after it.
        ops: How many more (or fewer) calls of each function, method and module type there are.
        skipped: It was disabled and did not run.
        analysis: What it changed are notes: records of nodes, or the graph's `meta`.
    """

    name: str
    modified: bool
    seconds: float
    nodes_before: int
    nodes_after: int
    ops: Mapping[str, int] = field(default_factory=dict)
    skipped: bool = False
    analysis: bool = False

    def __str__(self) -> str:
        if self.skipped:
            return f"{self.name}: disabled"
        if not self.modified:
            return f"{self.name}: nothing changed, {self.seconds * 1e3:.1f} ms"
        if self.analysis:
            return f"{self.name}: wrote down what it found, {self.seconds * 1e3:.1f} ms"
        nodes = f"{self.nodes_before} -> {self.nodes_after} nodes"
        if not self.ops and self.nodes_before == self.nodes_after:
            nodes = f"the same {self.nodes_after} nodes, what they call or read changed"
        changes = "".join(f", {count:+d} {op}" for op, count in self.ops.items())
        return f"{self.name}: {nodes}{changes}, {self.seconds * 1e3:.1f} ms"


def count_ops(gm: GraphModule) -> Counter[str]:
    """Count the calls in a module's graph and in the graphs inside it.

    Functions are named as `F.linear`, methods as `.view`, modules by their class.
    """
    counts: Counter[str] = Counter()
    for module in gm.modules():
        if not isinstance(module, GraphModule):
            continue
        submodules = dict(module.named_modules())
        for node in module.graph.nodes:
            if node.op == "call_function":
                counts[target_name(node.target)] += 1
            elif node.op == "call_method":
                counts[f".{node.target}"] += 1
            elif node.op == "call_module":
                counts[type(submodules.get(str(node.target))).__name__] += 1
    return counts


def count_nodes(gm: GraphModule) -> int:
    """Count the nodes of a module's graph and of the graphs inside it."""
    return sum(len(m.graph.nodes) for m in gm.modules() if isinstance(m, GraphModule))


def diff_ops(before: Counter[str], after: Counter[str]) -> dict[str, int]:
    """Return the changes of op counts that are not zero, by name in alphabetical order."""
    names = sorted(before.keys() | after.keys())
    return {name: after[name] - before[name] for name in names if after[name] != before[name]}
