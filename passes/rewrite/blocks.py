"""Where the MoE blocks of a graph are, and which layer plan each one has."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from moeify.errors import PassError
from moeify.passes.infra.base import PlanContext
from moeify.passes.infra.records import record_of
from moeify.plan.layer_plan import LayerPlan, ResolvedPlan

MOE_ROLE = "moe"
"""The role of a node that calls a block."""

SLICES = "moeify_slices"
"""Where in a graph's `meta` slice-dense keeps its decision."""

ZERO = "moeify_zero"
"""Where in a graph's `meta` partition-zero keeps its decision."""


def blocks_of(gm: fx.GraphModule) -> Iterator[tuple[str, fx.GraphModule]]:
    """Yield (path, block) of every MoE block that a graph calls, each once, in execution order."""
    seen = set()
    for node in gm.graph.nodes:
        record = record_of(node)
        if record is None or record.role != MOE_ROLE or node.target in seen:
            continue
        seen.add(node.target)
        block = gm.get_submodule(str(node.target))
        assert isinstance(block, fx.GraphModule)
        yield str(node.target), block


def site_of(gm: fx.GraphModule, path: str) -> str:
    """Return the name of the site that the block at `path` replaces."""
    records = (record_of(n) for n in gm.graph.find_nodes(op="call_module", target=path))
    return next((r.site for r in records if r is not None and r.site), path)


def layer_at(gm: fx.GraphModule, path: str, resolved: ResolvedPlan) -> LayerPlan:
    """Return the layer plan of the block at `path`."""
    site = site_of(gm, path)
    for layer in resolved:
        if layer.name == site:
            return layer
    raise PassError(f"{path}: the plan has no layer for the site {site!r}")


def replaced_parameters(resolved: ResolvedPlan) -> set[str]:
    """Return the names of the dense parameters whose place the blocks take."""
    sites = [layer.site for layer in resolved]
    projections = [projection for site in sites for projection in (*site.up, site.down)]
    names = {p.weight for p in projections} | {p.bias for p in projections if p.bias is not None}
    return names.union(*(site.inner for site in sites))


def spread_blocks(
    gm: fx.GraphModule, ctx: PlanContext
) -> Iterator[tuple[str, fx.GraphModule, LayerPlan]]:
    """Yield (path, block, layer plan) of the blocks whose experts the plan spreads over ranks."""
    if ctx.mesh is None or ctx.resolved is None:
        return
    for path, block in blocks_of(gm):
        layer = layer_at(gm, path, ctx.resolved)
        if ctx.mesh.layout.ep(layer.experts) > 1:
            yield path, block, layer
