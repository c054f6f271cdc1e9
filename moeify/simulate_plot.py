"""The two facts of DeepSpeed-MoE about hops, counted and drawn.

For each size of a group an exchange is issued under the `fake` process group and its collectives
are counted: an all-to-all, flat or in two stages, and one coordinated with tensor slicing.

Source:
    DeepSpeed-MoE (Rajbhandari et al. 2022), section 5.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from moeify.errors import MoeifyError
from moeify.simulate_counter import count, fake_world

__all__ = ["SIZES", "Point", "draw", "exchange_once", "sweep"]

SIZES = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TENSOR = (1, 2, 4, 8)

Exchange = Callable[[str, int, int, int], Any]


@dataclass(frozen=True, slots=True)
class Point:
    """What one exchange took.

    Attributes:
        kind: "flat", "hierarchical" or "coordinated".
        ranks: p, the ranks that hold experts, tensor ranks included.
        node: G, ranks per node.
        tensor: L, ranks that hold the same tokens.
        hops: Point-to-point steps of a rank.
        volume: Bytes put in, relative to a flat exchange's.
    """

    kind: str
    ranks: int
    node: int
    tensor: int
    hops: int
    volume: float


def exchange_once(kind: str, ranks: int, node: int, tensor: int) -> Tensor:
    """Issue one exchange of a row per rank, in a world of `ranks`.

    Args:
        kind: "flat": one all-to-all. "hierarchical": one within the node, one among equal local
            ranks. "coordinated": one among equal tensor ranks, then an all-gather among the tensor
            ranks.
        ranks: p.
        node: G.
        tensor: L.

    Returns:
        What arrived, on `meta`.
    """
    inner = {"flat": ranks, "hierarchical": min(node, ranks), "coordinated": tensor}[kind]
    grid = torch.arange(ranks).view(-1, inner)
    mesh = DeviceMesh("cpu", grid, mesh_dim_names=("outer", "inner"))
    names = {name: mesh.get_group(name).group_name for name in ("outer", "inner")}
    rows = torch.empty(ranks, 1, device="meta")
    if kind == "flat":
        return _all_to_all(rows, ranks, names["inner"])
    if kind == "hierarchical":
        return _all_to_all(_all_to_all(rows, inner, names["inner"]), ranks // inner, names["outer"])
    part = _all_to_all(rows[: ranks // tensor], ranks // tensor, names["outer"])
    ops = torch.ops._c10d_functional
    gathered: Tensor = ops.wait_tensor(
        ops.all_gather_into_tensor(part.contiguous(), tensor, names["inner"])
    )
    return gathered


def _all_to_all(rows: Tensor, ranks: int, group: str) -> Tensor:
    ops, each = torch.ops._c10d_functional, [rows.shape[0] // ranks] * ranks
    sent: Tensor = ops.wait_tensor(ops.all_to_all_single(rows.contiguous(), each, each, group))
    return sent


def sweep(
    node: int = 8,
    *,
    sizes: Iterable[int] = SIZES,
    tensors: Iterable[int] = TENSOR,
    exchange: Exchange = exchange_once,
) -> list[Point]:
    """Count both facts over the sizes of a group.

    Args:
        node: G.
        sizes: p.
        tensors: L; those that divide p.
        exchange: Issues what is counted, given kind, p, G and L, in a fake world of p ranks.

    Raises:
        MoeifyError: A process group is at work already.
    """
    points = []
    for ranks in sizes:
        kinds = [("flat", 1)]
        if node < ranks and ranks % node == 0:
            kinds.append(("hierarchical", 1))
        kinds += [("coordinated", n) for n in tensors if ranks % n == 0]
        full = 0
        for kind, tensor in kinds:
            with fake_world(ranks, node):
                calls = count(partial(exchange, kind, ranks, node, tensor))
            moved = sum(call.payload for call in calls if call.kind == "all_to_all")
            full = full or moved
            hops = sum(call.hops for call in calls)
            points.append(Point(kind, ranks, node, tensor, hops, moved / full))
    return points


def draw(points: Iterable[Point], path: Path) -> None:
    """Draw both facts into a file whose suffix says its format.

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
    for tensor in sorted({p.tensor for p in points if p.kind == "coordinated"}):
        found = [p for p in points if p.kind == "coordinated" and p.tensor == tensor]
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
