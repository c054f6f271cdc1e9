"""What ZeRO adds to a simulated step: gathers, reduce-scatters, and memory by stage.

Computed from the decision (`ZeroPlan`) alone, so it is fast for any number of ranks; tests compare
it with what FSDP2 issues and holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

from moeify.distributed.layout import Layout
from moeify.simulate.counter import Call
from moeify.zero.pieces import BUCKET_BYTES
from moeify.zero.plan import Part, Unit, ZeroPlan

__all__ = ["memory_by_stage", "with_pieces"]


def memory_by_stage(zero: ZeroPlan) -> dict[int, dict[str, dict[str, int]]]:
    """Return the bytes that a rank holds at each stage with the plan's other settings."""
    return {
        stage: {kind: asdict(held) for kind, held in zero.at(stage).memory().items()}
        for stage in range(4)
    }


def with_pieces(
    calls: Sequence[Call], zero: ZeroPlan, layout: Layout, experts: Mapping[str, int]
) -> list[Call]:
    """Add those of ZeRO to the collectives of a step with whole parameters.

    `experts` are the numbers of experts of the units of experts, by name.
    """
    if zero.stage == 0:
        return list(calls)
    if zero.stage == 1:
        return [*calls, *_published(zero, layout, experts)]
    reduced = {_ranks(unit, layout, experts) for unit in zero.units}
    kept = [c for c in calls if c.phase != "gradients" or c.ranks not in reduced]
    forward: list[Call] = []
    backward: list[Call] = []
    gradients: list[Call] = []
    for unit in zero.units:
        ranks = _ranks(unit, layout, experts)
        whole = zero.laid(unit)
        for parts in [whole] if zero.engine == "fsdp2" else [(part,) for part in whole]:
            pieces = [part for part in parts if part.dim is not None]
            if size := sum(part.cut() * zero.computed(part) for part in pieces):
                forward.append(_gather(ranks, size, "forward", unit.name))
                if zero.is_gathered_again(unit):
                    backward.append(_gather(ranks, size, "backward", unit.name))
            gradients += _reduced(zero, parts, ranks, unit.name)
    return [*forward, *kept, *backward, *gradients]


def _reduced(
    zero: ZeroPlan, parts: Sequence[Part], ranks: tuple[int, ...], unit: str
) -> Iterable[Call]:
    """Yield the collectives that reduce the gradients of these parameters."""
    for whole in (False, True):
        trained = [p for p in parts if p.trains and (p.dim is None) == whole and p.ranks > 1]
        size = sum(p.padded * zero.reduced(p) for p in trained)
        if not size:
            continue
        kind = "all_reduce" if whole else "reduce_scatter"
        each = size * (2 if whole else 1) / len(ranks)
        yield Call(kind, ranks, size, each, "gradients", unit)


def _published(zero: ZeroPlan, layout: Layout, experts: Mapping[str, int]) -> Iterable[Call]:
    """Yield the gathers of the parameters that the optimizer has updated, in buckets."""
    filling: dict[tuple[str, tuple[int, ...], int], int] = {}
    for unit in zero.units:
        ranks = _ranks(unit, layout, experts)
        for part in unit.parts:
            if part.dim is None or not part.trains:
                continue
            key = part.over, ranks, zero.computed(part)
            filling[key] = filling.get(key, 0) + part.cut() * zero.computed(part)
            if filling[key] * len(ranks) >= BUCKET_BYTES:
                yield _gather(ranks, filling.pop(key), "optimizer", "")
    for (_, ranks, _), size in filling.items():
        yield _gather(ranks, size, "optimizer", "")


def _gather(ranks: tuple[int, ...], piece: int, phase: str, unit: str) -> Call:
    return Call("all_gather", ranks, piece, float(piece), phase, unit)


def _ranks(unit: Unit, layout: Layout, experts: Mapping[str, int]) -> tuple[int, ...]:
    """Return the ranks that share a unit with rank 0."""
    if unit.parts and unit.parts[0].over == "edp":
        return tuple(block[0][0] for block in layout.sparse_grid(experts[unit.name]))
    return tuple(row[0] for row in layout.dense_grid())
