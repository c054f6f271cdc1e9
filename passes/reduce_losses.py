"""reduce-losses: router losses and statistics are of the tokens of all ranks.

The graphs stay as they are; each block's router learns the group of ranks that hold different
tokens, and sums over it in training.

    router(tokens)   ->   router(tokens), group 'dp': losses over the tokens of 4 ranks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify.mesh import World
from moeify.passes.base import Fact, PassResult, PlanContext
from moeify.passes.blocks import blocks_of
from moeify.router import Router


@dataclass(frozen=True, slots=True)
class ReduceLosses:
    """Give the router of every block the group of its data-parallel ranks."""

    name: ClassVar[str] = "reduce-losses"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS})
    provides: ClassVar[frozenset[str]] = frozenset()
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        """Set the routers' groups; in one process nothing changes."""
        world: World | None = ctx.mesh
        if world is not None and world.layout.dp > 1:
            for path, block in blocks_of(gm):
                router = block.get_submodule("router")
                assert isinstance(router, Router)
                router.group = world.dense.get_group("dp").group_name
                router.where = path
        return PassResult(gm, False)
