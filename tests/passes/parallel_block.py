"""One block in a simulated world of ranks, for the tests of the passes that rewrite it."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from moeify.distributed.layout import Layout
from moeify.distributed.mesh import World
from moeify.passes.find_mlps import FindMlps
from moeify.passes.gather_partitions import GatherPartitions
from moeify.passes.infra.base import Pass, PlanContext
from moeify.passes.infra.manager import PassManager
from moeify.passes.infra.printer import print_graph
from moeify.passes.partition_zero import PartitionZero
from moeify.passes.replace_mlps import ReplaceMlps
from moeify.passes.rewrite.blocks import blocks_of
from moeify.passes.rewrite.facts import CHECKS
from moeify.passes.shard_experts import ShardExperts
from moeify.plan.plan import Plan
from moeify.plan.resolve import resolve_sites
from moeify.sites.discovery import discover


def block_after(
    passes: list[Pass], *, world: int = 4, node: int = 2, shard: bool = True, **parallel: Any
) -> Any:
    """Run shard-experts, unless not asked to, and passes; return (context, manager, graph, block).

    The net has one MLP of two layers. The world is the one that `fake_world` opened.
    """
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(
            mlp=nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), last=nn.Tanh()
        )
    )
    experts = parallel.pop("experts", 8)
    plan = plan_of(experts=experts, **parallel)
    mesh = World.create(Layout.of(plan.parallel, world))
    mesh.node = node
    passes = [ShardExperts(), *passes] if shard else passes
    return _run(passes, model, plan, torch.ones(6, 8), mesh)


def stage(*passes: Pass, **parallel: Any) -> tuple[PlanContext, Any, Any]:
    """Run passes where two tensor ranks share the rows; return (context, graph, block)."""
    ctx, _, gm, block = block_after(list(passes), **({"expert": 2, "tensor": 2} | parallel))
    return ctx, gm, block


def alone_after(passes: list[Pass]) -> Any:
    """Do the same in one process."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Tanh())
    plan = Plan.of({"layers": [{"select": "all", "experts": 4}]})
    return _run(passes, model, plan, torch.ones(6, 8), None)


def plan_of(*, experts: int = 8, zero: Mapping[str, Any] | None = None, **parallel: Any) -> Plan:
    """Return a plan for every layer; its exchange is flat unless it says otherwise."""
    return Plan.of(
        {
            "layers": [{"select": "all", "experts": experts}],
            "parallel": {"all_to_all": "flat"} | parallel,
            "zero": zero or {},
        }
    )


def _run(
    passes: list[Pass], model: nn.Module, plan: Plan, inputs: torch.Tensor, mesh: World | None
) -> Any:
    found = discover(model, inputs)
    resolved = resolve_sites(
        plan, found.sites, parameters=found.parameters, parameter_bytes=found.parameter_bytes
    )
    ctx = PlanContext(plan=plan, resolved=resolved, mesh=mesh, model=model)
    manager = PassManager([FindMlps(found.regions), ReplaceMlps(found), *passes], checks=CHECKS)
    gm = manager.run(found.capture.graph_module, ctx).graph_module
    ((_, block),) = blocks_of(gm)
    return ctx, manager, gm, block


def dense_graph(ctx: PlanContext) -> fx.GraphModule:
    """Record the model of a context once more: a graph without blocks and without marks."""
    assert ctx.model is not None
    return discover(ctx.model, torch.ones(6, 8)).capture.graph_module


def hide_experts(gm: fx.GraphModule, ctx: PlanContext) -> PlanContext:
    """Let nodes gather what the experts need, which ends their calls as modules."""
    assert ctx.plan is not None
    zero = plan_of(zero={"engine": "graph", "stage": 3}).zero
    ctx = replace(ctx, plan=ctx.plan.model_copy(update={"zero": zero}))
    PassManager([PartitionZero(), GatherPartitions()], checks=CHECKS).run(gm, ctx)
    return ctx


def show_block(gm: fx.GraphModule) -> str:
    """Print the one block of a graph, for `before_and_after`."""
    ((_, block),) = blocks_of(gm)
    return text_of(block)


def text_of(block: fx.GraphModule) -> str:
    """Print a block as `without_group_names` does."""
    return without_group_names(print_graph(block, meta=False))


def without_group_names(text: str) -> str:
    """Replace the names of groups, which count the groups of a process, by their place."""
    names: dict[str, str] = {}
    pattern = r"'(\d+|[0-9a-f]{8,}[^']*)'"
    return re.sub(pattern, lambda m: names.setdefault(m[0], f"'group {len(names)}'"), text)
