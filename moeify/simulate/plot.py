"""Count and plot the hops of an exchange, the two claims of DeepSpeed-MoE.

For each group size a block is converted and run under the `fake` process group, and the collectives
that send its rows are counted: flat, hierarchical, and coordinated with tensor slicing.

Source:
    DeepSpeed-MoE (Rajbhandari et al. 2022), section 5.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from moeify.api import moeify
from moeify.errors import MoeifyError
from moeify.simulate.counter import Call, count, fake_world

__all__ = ["SIZES", "Point", "draw", "exchange_once", "sweep"]

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TENSOR = (2, 4, 8)

_WIDTH = 64

Exchange = Callable[[str, int, int, int], Sequence[Call]]


@dataclass(frozen=True, slots=True)
class Point:
    """The cost of one exchange."""

    kind: str  # "flat", "hierarchical" or "coordinated"
    ranks: int  # p: those that hold experts, tensor ranks included
    node: int  # G: ranks per node
    tensor: int  # L: ranks that hold the same tokens
    hops: int  # point-to-point steps of a rank
    volume: float  # bytes sent, relative to a flat exchange


def exchange_once(kind: str, ranks: int, node: int, tensor: int) -> list[Call]:
    """Return the collectives that send rows to their experts in a block on p = `ranks` ranks.

    In a fake world of that size. The block is on `meta` and gives every expert rank one expert and
    one row of each rank; coordinated, the all-gather within the tensor group is included.
    """
    experts = ranks // tensor
    with torch.device("meta"):
        mlp = nn.Sequential(nn.Linear(_WIDTH, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH))
        tokens = torch.empty(ranks, _WIDTH)
    way = "hierarchical" if kind == "hierarchical" else "flat"
    plan = {
        "layers": [{"select": "all", "experts": experts}],
        "router": {"capacity_factor": 1.0, "min_capacity": 1},
        "parallel": {"expert": experts, "tensor": tensor, "all_to_all": way},
    }
    model = moeify(nn.Sequential(mlp), plan, example_inputs=tokens, verify=False).train()
    with torch.no_grad():
        calls = count(partial(model, tokens))
    exchanges = [call for call in calls if call.kind == "all_to_all"]
    third = len(exchanges) // 3  # counts, rows, rows back
    gathers = [call for call in calls if call.kind == "all_gather"]
    return [*exchanges[third : 2 * third], *gathers]


def sweep(
    node: int = 8,
    *,
    sizes: Iterable[int] = SIZES,
    tensors: Iterable[int] = TENSOR,
    exchange: Exchange = exchange_once,
) -> list[Point]:
    """Count hops over group sizes p and those tensor sizes L that leave several expert ranks.

    `exchange` gets kind, p, G and L in a fake world of p ranks and returns its collectives.
    """
    points = []
    for ranks in sizes:
        kinds = [("flat", 1)]
        if node < ranks and ranks % node == 0:
            kinds.append(("hierarchical", 1))
        kinds += [("coordinated", n) for n in tensors if ranks % n == 0 and ranks > n]
        full = 0
        for kind, tensor in kinds:
            with fake_world(ranks, node):
                calls = exchange(kind, ranks, node, tensor)
            moved = sum(call.payload for call in calls if call.kind == "all_to_all")
            full = full or moved
            hops = sum(call.hops for call in calls)
            points.append(Point(kind, ranks, node, tensor, hops, moved / full))
    return points


def draw(points: Iterable[Point], path: Path) -> None:
    """Plot both claims into a file, whose suffix is its format.

    Raises:
        MoeifyError: matplotlib is not installed, or does not know the format.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MoeifyError("--plot needs matplotlib: pip install 'moeify[plot]'") from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    points = list(points)
    for kind in ("flat", "hierarchical"):
        found = [p for p in points if p.kind == kind]
        label = f"{kind}, volume x {max((p.volume for p in found), default=1):g}"
        left.plot([p.ranks for p in found], [p.hops for p in found], marker="o", label=label)
    left.set_title(f"all-to-all, {points[0].node} ranks per node", fontsize=10)
    for tensor in sorted({p.tensor for p in points if p.kind != "hierarchical"}):
        found = [p for p in points if p.kind != "hierarchical" and p.tensor == tensor]
        right.plot(
            [p.ranks for p in found], [p.hops for p in found], marker="o", label=f"tensor {tensor}"
        )
    right.set_title("coordinated with tensor slicing", fontsize=10)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel("ranks p")
        axis.grid(alpha=0.3, linewidth=0.4)
        axis.legend(fontsize=8)
    left.set_ylabel("hops per rank, counted")
    try:
        figure.savefig(path, dpi=130)
    except ValueError as error:
        raise MoeifyError(f"{path}: {error}") from error
