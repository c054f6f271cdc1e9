"""slice-experts: each expert's hidden width is cut over the ranks of a tensor group (ETP).

Before::

    hidden = self.experts(by_expert, recv_offsets)

After::

    copied = collectives.copy_to_slices(by_expert, 'etp', ...)      sums the slices' gradients
    sliced = self.experts(copied, recv_offsets)
    hidden = collectives.sum_of_slices(sliced, 'etp', ...)

and the experts hold DTensors that are sharded by expert and sliced by hidden width; the halves of
a fused gate and up projection are each sliced for themselves, the last bias by output width.

Source:
    Expert slicing: DeepSpeed-MoE (Rajbhandari et al. 2022) section 5.1; Megatron-LM (Shoeybi et
    al. 2019) section 3 for the pair of functions around it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from moeify.distributed import collectives
from moeify.distributed.dtensor import local, shard_parameter
from moeify.distributed.mesh import World
from moeify.errors import UnsupportedModuleError
from moeify.nn.experts import Experts
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of, layer_at
from moeify.passes.rewrite.exchange_nodes import Group
from moeify.passes.rewrite.nodes import add_node, calls


@dataclass(frozen=True, slots=True)
class SliceExperts:
    """Slice the experts of every block where the plan says `experts_in_tp: slice`."""

    name: ClassVar[str] = "slice-experts"
    requires: ClassVar[frozenset[str]] = frozenset(
        {Fact.MOE_BLOCKS, Fact.EXPERT_CALLS, Fact.SHARDED}
    )
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        world = ctx.mesh
        if world is None or world.layout.etp == 1 or ctx.resolved is None:
            return PassResult(gm, False)
        changed = False
        for path, block in blocks_of(gm):
            if calls(block.graph, collectives.sum_of_slices):
                continue
            experts = _sliceable(block.get_submodule("experts"), world.layout.etp, path)
            count = layer_at(gm, path, ctx.resolved).experts
            _slice(experts, world, count)
            _rewrite(block.graph, Group.of(world.sparse(count), "etp", world.rank), path)
            changed = True
        return PassResult(gm, changed)


def _sliceable(experts: nn.Module, slices: int, path: str) -> Experts:
    """Return the experts, or refuse those that cannot be sliced."""
    if not isinstance(experts, Experts):
        reason = "linear experts cannot be sliced"
    elif experts.inner is not None:
        reason = "an inner module cannot be sliced"
    elif experts.d_ff % slices or experts.d_out % slices:
        widths = f"widths {experts.d_ff} and {experts.d_out}"
        reason = f"{widths} do not slice over {slices} tensor ranks"
    else:
        return experts
    raise UnsupportedModuleError(path, f"{reason}; use `experts_in_tp: replicate` or `fold`")


def _slice(experts: Experts, world: World, count: int) -> None:
    mesh = world.sparse(count)["ep", "etp"]
    index, slices = mesh.get_local_rank("etp"), world.layout.etp
    for name, parameter in list(experts.named_parameters(recurse=False)):
        dim = 2 if name == "down_proj" else 1
        halves = name.startswith("gate_up")
        part = _part(local(parameter, experts.sharded).detach(), dim, index, slices, halves)
        whole = torch.Size((count, *parameter.shape[1:]))
        sliced = shard_parameter(
            part, mesh, whole, dim=dim, halves=halves, requires_grad=parameter.requires_grad
        )
        setattr(experts, name, sliced)
    experts.sharded, experts.slice_index = True, index


def _part(tensor: Tensor, dim: int, index: int, slices: int, halves: bool) -> Tensor:
    pieces = tensor.chunk(2, dim) if halves else (tensor,)
    return torch.cat([piece.chunk(slices, dim)[index] for piece in pieces], dim).contiguous()


def _rewrite(graph: fx.Graph, group: Group, path: str) -> None:
    for call in graph.find_nodes(op="call_module", target="experts"):
        rows = call.args[0]
        assert isinstance(rows, fx.Node)
        where = f"{path}: slices of experts"
        with graph.inserting_before(call):
            copied = add_node(
                graph, collectives.copy_to_slices, (rows, group.name, where), "copied"
            )
        call.replace_input_with(rows, copied)
        users = list(call.users)
        with graph.inserting_after(call):
            total = add_node(graph, collectives.sum_of_slices, (call, group.name, where), "summed")
        for user in users:
            user.replace_input_with(call, total)
