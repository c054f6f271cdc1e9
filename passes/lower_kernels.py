"""lower-kernels: replace dispatch, experts and combine by one fused call, in the chosen kernel.

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

from torch import fx

from moeify.errors import PlanError
from moeify.kernels.choose import Choice, Workload, choose
from moeify.nn.experts import Experts
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.records import NodeRecord, record_of, set_record
from moeify.passes.rewrite.blocks import blocks_of, site_of
from moeify.passes.rewrite.local_experts import LocalExperts

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class LowerKernels:
    """Fuse every MoE block as far as its graph allows.

    Args:
        kernel: What to use where the plan says `auto`; a name of `kernels.choose.KERNELS`.
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
                local = LocalExperts.match(call)
                if local is None:
                    log.info("%s: not fused: other nodes lie between its experts", path)
                    continue
                _fuse(block.graph, local, choice)
                log.info("%s: kernel %s: %s", path, choice.kernel, choice.why)
                changed = True
        return PassResult(gm, changed)


def workload(experts: Experts) -> Workload:
    """Return what is known of experts before they run."""
    weight = experts.down_proj
    return Workload(
        device=weight.device.type,
        dtype=weight.dtype,
        widths=(experts.d_in, experts.d_ff, experts.d_out),
        activation=experts.activation if experts.inner is None else None,
        dropout=experts.dropout > 0,
    )


def _fuse(graph: fx.Graph, local: LocalExperts, choice: Choice) -> None:
    arguments = (local.tokens, local.offsets, local.weights, local.order, local.slots)
    with graph.inserting_before(local.combine):
        fused = graph.call_module("experts", arguments, {"kernel": choice.kernel})
    set_record(fused, record_of(local.experts) or NodeRecord("experts"))
    local.replace(fused)
    fused._rename("experts_out")
