"""Which way the rows of a block travel: as the plan says, or as the cost model finds cheaper."""

from __future__ import annotations

from math import prod

from torch import fx

from moeify.distributed.cost_model import Choice, choose
from moeify.distributed.mesh import World
from moeify.passes.infra.records import record_of
from moeify.plan.layer_plan import LayerPlan
from moeify.plan.specs import ParallelSpec

TOKENS = 2048
"""Assume at least this many tokens on a rank: example inputs are often one sentence."""


def chosen_form(
    spec: ParallelSpec, world: World, layer: LayerPlan, gm: fx.GraphModule, path: str
) -> Choice:
    """Return how the rows of the block at `path` travel, and why.

    The size of a message is that of the example inputs, or of `TOKENS` where these are fewer; only
    `auto` asks for it.
    """
    ranks = world.sparse(layer.experts)["ep"].mesh.flatten().tolist()
    rows = max(tokens_of(gm, path, layer), TOKENS) * layer.top_k
    size = rows * layer.site.d_in * layer.site.itemsize
    found = choose(ranks, world.node, size, top_k=layer.top_k)
    if spec.all_to_all == "auto":
        return found
    return Choice(spec.all_to_all, "the plan says so", found.seconds)


def tokens_of(gm: fx.GraphModule, path: str, layer: LayerPlan) -> int:
    """Return how many tokens the block at `path` gets from the example inputs."""
    for call in gm.graph.find_nodes(op="call_module", target=path):
        record = record_of(call)
        if record is not None and record.shapes:
            return prod(record.shapes[0]) // layer.site.d_out
    return 0
