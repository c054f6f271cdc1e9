"""partition-zero: decide for every parameter over which ranks ZeRO cuts it (analysis).

Before and after, the same graph; the decision is new::

    %embed  = embedding(%ids, embed.weight)            ""            dense  over dp
    %q      = linear(%norm, layers.0.attn.q.weight)    layers.0      dense  over dp
    %moe    = layers.0.mlp(%norm_1)                    layers.0.mlp.experts  over edp
    ...

Parameters of one module of a repeated stack are gathered together (a unit), experts apart from
them, because they are cut over other ranks; what is left belongs to the model's own unit. The
order in which the graph enters units is the order in which they are gathered ahead. A module is not
a unit if something outside of it reads its parameters. The whole decision, with what was merged and
why, is `zero_of(gm)`.

Source:
    ZeRO: Rajbhandari et al. 2020. Experts over their own replicas: DeepSpeed-MoE (Rajbhandari et
    al. 2022), section 5.2.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from moeify.distributed.dtensor import is_sharded
from moeify.distributed.mesh import World
from moeify.nn.block import DenseMLP
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import (
    SLICES,
    ZERO,
    blocks_of,
    layer_at,
    replaced_parameters,
)
from moeify.passes.rewrite.zero_units import zero_units
from moeify.zero.plan import Kind, Part, ZeroPlan

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class PartitionZero:
    """Decide what is partitioned, over which ranks, and in which units."""

    name: ClassVar[str] = "partition-zero"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS, Fact.SHARDED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.PARTITIONED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        world = ctx.mesh
        if world is None or ctx.plan is None or ctx.resolved is None or ctx.model is None:
            return PassResult(gm, False)
        spec = ctx.plan.zero
        names = _names(gm, ctx, world)
        units, merged = zero_units(gm, ctx.model, names, spec.prefetch)
        decided = ZeroPlan(
            spec.stage,
            units,
            spec.engine,
            spec.offload,
            spec.precision,
            spec.master,
            spec.reduce,
            merged,
            world.device_type,
        )
        if spec.stage:
            for line in decided.lines():
                log.info("%s", line)
        if zero_of(gm) == decided:
            return PassResult(gm, False)
        gm.meta[ZERO] = decided
        return PassResult(gm, True)


def zero_of(gm: fx.GraphModule) -> ZeroPlan | None:
    """Return what `partition-zero` decided for a graph, or None where it has not run."""
    found = gm.meta.get(ZERO)
    assert found is None or isinstance(found, ZeroPlan)
    return found


def _names(gm: fx.GraphModule, ctx: PlanContext, world: World) -> dict[str, Part]:
    """Return every parameter that the converted model will have, as this rank will hold it."""
    assert ctx.model is not None
    assert ctx.resolved is not None
    slices = gm.meta.get(SLICES)
    blocks = dict(blocks_of(gm))
    parts: dict[str, Part] = {}
    ways = {} if slices is None else dict(slices.modules)
    gone = _replaced(gm, ctx, blocks)
    for name, parameter in ctx.model.named_parameters():
        if name in gone:
            continue
        owner, _, leaf = name.rpartition(".")
        taken = _sliced_dim(ways.get(owner), leaf, transposed=False)
        parts[name] = _part(name, parameter, world, taken, "dense", "dp", world.layout.dp)
    for path, block in blocks.items():
        layer = layer_at(gm, path, ctx.resolved)
        branches = () if slices is None else slices.branches
        inner = _branch_ways(block, path, branches)
        for leaf, parameter in block.named_parameters():
            name = f"{path}.{leaf}"
            if leaf.startswith("experts."):
                sharded = is_sharded(parameter)
                ranks = world.layout.edp(layer.experts) if sharded else world.layout.dp
                over = "edp" if sharded else "dp"
                parts[name] = _part(name, parameter, world, (), "expert", over, ranks)
            else:
                taken = inner.get(leaf, ())
                parts[name] = _part(name, parameter, world, taken, "dense", "dp", world.layout.dp)
    return parts


def _replaced(gm: fx.GraphModule, ctx: PlanContext, blocks: dict[str, Any]) -> set[str]:
    """Return the names of dense parameters that are in blocks, or copied into their experts."""
    assert ctx.model is not None
    assert ctx.resolved is not None
    gone = replaced_parameters(ctx.resolved)
    held = {id(p) for block in blocks.values() for p in block.parameters()}
    named = dict(ctx.model.named_parameters())
    shared = {id(named[name]) for name in gone if name in named}
    return gone | {name for name, p in named.items() if id(p) in held | shared}


def _part(
    name: str,
    parameter: Tensor,
    world: World,
    taken: tuple[int, ...],
    kind: Kind,
    over: str,
    ranks: int,
) -> Part:
    shape = list(parameter.shape)
    if is_sharded(parameter):
        sharded: Any = parameter
        shape = list(sharded.to_local().shape)
        taken = tuple(p.dim for p in sharded.placements if hasattr(p, "dim"))
    else:
        for dim in taken:
            shape[dim] //= world.layout.tensor
    return Part(
        name,
        kind,
        over,
        ranks,
        _dim(shape, taken, ranks),
        tuple(shape),
        parameter.element_size(),
        parameter.requires_grad,
    )


def _dim(shape: list[int], taken: tuple[int, ...], ranks: int) -> int | None:
    """Return the first free dimension that divides evenly; else a free dimension 0; else None."""
    if ranks == 1:
        return None
    free = [dim for dim in range(len(shape)) if dim not in taken]
    even = [dim for dim in free if shape[dim] and shape[dim] % ranks == 0]
    if 0 in free and (0 in even or not even):
        return 0
    return even[0] if even else None


def _sliced_dim(way: str | None, leaf: str, *, transposed: bool) -> tuple[int, ...]:
    """Return the dimension of a projection's parameter that the tensor ranks share."""
    if way is None or (leaf == "bias" and way == "rowwise"):
        return ()
    if leaf == "bias":
        return (0,)
    return ((0,) if (way == "colwise") != transposed else (1,)) if leaf == "weight" else ()


def _branch_ways(
    block: nn.Module, path: str, branches: tuple[str, ...]
) -> dict[str, tuple[int, ...]]:
    """Return the sliced dimension of each parameter of a block's dense branch."""
    ways: dict[str, tuple[int, ...]] = {}
    for name, branch in block.named_modules():
        if not isinstance(branch, DenseMLP) or f"{path}.{name}" not in branches:
            continue
        for child in (*branch.up_names, branch.down_name):
            way = "rowwise" if child == branch.down_name else "colwise"
            stored: Any = branch.get_submodule(child)
            for leaf, _ in stored.named_parameters():
                ways[f"{name}.{child}.{leaf}"] = _sliced_dim(
                    way, leaf, transposed=bool(stored.transposed)
                )
    return ways
