"""What a pass is: a frozen dataclass that says which facts it needs and which it makes true.

Passes never name each other. One *provides* the fact `moe-blocks`, another *requires* it. A fact is
a string, so that your own passes can use their own facts; `Fact` holds the ones that moeify's
passes use. Those have a check (`moeify.passes.rewrite.facts`): the graph is checked for
them before a pass that requires them and after one that provides them.

There are two kinds of pass, and no pass is both. An *analysis* writes what it finds onto nodes
(through `moeify.passes.infra.records`) or into the graph's `meta`, and leaves what the graph
computes alone. A *transformation* changes the graph, or the modules that it calls. Either returns
`modified=True` if anything changed; run a second time it finds nothing left to do and returns
`modified=False`. The manager compares, and raises where a pass says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

if TYPE_CHECKING:
    import torch

    from moeify.distributed.mesh import World
    from moeify.plan.layer_plan import ResolvedPlan
    from moeify.plan.plan import Plan


__all__ = ["Fact", "Pass", "PassResult", "PlanContext"]


class Fact(StrEnum):
    """What passes may ask of a graph. Any other string is a fact as well."""

    CAPTURED = "captured"
    """Nodes have records: where they come from, what they read, what they return."""
    RESOLVED = "resolved"
    """The plan has been applied to the sites: every site has its layer plan."""
    MLP_SITES = "mlp-sites"
    """The nodes of each planned MLP carry the name of their site and their role in it."""
    MOE_BLOCKS = "moe-blocks"
    """Every planned site is a call of a MoE block."""
    EXPERT_CALLS = "expert-calls"
    """Blocks call their experts as modules, where a rewrite can find them."""
    SHARDED = "sharded"
    """Experts that are spread over ranks hold this rank's share of their weights."""
    DISPATCHED = "dispatched"
    """Blocks whose experts are spread over ranks exchange tokens with those ranks."""
    COORDINATED = "coordinated"
    """The ranks of a tensor group divide the rows that they exchange, where that was asked."""
    OVERLAPPED = "overlapped"
    """Rows travel in as many pieces as were asked for."""
    PARTITIONED = "partitioned"
    """It is decided over which ranks ZeRO partitions every parameter."""
    LOWERED = "lowered"
    """Every block is fused as far as its graph allows. For your passes that come after that."""


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """What passes may read besides the graph. Frozen: passes speak through facts and nodes.

    Args:
        plan: The user's plan; None where a pass runs without one.
        resolved: The plan applied to this model.
        mesh: The meshes of a world of several ranks and this process's rank in it; None in a
            single process.
        facts: What already holds for the graph before the first pass, where no check can tell.
        model: The model that the graph was taken from. Read only.
    """

    plan: Plan | None = None
    resolved: ResolvedPlan | None = None
    mesh: World | None = None
    facts: frozenset[str] = frozenset()
    model: torch.nn.Module | None = None


@runtime_checkable
class Pass(Protocol):
    """A graph pass. Usually a frozen dataclass whose fields are its options.

    Attributes:
        name: Verb and noun, such as `insert-all-to-all`. Unique in a pipeline.
        requires: Facts that must hold before it runs.
        provides: Facts that hold after it.

    Example:
        >>> from dataclasses import dataclass
        >>> from typing import ClassVar
        >>> import torch
        >>> @dataclass(frozen=True)
        ... class DropIdentity:
        ...     name: ClassVar[str] = "drop-identity"
        ...     requires: ClassVar[frozenset[str]] = frozenset()
        ...     provides: ClassVar[frozenset[str]] = frozenset({"no-identity"})
        ...
        ...     def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        ...         found = gm.graph.find_nodes(op="call_function", target=torch.clone)
        ...         for node in found:
        ...             node.replace_all_uses_with(node.args[0])
        ...             gm.graph.erase_node(node)
        ...         return PassResult(gm, bool(found))
        >>> isinstance(DropIdentity(), Pass)
        True
    """

    @property
    def name(self) -> str: ...

    @property
    def requires(self) -> frozenset[str]: ...

    @property
    def provides(self) -> frozenset[str]: ...

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        """Analyse or rewrite the graph.

        Args:
            gm: The graph, in a module that holds its weights. May be changed in place.
            ctx: Plan, mesh, and the facts that hold.

        Returns:
            The module to continue with, and whether anything changed.
        """
        ...
