"""slice-dense: decide which dense layers are sliced over the tensor ranks (analysis).

Before and after, the same graph; the decision is new::

    %q   = linear(%x, attn.q.weight)                        @ attn: colwise
    %k   = linear(%x, attn.k.weight)                        @ attn: colwise
    %v   = linear(%x, attn.v.weight)                        @ attn: colwise
    ...
    %sdp = scaled_dot_product_attention(%q_1, %k_1, %v_1)
    ...
    %o   = linear(%sdp_2, attn.o.weight)                    @ attn: rowwise

The projections of an MLP keep the roles that they have in their site. The whole decision, with
what stays whole and why, is `slices_of(gm)`; `moeify.tensor_parallel.apply` carries it out on the
model. It reads the dense graph, so it is listed before the passes that replace parts of it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from moeify.capture.capture import ExampleInputs
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.records import mark, record_of
from moeify.passes.rewrite.blocks import SLICES
from moeify.sites.discovery import Discovery
from moeify.tensor_parallel.apply import SlicePlan
from moeify.tensor_parallel.derive import derive

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class SliceDense:
    """Decide for every attention and every dense MLP whether the plan's tensor ranks slice it.

    Args:
        discovery: The sites and projections of this graph.
        example_inputs: The inputs it was recorded with; made from the config of a Hugging Face
            model if None.
    """

    discovery: Discovery
    example_inputs: ExampleInputs | None = None
    name: ClassVar[str] = "slice-dense"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.RESOLVED})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        assert ctx.resolved is not None
        assert ctx.model is not None
        plan = derive(
            self.discovery,
            ctx.resolved,
            ctx.resolved.plan.parallel.tensor,
            model=ctx.model,
            example_inputs=self.example_inputs,
        )
        for line in plan.lines():
            log.info("%s", line)
        changed = _mark(gm, self.discovery, plan)
        if slices_of(gm) != plan:
            gm.meta[SLICES] = plan
            changed = True
        return PassResult(gm, changed)


def slices_of(gm: fx.GraphModule) -> SlicePlan | None:
    """Return what `slice-dense` decided for a graph, or None where it has not run."""
    found = gm.meta.get(SLICES)
    assert found is None or isinstance(found, SlicePlan)
    return found


def _mark(gm: fx.GraphModule, discovery: Discovery, plan: SlicePlan) -> bool:
    """Write layer and way onto the sliced projections that belong to no site; tell if any."""
    layer = {path: pair.name for pair in plan.pairs for path in (*pair.colwise, pair.rowwise)}
    alive = set(gm.graph.nodes)
    changed = False
    for linear in discovery.linear_nodes:
        path = linear.weight.module
        record = record_of(linear.node)
        if path in layer and linear.node in alive and (record is None or record.site is None):
            changed |= mark(linear.node, site=layer[path], role=plan.modules[path])
    return changed
