"""What ZeRO partitions, as data: over which ranks, along which dimension, in which unit.

Arithmetic only, without torch, so that a decision can be printed, tested and simulated anywhere.
`passes/partition_zero.py` makes it from a graph; `fsdp2.py`, `graph_engine.py` and
`stage1.py` carry it out.

Source:
    ZeRO: Rajbhandari et al. 2020, section 5. Units and prefetching: PyTorch FSDP2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moeify.plan.specs import ZeroSpec


Kind = Literal["dense", "expert"]
_KINDS: tuple[Kind, ...] = ("dense", "expert")
_SIZES = {"bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True)
class Part:
    """One parameter of this rank and how it is partitioned."""

    name: str  # in the converted model
    kind: Kind  # "expert" for experts of a MoE layer that are spread over ranks
    over: str  # mesh dimension over which it is partitioned: "dp" or "edp"
    ranks: int  # size of that dimension
    # Dimension that is cut, unevenly dimension 0 only; None if it stays whole, because `ranks` is 1
    # or because it has no dimension to cut.
    dim: int | None
    shape: tuple[int, ...]  # on this rank, before ZeRO cuts it
    itemsize: int  # as the model holds it
    trains: bool = True  # has a gradient and optimizer state

    @property
    def numel(self) -> int:
        """Elements on this rank before ZeRO cuts it."""
        return prod(self.shape)

    def cut(self, rank: int = 0) -> int:
        """Return the elements of the rank's piece; the first rank's is the largest."""
        if self.dim is None:
            return self.numel
        size = self.shape[self.dim]
        each = -(-size // self.ranks)
        length = max(0, min(size, (rank + 1) * each) - rank * each)
        return self.numel // size * length if size else 0

    @property
    def padded(self) -> int:
        """Elements of all pieces as they are sent: each padded to the size of the first."""
        return self.numel if self.dim is None else self.cut() * self.ranks


@dataclass(frozen=True, slots=True)
class Unit:
    """Parameters of one kind, and so of one mesh, that are gathered together for one module."""

    name: str  # path of that module; "" is the model
    kind: Kind
    parts: tuple[Part, ...]
    around: str = ""  # module for whose run they are gathered: itself, or a layer around it
    after: tuple[str, ...] = ()  # units whose gather starts while this one computes forward
    before: tuple[str, ...] = ()  # the same in the backward pass

    @property
    def elements(self) -> int:
        """Elements of its parameters on this rank before ZeRO cuts them."""
        return sum(part.numel for part in self.parts)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on the rank that holds most of them."""

    parameters: int  # between steps: whole parameters, or this rank's pieces
    gradients: int
    optimizer: int  # states and master weights
    gathered: int = 0  # during a step: whole parameters that are gathered at once

    @property
    def total(self) -> int:
        """All of it, at its peak."""
        return self.parameters + self.gradients + self.optimizer + self.gathered


@dataclass(frozen=True, slots=True)
class ZeroPlan:
    """The decision for one model on one layout; settings are those of `ZeroSpec`."""

    stage: int
    units: tuple[Unit, ...]  # in the order in which the graph runs them; the model's ("") first
    engine: str = "fsdp2"
    offload: str = "none"
    precision: str = "model"
    master: str = "float32"
    reduce: str = "float32"
    merged: tuple[tuple[str, str], ...] = ()  # (path, reason) of layers that are not units
    device: str = "cuda"  # where the model computes; on "cpu" an offload has nothing to copy

    @property
    def parts(self) -> dict[str, Part]:
        """All parameters by name, in the order of their units."""
        return {part.name: part for unit in self.units for part in unit.parts}

    def laid(self, unit: Unit) -> tuple[Part, ...]:
        """Return a unit's parameters as they are cut at this stage."""
        # FSDP2 leaves nothing whole: if no dimension is free, it cuts the shard along dimension 0.
        if self.engine != "fsdp2" or self.stage < 2:
            return unit.parts
        return tuple(
            replace(part, dim=0) if part.dim is None and part.ranks > 1 and part.shape else part
            for part in unit.parts
        )

    @property
    def has_masters(self) -> bool:
        """Whether the optimizer updates float32 copies of what the model computes with."""
        return self.precision != "model" and self.master == "float32"

    def at(self, stage: int) -> ZeroPlan:
        """Return this decision at another stage."""
        return replace(self, stage=stage)

    def under(self, spec: ZeroSpec) -> ZeroPlan:
        """Return this decision with the settings of another `zero:`; the units stay."""
        return replace(
            self,
            stage=spec.stage,
            engine=spec.engine,
            offload=spec.offload,
            precision=spec.precision,
            master=spec.master,
            reduce=spec.reduce,
        )

    def computed(self, part: Part) -> int:
        """Return the bytes of an element where the model computes with it."""
        return _SIZES.get(self.precision, part.itemsize)

    def reduced(self, part: Part) -> int:
        """Return the bytes of an element of its gradient where ranks reduce it."""
        wide = self.stage >= 2 and self.precision != "model" and self.reduce == "float32"
        return 4 if wide else self.computed(part)

    def kept(self, part: Part) -> int:
        """Return the bytes of an element where the optimizer updates it."""
        if self.precision == "model":
            return part.itemsize
        return 4 if self.master == "float32" else _SIZES[self.precision]

    def memory(self, *, states: int = 2, rank: int = 0) -> dict[Kind, Memory]:
        """Return what a rank of the group holds, by kind; rank 0 holds most.

        `states` counts the tensors that the optimizer keeps per parameter: 2 for Adam.
        """
        return {kind: self._memory(kind, states, rank) for kind in _KINDS}

    def _memory(self, kind: Kind, states: int, rank: int) -> Memory:
        parts = [part for unit in self.units if unit.kind == kind for part in self.laid(unit)]
        if self.stage >= 2:
            pieces = sum(part.cut(rank) * self.kept(part) for part in parts)
            trained = sum(part.cut(rank) * self.kept(part) for part in parts if part.trains)
            return Memory(pieces, trained, states * trained, self._gathered(kind))
        whole = sum(part.numel * self.computed(part) for part in parts)
        gradients = sum(part.numel * self.computed(part) for part in parts if part.trains)
        copies = self.has_masters or (self.offload != "none" and self.device != "cpu")
        tensors = states + int(copies)
        cut = rank if self.stage == 1 else None
        held = sum(
            (part.numel if cut is None else part.cut(cut)) * self.kept(part) * tensors
            for part in parts
            if part.trains
        )
        return Memory(whole, gradients, held)

    def _gathered(self, kind: Kind) -> int:
        """Return the bytes that gathers add: all, or at stage 3 what is alive at once."""
        sizes = [
            sum(p.padded * self.computed(p) for p in self.laid(unit)) if unit.kind == kind else 0
            for unit in self.units
        ]
        if self.stage == 2 or not sizes:
            return sum(sizes)
        root = sum(size for unit, size in zip(self.units, sizes, strict=True) if not unit.around)
        spans: dict[str, int] = {}
        ahead: dict[str, int] = {}
        for unit, size in zip(self.units, sizes, strict=True):
            if unit.around:
                spans[unit.around] = spans.get(unit.around, 0) + size
                # A parameter that no other rank shares is copied when it is used, not before.
                early = size if any(part.ranks > 1 for part in unit.parts) else 0
                ahead[unit.around] = ahead.get(unit.around, 0) + early
        own, next_ones = list(spans.values()), list(ahead.values())
        window = 1 + max(
            (len({self._around(n) for n in u.after}) for u in self.units if u.around), default=0
        )
        most = (size + sum(next_ones[i + 1 : i + window]) for i, size in enumerate(own))
        return root + max(most, default=0)

    def is_gathered_again(self, unit: Unit) -> bool:
        """Tell whether the backward pass gathers a unit again."""
        return self.stage == 3 and (unit.around != "" or self.engine == "graph")

    def _around(self, name: str) -> str:
        return next(unit.around for unit in self.units if unit.name == name)

    def traffic(self) -> dict[Kind, dict[str, int]]:
        """Return the bytes of whole parameters that one training step gathers and reduces.

        By kind and collective, as payload: a ring sends `(n - 1) / n` of it from each of `n` ranks.
        Stage 3 gathers twice, for the forward and the backward pass
        (FSDP2 the model's own unit once; biases that no gradient reads are counted twice); stage 2
        once; stage 1 gathers what the optimizer has updated; stages 0 and 1 all-reduce. Uneven
        pieces count as large as the first one.
        """
        total: dict[Kind, dict[str, int]] = {}
        for kind in _KINDS:
            row = {"gather": 0, "reduce_scatter": 0, "all_reduce": 0}
            for unit in self.units:
                if unit.kind != kind:
                    continue
                for part in self.laid(unit):
                    self._count(row, unit, part)
            total[kind] = row
        return total

    def _count(self, row: dict[str, int], unit: Unit, part: Part) -> None:
        if part.ranks == 1:
            return
        size = part.padded * self.computed(part)
        whole = part.dim is None
        if self.stage >= 2 and not whole:
            row["gather"] += size * (2 if self.is_gathered_again(unit) else 1)
        elif self.stage == 1 and part.trains and not whole:
            row["gather"] += size
        if part.trains:
            kind = "reduce_scatter" if self.stage >= 2 and not whole else "all_reduce"
            elements = part.padded if self.stage >= 2 else part.numel
            row[kind] += elements * self.reduced(part)

    def lines(self) -> Iterator[str]:
        """Yield the decision for logs, a line for each unit."""
        yield f"ZeRO stage {self.stage} ({self.engine}), offload {self.offload}"
        for unit in self.units:
            ranks = max((part.ranks for part in unit.parts), default=1)
            over = f"{unit.parts[0].over} of {ranks}" if unit.parts else "nothing"
            text = f"{unit.name or 'the model'}: {unit.elements:,} {unit.kind} over {over}"
            if unit.after:
                text += f", then {', '.join(unit.after)}"
            yield text
        for path, reason in self.merged:
            yield f"{path}: not a unit of its own: {reason}"
