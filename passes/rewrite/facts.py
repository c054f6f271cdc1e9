"""Checks that tell whether a fact of moeify's passes holds for a graph.

A check returns one sentence for each place where it does not. Where there is nothing to do (one
process, a plan that asks for nothing), the fact holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from torch import fx

from moeify.distributed import collectives, exchange
from moeify.distributed.dtensor import is_sharded
from moeify.nn.experts import Experts
from moeify.passes.infra.base import Fact, PlanContext
from moeify.passes.infra.records import record_of
from moeify.passes.infra.verifier import Check
from moeify.passes.rewrite.blocks import MOE_ROLE, ZERO, blocks_of, spread_blocks
from moeify.passes.rewrite.exchange_nodes import has_exchange
from moeify.passes.rewrite.local_experts import LocalExperts
from moeify.passes.rewrite.nodes import calls, ops

__all__ = ["CHECKS"]


def _captured(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    if calls and all(record_of(node) is None for node in calls):
        return ["no node has a record: record the graph with `moeify.capture.capture`"]
    return []


def _resolved(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    return [] if ctx.resolved is not None else ["the context has no plan applied to sites"]


def _mlp_sites(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    marks: dict[str, set[str]] = {}
    for record in map(record_of, gm.graph.nodes):
        if record is not None and record.site and record.role:
            marks.setdefault(record.site, set()).add(record.role)
    return [
        f"{layer.name}: no nodes are marked as its projections"
        for layer in ctx.resolved or ()
        if layer.expert == "mlp"
        and not {"up", "down"} <= marks.get(layer.site.down.weight, set())
        and MOE_ROLE not in marks.get(layer.name, set())
    ]


def _moe_blocks(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    found = set()
    for node in gm.graph.find_nodes(op="call_module"):
        record = record_of(node)
        if record is not None and record.role == MOE_ROLE:
            found.add(record.site)
    if ctx.resolved is None:
        return [] if found else ["no node calls a MoE block"]
    return [f"{la.name}: no node calls its block" for la in ctx.resolved if la.name not in found]


def _expert_calls(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    return [
        f"{path}: does not call its experts as a module"
        for path, block in blocks_of(gm)
        if not block.graph.find_nodes(op="call_module", target="experts")
    ]


def _sharded(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    world = ctx.mesh
    if world is None:
        return []
    return [
        f"{path}: experts.{name} is whole on each of {world.layout.ep(layer.experts)} ranks"
        for path, block, layer in spread_blocks(gm, ctx)
        for name, parameter in block.get_submodule("experts").named_parameters()
        if not is_sharded(parameter)
    ]


def _dispatched(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    return [
        f"{path}: its tokens reach only the experts of this rank"
        for path, block, _ in spread_blocks(gm, ctx)
        if not has_exchange(block.graph)
    ]


def _coordinated(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    world, plan = ctx.mesh, ctx.plan
    if world is None or plan is None or world.layout.tensor == 1 or world.layout.etp > 1:
        return []
    if plan.parallel.coordinated is False:
        return []
    return [
        f"{path}: each of {world.layout.tensor} tensor ranks sends all rows that they share"
        for path, block in blocks_of(gm)
        if _travels(block) and not calls(block.graph, collectives.share)
    ]


def _overlapped(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    pieces = 1 if ctx.plan is None else ctx.plan.parallel.overlap_chunks
    if pieces == 1:
        return []
    return [
        f"{path}: its rows travel in one piece, not in {pieces}"
        for path, block in blocks_of(gm)
        if _travels(block) and not calls(block.graph, exchange.pieces)
    ]


def _partitioned(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    if ctx.mesh is None or ZERO in gm.meta:
        return []
    return ["the graph's meta holds no decision"]


def _lowered(gm: fx.GraphModule, ctx: PlanContext) -> list[str]:
    return [
        f"{path}: dispatch, experts and combine are three calls"
        for path, block in blocks_of(gm)
        for call in block.graph.find_nodes(op="call_module", target="experts")
        if isinstance(block.get_submodule("experts"), Experts) and LocalExperts.match(call)
    ]


def _travels(block: fx.GraphModule) -> bool:
    """Tell whether rows of a block go to other ranks, each to those of its own experts."""
    return bool(calls(block.graph, ops.send_layout))


CHECKS: Final[Mapping[str, Check]] = MappingProxyType(
    {
        Fact.CAPTURED: _captured,
        Fact.RESOLVED: _resolved,
        Fact.MLP_SITES: _mlp_sites,
        Fact.MOE_BLOCKS: _moe_blocks,
        Fact.EXPERT_CALLS: _expert_calls,
        Fact.SHARDED: _sharded,
        Fact.DISPATCHED: _dispatched,
        Fact.COORDINATED: _coordinated,
        Fact.OVERLAPPED: _overlapped,
        Fact.PARTITIONED: _partitioned,
        Fact.LOWERED: _lowered,
    }
)
"""The check of each fact of `Fact`."""
