"""What a pass is: a frozen dataclass that says which facts it needs, gives and breaks.

Passes never name each other. One *provides* the fact `moe-blocks`, another *requires* it, a third
*invalidates* it; the manager works out the order. A fact is a string, so that passes of your own
can use facts of their own; `Fact` holds the ones that moeify's passes use.

There are two kinds of pass. An *analysis* pass writes what it finds onto the nodes (through
`moeify.passes.records`) and never changes the graph: it returns `modified=False`. A
*transformation* pass changes the graph, and says so; run a second time it finds nothing left
to do and returns `modified=False`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

if TYPE_CHECKING:
    import torch

    from moeify.layer_plan import ResolvedPlan
    from moeify.plan import Plan

__all__ = ["Fact", "Pass", "PassResult", "PlanContext"]


class Fact(StrEnum):
    """What passes may know about a graph. Any other string is a fact as well."""

    CAPTURED = "captured"
    """Every node has a record: where it comes from, what it reads, what it returns."""
    MLP_SITES = "mlp-sites"
    """The nodes of each MLP carry the name of their site and their role in it."""
    RESOLVED = "resolved"
    """The plan has been applied to the sites: every site has its layer plan."""
    MOE_BLOCKS = "moe-blocks"
    """The chosen sites are MoE blocks."""
    SLICED = "sliced"
    """Dense layers know which of them are sliced over the tensor ranks."""
    SHARDED = "sharded"
    """Experts and dense layers hold this rank's share of their weights."""
    DISPATCHED = "dispatched"
    """Collectives carry tokens to the ranks of their experts and back."""
    COORDINATED = "coordinated"
    """The collectives have been rewritten for the mesh: among equal tensor ranks, or in stages."""
    PARTITIONED = "partitioned"
    """Every parameter has its ZeRO partition."""
    LOWERED = "lowered"
    """Reference ops have been replaced by fused ones."""
    INSTALLED = "installed"
    """The blocks are in the user's model."""
    VERIFIED = "verified"
    """The converted model has been compared with the dense one."""


@dataclass(frozen=True, kw_only=True)
class PlanContext:
    """What passes may read besides the graph. Frozen: passes speak through facts and nodes.

    Args:
        plan: The user's plan; None where a pass runs without one.
        resolved: The plan applied to this model.
        mesh: The device mesh, or None in a single process.
        rank: This process's rank.
        world_size: Number of processes.
        dtype: The dtype to compute in; None keeps the model's.
        fake_mode: The fake tensor mode that shapes are computed under.
        training: The graph is for training.
        facts: What already holds for the graph before the first pass.
        model: The model that the graph was taken from. Read only.
        extras: Options of passes that moeify does not know.
    """

    plan: Plan | None = None
    resolved: ResolvedPlan | None = None
    mesh: Any | None = None
    rank: int = 0
    world_size: int = 1
    dtype: torch.dtype | None = None
    fake_mode: Any | None = None
    training: bool = False
    facts: frozenset[str] = frozenset()
    model: torch.nn.Module | None = None
    extras: Mapping[str, object] = field(default_factory=dict)


@runtime_checkable
class Pass(Protocol):
    """A graph pass. Usually a frozen dataclass whose fields are its options.

    Attributes:
        name: Verb and noun, such as `insert-all-to-all`. Unique in a pipeline.
        requires: Facts that must hold before it runs.
        provides: Facts that hold after it.
        invalidates: Facts that no longer hold after it.

    Example:
        >>> from dataclasses import dataclass
        >>> from typing import ClassVar
        >>> import torch
        >>> @dataclass(frozen=True)
        ... class DropIdentity:
        ...     name: ClassVar[str] = "drop-identity"
        ...     requires: ClassVar[frozenset[str]] = frozenset()
        ...     provides: ClassVar[frozenset[str]] = frozenset({"no-identity"})
        ...     invalidates: ClassVar[frozenset[str]] = frozenset()
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

    @property
    def invalidates(self) -> frozenset[str]: ...

    def run(self, gm: GraphModule, ctx: PlanContext) -> PassResult:
        """Analyse or rewrite the graph.

        Args:
            gm: The graph, in a module that holds its weights. May be changed in place.
            ctx: Plan, mesh, and the facts that hold.

        Returns:
            The module to go on with, and whether anything changed.
        """
        ...
