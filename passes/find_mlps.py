"""find-mlps: mark the MLPs of a recorded graph (analysis; the graph itself is not changed).

Before and after, the same graph::

    %gate   = linear(%x, gate_proj.weight)                   role=up
    %up     = linear(%x, up_proj.weight)                     role=up
    %silu   = silu(%gate)                                    role=inner
    %mul    = mul(%silu, %up)                                role=inner
    %down   = linear(%mul, down_proj.weight)                 role=down

`match.mlp_regions` decides where the MLPs are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.records import mark
from moeify.passes.match.mlp_regions import Region, find_regions


@dataclass(frozen=True, slots=True)
class FindMlps:
    """Write `site` and `role` on the nodes of every MLP, for the pass that replaces them.

    Args:
        regions: The MLPs, where they have been found before; searched for if None.
    """

    regions: tuple[Region, ...] | None = None
    name: ClassVar[str] = "find-mlps"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.CAPTURED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.MLP_SITES})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        regions = self.regions if self.regions is not None else find_regions(gm.graph)[0]
        changed = False
        for region in regions:
            name = region.down.weight.name
            roles = [(node, "up") for up in region.ups for node in up.nodes]
            roles += [(node, "inner") for node in region.interior]
            roles += [(node, "down") for node in region.down.nodes]
            for node, role in roles:
                changed |= mark(node, site=name, role=role)
        return PassResult(gm, changed)
