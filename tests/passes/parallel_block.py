"""One block in a simulated world of ranks, for the tests of the passes that rewrite it."""

from __future__ import annotations

import re
from collections import OrderedDict
from typing import Any

import torch
from torch import fx, nn

from moeify.distributed.layout import Layout
from moeify.distributed.mesh import World
from moeify.passes.find_mlps import FindMlps
from moeify.passes.infra.base import Pass, PlanContext
from moeify.passes.infra.manager import PassManager
from moeify.passes.infra.printer import print_graph
from moeify.passes.replace_mlps import ReplaceMlps
from moeify.passes.rewrite.blocks import blocks_of
from moeify.passes.rewrite.facts import CHECKS
from moeify.passes.shard_experts import ShardExperts
from moeify.plan.plan import Plan
from moeify.plan.resolve import resolve_sites
from moeify.sites.discovery import discover


def block_after(passes: list[Pass], *, world: int = 4, node: int = 2, **parallel: Any) -> Any:
    """Run passes on a two-layer net; return (context, manager, graph, block)."""
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
    return _run([ShardExperts(), *passes], model, plan, torch.ones(6, 8), mesh)


def alone_after(passes: list[Pass]) -> Any:
    """Do the same in one process."""
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Tanh())
    plan = Plan.of({"layers": [{"select": "all", "experts": 4}]})
    return _run(passes, model, plan, torch.ones(6, 8), None)


def plan_of(*, experts: int = 8, **parallel: Any) -> Plan:
    """Return a plan for every layer; its exchange is flat unless it says otherwise."""
    layers = [{"select": "all", "experts": experts}]
    return Plan.of({"layers": layers, "parallel": {"all_to_all": "flat"} | parallel})


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


def text_of(block: fx.GraphModule) -> str:
    """Print a block; group names, which count the groups of a process, become their place."""
    text = print_graph(block, meta=False)
    names: dict[str, str] = {}
    pattern = r"'(\d+|[0-9a-f]{8,}[^']*)'"
    return re.sub(pattern, lambda m: names.setdefault(m[0], f"'group {len(names)}'"), text)


def assert_unchanged(pass_: Pass, gm: fx.GraphModule, ctx: PlanContext) -> None:
    """Run a pass once more, or where it has nothing to do: it says so, and changes nothing."""
    ((_, block),) = blocks_of(gm)
    before = print_graph(block)
    assert not pass_.run(gm, ctx).modified
    assert print_graph(block) == before
