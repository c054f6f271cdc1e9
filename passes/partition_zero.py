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
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor, fx, nn

from moeify.distributed.mesh import World
from moeify.nn.block import DenseMLP
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.infra.records import record_of
from moeify.passes.rewrite.blocks import (
    MOE_ROLE,
    SLICES,
    ZERO,
    blocks_of,
    layer_at,
    replaced_parameters,
)
from moeify.zero.plan import Kind, Part, Unit, ZeroPlan

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
        units, merged = _units(gm, ctx.model, names)
        decided = ZeroPlan(
            spec.stage,
            _with_prefetch(units, spec.prefetch),
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
                sharded = hasattr(parameter, "to_local")
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
    if hasattr(parameter, "to_local"):
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


@dataclass(slots=True)
class _Run:
    """Modules that the graph enters, in order, and who reads which parameter."""

    entered: dict[str, int] = field(default_factory=dict)
    readers: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)


def _run_of(gm: fx.GraphModule) -> _Run:
    run = _Run()
    for number, node in enumerate(gm.graph.nodes):
        record = record_of(node)
        if record is None or node.op == "get_attr":  # its users read it
            continue
        paths = record.modules
        if record.role == MOE_ROLE:
            path = str(node.target)
            paths = (*(p for p in paths if p != path), path, f"{path}.experts")
        for path in paths:
            run.entered.setdefault(path, number)
        for read in record.params:
            run.readers.setdefault(read.name, []).append(paths)
    return run


def _units(
    gm: fx.GraphModule, model: nn.Module, names: dict[str, Part]
) -> tuple[list[Unit], tuple[tuple[str, str], ...]]:
    """Group the parameters, in the order in which the graph enters their units."""
    run = _run_of(gm)
    blocks = [path for path, _ in blocks_of(gm)]
    tied = _tied(model)
    merged: list[tuple[str, str]] = []
    candidates: list[str] = []
    for path in _candidates(model, blocks, run):
        reason = _shared(path, run, tied)
        if reason:
            merged.append((path, reason))
        else:
            candidates.append(path)
    held: dict[str, list[Part]] = {path: [] for path in ("", *candidates)}
    held |= {f"{path}.experts": [] for path in blocks}
    for name, part in names.items():
        holders = [path for path in held if not path or name.startswith(f"{path}.")]
        held[max(holders, key=len)].append(part)
    last = len(gm.graph.nodes)
    order = sorted(
        (path for path, parts in held.items() if parts),
        key=lambda path: (run.entered.get(path, last) if path else -1, path.count(".")),
    )
    made = []
    for path in order:
        outer = (other for other in candidates if path.startswith(f"{other}."))
        around = max(outer, key=len, default=path)
        parts = held[path]
        made.append(Unit(path, parts[0].kind, tuple(parts), around))
    return made, tuple(merged)


def _candidates(model: nn.Module, blocks: list[str], run: _Run) -> Iterator[str]:
    """Yield the modules of stacks, outermost first found, and blocks that are in none of them."""
    found: list[str] = []
    for path, module in model.named_modules():
        stack = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential)
            and any(b.startswith(f"{path}." if path else "") for b in blocks)
        )
        if not stack or path in blocks or _inside(path, [*found, *blocks]):
            continue
        for key, child in module.named_children():
            name = f"{path}.{key}" if path else key
            if name in run.entered and any(True for _ in child.parameters()):
                found.append(name)
    found += [path for path in blocks if not _inside(path, found) and path not in found]
    yield from found


def _inside(path: str, others: list[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Return for each name of a parameter with several names the others."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return {
        name: [n for n in names if n != name]
        for names in places.values()
        if len(names) > 1
        for name in names
    }


def _shared(path: str, run: _Run, tied: dict[str, list[str]]) -> str:
    """Return why a module cannot be gathered on its own, or ""."""
    prefix = f"{path}."
    for name, readers in run.readers.items():
        if name.startswith(prefix) and any(path not in reader for reader in readers):
            return f"{name} is read outside of it"
    for name, others in tied.items():
        outside = [other for other in others if not other.startswith(prefix)]
        if name.startswith(prefix) and outside:
            return f"{name} is tied to {outside[0]}"
    return ""


def _with_prefetch(units: list[Unit], prefetch: int) -> tuple[Unit, ...]:
    """Let each module gather what the next ones will need while it runs."""
    spans: dict[str, list[str]] = {}
    for unit in units:
        spans.setdefault(unit.around, []).append(unit.name)
    order = list(spans)
    made = []
    for unit in units:
        place = order.index(unit.around)
        ahead = order[place + 1 : place + 1 + prefetch]
        # The model's own is the first in the backward pass, too.
        end = place if unit.around else len(order)
        behind = order[max(0, end - prefetch) : end][::-1]
        first = spans[unit.around][0] == unit.name  # once for all that span a module
        after = tuple(name for span in ahead for name in spans[span]) if first else ()
        before = tuple(n for span in behind if span for n in spans[span]) if first else ()
        made.append(replace(unit, after=after, before=before))
    return tuple(made)
