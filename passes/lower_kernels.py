"""lower-kernels: replace gather, experts and combine by one fused call, in the chosen kernel.

Before::

    rows   = torch.ops.moeify.dispatch(tokens, order, slots)
    hidden = self.experts(rows, offsets)
    y      = torch.ops.moeify.combine(hidden, weights, order, slots)

After::

    experts_out = self.experts(tokens, offsets, weights, order, slots, kernel='cpu')

Each block's choice and the reason for it are logged under `moeify`. Where another pass has put
something between these three nodes (a collective, say) they stay as they are; their matmuls still
run on the device's kernels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from moeify.errors import PlanError
from moeify.kernels.choose import Choice, Workload, choose
from moeify.nn.experts import Experts
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.records import NodeRecord, record_of, set_record
from moeify.passes.rewrite.blocks import blocks_of, site_of

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class LowerKernels:
    """Fuse every MoE block as far as its graph allows.

    Args:
        kernel: What to use where the plan says `auto`; a name of `kernels.lowering.KERNELS`.
    """

    kernel: str = "auto"
    name: ClassVar[str] = "lower-kernels"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS, Fact.EXPERT_CALLS})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.LOWERED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        asked = {} if ctx.resolved is None else {la.name: la.kernel for la in ctx.resolved}
        changed = False
        for path, block in blocks_of(gm):
            wanted = asked.get(site_of(gm, path), "auto")
            wanted = self.kernel if wanted == "auto" else wanted
            for call in block.graph.find_nodes(op="call_module", target="experts"):
                experts = block.get_submodule("experts")
                if not isinstance(experts, Experts) or len(call.args) != 2:
                    continue
                try:
                    choice = choose(workload(experts), wanted)
                except ValueError as error:
                    raise PlanError(f"{path}: {error}", path="layers") from None
                if _fuse(block.graph, call, choice):
                    log.info("%s: kernel %s: %s", path, choice.kernel, choice.why)
                    changed = True
                else:
                    log.info("%s: not fused: other nodes lie between its experts", path)
        return PassResult(gm, changed)


def workload(experts: Experts) -> Workload:
    """Return what there is to know of some experts before they run."""
    weight = experts.down_proj
    return Workload(
        device=weight.device.type,
        dtype=weight.dtype,
        widths=(experts.d_in, experts.d_ff, experts.d_out),
        activation=experts.activation if experts.inner is None else None,
        dropout=experts.dropout > 0,
    )


def _fuse(graph: fx.Graph, call: fx.Node, choice: Choice) -> bool:
    """Rewrite dispatch, `call` and combine to one call; False if the graph has another shape."""
    ops = torch.ops.moeify
    rows, offsets = call.args
    if not isinstance(rows, fx.Node) or rows.target is not ops.dispatch or len(rows.users) != 1:
        return False
    if len(call.users) != 1:
        return False
    (combine,) = call.users
    if combine.target is not ops.combine or combine.args[0] is not call:
        return False
    tokens, order, slots = rows.args
    _, weights, order_back, slots_back = combine.args
    if (order, slots) != (order_back, slots_back):
        return False
    arguments = (tokens, offsets, weights, order, slots)
    with graph.inserting_before(combine):
        fused = graph.call_module("experts", arguments, {"kernel": choice.kernel})
    old = record_of(call) or NodeRecord("experts")
    set_record(fused, old)
    combine.replace_all_uses_with(fused)
    for node in (combine, call, rows):
        graph.erase_node(node)
    fused._rename("experts_out")
    return True
