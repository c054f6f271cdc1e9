"""Check that an MLP, found in one run of the model, does the same in another run of it.

Stochastic depth, noise or another activation that runs in training only would be lost with the
module that is replaced; a constant that was computed from the length of the example, or that counts
calls, would stay what it was. So the model is recorded more than once, and each site is searched
for again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from moeify.capture.attribute_reads import AttributeRead
from moeify.capture.capture import Capture
from moeify.passes.match.meaning import difference
from moeify.passes.match.mlp_regions import Region, find_regions
from moeify.passes.match.placement import Placement, Placer
from moeify.sites.watched import watched_by


class RunCheck:
    """Compare sites with another run of the model.

    Args:
        model: The model that ran.
        recorded: What it did.
        where: When that was, such as "in training mode".
        training: It ran in training mode.
        partial: Accept a site that is not found in this run, because its sizes are special.
    """

    def __init__(
        self,
        model: nn.Module,
        recorded: Capture,
        where: str,
        *,
        training: bool = False,
        partial: bool = False,
    ) -> None:
        self.model, self.recorded = model, recorded
        self.where, self.partial = where, partial
        regions, missed = find_regions(recorded.graph_module.graph, training=training)
        self.regions: dict[tuple[str, ...], list[Region]] = {}
        for region in regions:
            self.regions.setdefault(region.key, []).append(region)
        self.reasons = {miss.name: miss.reason for miss in missed}
        self.placer = Placer(model, recorded)

    def check(self, runs: Sequence[Region], placement: Placement, placer: Placer) -> Placement:
        """Return where one site goes, by its runs and placement so far and by this run.

        Where it is not the whole module in this run it is not swapped whole; where it cannot be
        replaced as this run has it, or only part of it runs, it is refused.
        """
        region = runs[0]
        missing = [name for name in region.key if name not in self.placer.sources]
        if len(missing) == len(region.key):
            return placement
        there = self.regions.get(region.key)
        if there is None:
            return placement if self.partial else self._not_found(region, placement, missing)
        for run in there:
            how = difference(region.program, run.program)
            if how:
                return _refused(
                    placement,
                    f"between its projections it does something else {self.where}: {how}",
                )
        return placement if self.partial else self._placed(runs, there, placement, placer)

    def watched(self, key: tuple[str, ...], placement: Placement) -> tuple[AttributeRead, ...]:
        """Return the attributes that one site read in this run and whose values its block has."""
        return watched_by(self.model, self.recorded, self.regions.get(key, []), placement)

    def _not_found(self, region: Region, placement: Placement, missing: list[str]) -> Placement:
        name = region.down.weight.name.rpartition(".")[0]
        why = self.reasons.get(name, "something else happens to its hidden value")
        if missing:
            why = f"{missing[0]} is not used there"
        return _refused(placement, f"{self.where} it is not such an MLP: {why}")

    def _placed(
        self,
        runs: Sequence[Region],
        there: Sequence[Region],
        placement: Placement,
        placer: Placer,
    ) -> Placement:
        found = self.placer.placement(there, whole=placement.install == "module")
        if placement.install == "module" and found != placement:
            placement = placer.placement(runs, whole=False)
            found = self.placer.placement(there, whole=False)
        if placement.install == "refused" or found == placement:
            return placement
        if found.install == "refused":
            return _refused(placement, f"{self.where} {found.reason}")
        around = tuple(dict.fromkeys((*placement.around, *found.around)))
        return replace(placement, around=around)


def _refused(placement: Placement, reason: str) -> Placement:
    return Placement("refused", reason, module=placement.module)
