"""shard-experts: each rank keeps its share of every layer's experts, as DTensors.

The graphs stay as they are; what changes is what their experts hold. Before, for 8 experts over 4
ranks::

    experts.up_proj    [8, 3072, 768]

After::

    experts.up_proj    DTensor [8, 3072, 768], of which this rank holds [2, 3072, 768]

In a pyramid every layer is divided by itself: a layer with fewer experts than expert ranks uses
smaller groups, and more of them.

Source:
    DeepSpeed-MoE (Rajbhandari et al. 2022) section 5.1, "flexible multi-expert and multi-data
    parallelism".
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from moeify.distributed.dtensor import is_sharded, shard_parameter
from moeify.distributed.layout import Layout
from moeify.distributed.mesh import World
from moeify.errors import PassError
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import spread_blocks
from moeify.plan.layer_plan import LayerPlan

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class ShardExperts:
    """Turn the experts of every block into this rank's share of them."""

    name: ClassVar[str] = "shard-experts"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.SHARDED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        world = ctx.mesh
        if world is None:
            return PassResult(gm, False)
        changed = False
        for path, block, layer in spread_blocks(gm, ctx):
            experts = block.get_submodule("experts")
            if any(map(is_sharded, experts.parameters())):
                continue
            _shard(experts, world, layer, path)
            log.info("%s: %s", path, describe(world.layout, layer))
            changed = True
        return PassResult(gm, changed)


def share_of(world: World, experts: int) -> range:
    """Return the experts of a layer that this rank keeps."""
    each = experts // world.layout.ep(experts)
    first = world.sparse(experts)["ep"].get_local_rank() * each
    return range(first, first + each)


def describe(layout: Layout, layer: LayerPlan) -> str:
    """Describe in one line how a layer's experts are spread over the ranks."""
    ep, edp = layout.ep(layer.experts), layout.edp(layer.experts)
    text = f"{layer.experts} experts over {ep} ranks, {layer.experts // ep} each"
    if ep < layout.expert:
        text += f" (fewer experts than the {layout.expert} ranks of `expert`: a smaller group)"
    if layout.etp > 1:
        text += f", each sliced over {layout.etp}"
    return text + (f", {edp} replicas" if edp > 1 else ", no replicas")


def _shard(experts: nn.Module, world: World, layer: LayerPlan, path: str) -> None:
    experts.sharded = True  # type: ignore[assignment]
    share = share_of(world, layer.experts)
    mesh = world.sparse(layer.experts)["ep"]
    for name, parameter in list(experts.named_parameters(recurse=False)):
        if parameter.shape[0] == layer.experts:
            part = parameter.detach()[share.start : share.stop].clone()
        elif parameter.shape[0] == len(share):  # built as this share from the start
            part = parameter.detach()
        else:
            raise PassError(f"{path}: {name} of shape {tuple(parameter.shape)} is not by expert")
        whole = torch.Size((layer.experts, *parameter.shape[1:]))
        trains = parameter.requires_grad
        setattr(experts, name, shard_parameter(part, mesh, whole, requires_grad=trains))
