"""`moeify simulate`: what one training step over many ranks sends, counted on one machine."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from moeify.cli.inspect import dense_folder
from moeify.cli.output import make_table, say
from moeify.hf.local_folder import build_on_meta
from moeify.plan.plan import Plan
from moeify.plan.selection import shorten
from moeify.simulate.plot import Point, draw, sweep
from moeify.simulate.simulate import Collectives, Simulation, simulate
from moeify.units import format_bytes

_LENGTH = 2048
_COLLECTIVES = {
    "phase": "left",
    "layer": "left",
    "collective": "left",
    "ranks": "right",
    "nodes": "right",
    "count": "right",
    "hops": "right",
    "in the node": "right",
    "to other nodes": "right",
}
_MEMORY = {
    "stage": "right",
    "of": "left",
    "parameters": "right",
    "gradients": "right",
    "optimizer": "right",
    "gathered at once": "right",
}
_HOPS = {"ranks": "right", "flat": "right", "hierarchical": "right"}


def simulate_model(
    path: str,
    plan: Plan,
    console: Console,
    *,
    world: int,
    node: int,
    expert: int | None = None,
    tensor: int | None = None,
    batch: int = 1,
    length: int | None = None,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Print what a training step over `world` ranks takes, and return it as data.

    Args:
        path: A Hugging Face folder, of which only the config is read.
        plan: The plan.
        console: Where to print.
        world: Number of ranks.
        node: Ranks per node.
        expert: Replaces the plan's `parallel.expert`.
        tensor: Replaces the plan's `parallel.tensor`.
        batch: Sequences per rank.
        length: Tokens per sequence; the model's longest, at most 2048, if None.
        plot: Image file for hops over the number of ranks.
    """
    folder = dense_folder(path)
    data = plan.data()
    sizes = {"expert": expert, "tensor": tensor}
    data["parallel"] = data.get("parallel", {}) | {k: n for k, n in sizes.items() if n is not None}
    model = build_on_meta(folder)
    found = simulate(
        model,
        Plan.of(data),
        world=world,
        node=min(node, world),
        batch=batch,
        length=_length(model) if length is None else length,
    )
    print_simulation(found, console)
    result = {**found.to_dict(), "model": str(folder), "class": found.model}
    if plot is not None:
        points = sweep(node)
        _print_hops(points, console)
        draw(points, plot)
        say(console, f"drawn: {plot}")
        result["hops"] = [asdict(point) for point in points]
    return result


def _length(model: nn.Module) -> int | None:
    """Return the sequence length to simulate; None for a model without one."""
    config: Any = model.config
    names = ("max_position_embeddings", "n_positions")
    limits = [n for n in (getattr(config, name, None) for name in names) if isinstance(n, int)]
    return min(_LENGTH, *limits) if limits else None


def print_simulation(found: Simulation, console: Console) -> None:
    """Print what a simulated training step does, as tables."""
    layout = ", ".join(f"{name} {value}" for name, value in found.layout.items())
    say(console, f"{found.model} on {found.world} ranks, {found.node} per node: {layout}")
    inputs = ", ".join(f"{name} {shape}" for name, shape in found.inputs.items())
    say(console, f"one training step of rank 0, counted, not run: {inputs}")
    console.print(make_table(_COLLECTIVES, _rows(found.collectives)))
    totals = found.totals()
    say(
        console,
        f"in all {totals['count']:,} collectives, {totals['hops']:,} hops, "
        f"{format_bytes(totals['node_bytes'])} sent in the node, "
        f"{format_bytes(totals['network_bytes'])} to other nodes",
    )
    shares = (
        f"{found.parameters[kind]:,} {kind} ({format_bytes(found.parameter_bytes[kind])})"
        for kind in ("dense", "expert")
    )
    say(console, f"parameters on a rank: {', '.join(shares)}")
    say(console, f"kept for the backward pass: {format_bytes(found.activation_bytes)}")
    if found.memory:
        say(
            console,
            f"kept on a rank by ZeRO stage, with Adam; the plan's is {found.zero['stage']}:",
        )
        console.print(make_table(_MEMORY, _memory(found)))
    if found.even_load:
        say(console, "the plan drops nothing; an even load is assumed for sizes (capacity 1.0)")
    if found.imbalance:
        worst = max(found.imbalance, key=lambda layer: layer.ranks)
        say(
            console,
            f"imbalance of a fresh router on {worst.tokens:,} random tokens, at worst: the fullest "
            f"rank has {worst.ranks:.2f} times the mean load, the fullest expert "
            f"{max(layer.experts for layer in found.imbalance):.2f} times",
        )


def _rows(collectives: Iterable[Collectives]) -> Iterable[Sequence[object]]:
    """Yield one row for all layers that send the same."""
    alike: dict[Collectives, list[str]] = {}
    for row in collectives:
        alike.setdefault(replace(row, layer=""), []).append(row.layer)
    for row, layers in alike.items():
        each = " each" if len(layers) > 1 else ""
        yield (
            row.phase,
            shorten([layer for layer in layers if layer], 2) or "-",
            row.kind,
            row.ranks,
            row.nodes,
            f"{row.count}{each}",
            f"{row.hops:,}",
            format_bytes(row.node_bytes),
            format_bytes(row.network_bytes),
        )


def _memory(found: Simulation) -> Iterable[Sequence[object]]:
    for stage, kinds in found.memory.items():
        for kind, sizes in kinds.items():
            yield stage, kind, *(format_bytes(number) for number in sizes.values())


def _print_hops(points: Sequence[Point], console: Console) -> None:
    tensors = sorted({p.tensor for p in points if p.kind == "coordinated" and p.tensor > 1})
    hops = {(p.kind, p.ranks, p.tensor): p.hops for p in points}
    columns = [("flat", 1), ("hierarchical", 1), *(("coordinated", n) for n in tensors)]
    headers = _HOPS | {f"tensor {n}": "right" for n in tensors}
    rows = [
        [ranks, *(hops.get((kind, ranks, tensor), "-") for kind, tensor in columns)]
        for ranks in sorted({p.ranks for p in points})
    ]
    say(console, "hops of one exchange, counted; with tensor ranks, coordinated:")
    console.print(make_table(headers, rows))
