"""join-routers: routers of all ranks act as one.

The graphs stay as they are; each block's router learns two groups. Over the ranks that hold
different tokens (dp) it sums losses and statistics in training; from the first of the ranks that
hold the same tokens (tp) it takes whatever is drawn at random, so that they all route the same way.

Before::

    router(tokens)          losses over this rank's tokens, its own draws

After::

    router(tokens)          losses over 4 ranks, draws of the first of 2 ranks
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify.distributed.mesh import World
from moeify.nn.router import Router
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of


@dataclass(frozen=True, slots=True)
class JoinRouters:
    """Give the router of every block its groups of ranks."""

    name: ClassVar[str] = "join-routers"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        world = ctx.mesh
        if world is None:
            return PassResult(gm, False)
        changed = False
        for path, block in blocks_of(gm):
            router = block.get_submodule("router")
            assert isinstance(router, Router)
            wanted = (
                path,
                _group(world, "dp", world.layout.dp),
                _group(world, "tp", world.layout.tensor),
            )
            if (router.where, router.group, router.tensor_group) != wanted:
                router.where, router.group, router.tensor_group = wanted
                changed = True
        return PassResult(gm, changed)


def _group(world: World, dimension: str, ranks: int) -> str:
    """Return the name of this rank's group along a dimension; "" if it is alone there."""
    name: str = world.dense.get_group(dimension).group_name if ranks > 1 else ""
    return name
