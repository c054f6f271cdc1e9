"""Check that an MLP, found in evaluation mode, does the same in training mode.

Stochastic depth, noise or another activation that runs in training only would be lost with the
module that is replaced. So the model is recorded once more in training mode, on fake tensors, and
each site is searched for again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from moeify.capture.capture import ExampleInputs, capture
from moeify.errors import CaptureError
from moeify.passes.match.meaning import difference
from moeify.passes.match.mlp_regions import Region, find_regions
from moeify.passes.match.placement import Placement, Placer

log = logging.getLogger("moeify")


class TrainingCheck:
    """Compare sites with the model in training mode; where that cannot run, accept all of them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self.placer: Placer | None = None
        self.regions: dict[tuple[str, ...], list[Region]] = {}
        self.reasons: Mapping[str, str] = {}
        try:
            recorded = capture(model, example_inputs, training=True)
        except CaptureError as error:
            log.debug("training mode was not checked: %s", error)
            return
        graph = recorded.graph_module.graph
        regions, missed = find_regions(graph, training=True)
        for region in regions:
            self.regions.setdefault(region.key, []).append(region)
        self.reasons = {miss.name: miss.reason for miss in missed}
        self.placer = Placer(model, recorded)

    def check(self, runs: Sequence[Region], placement: Placement, placer: Placer) -> Placement:
        """Return where one site goes, by all its runs in evaluation and its placement there.

        Where it is not the whole module in training it is not swapped whole; where it cannot be
        replaced as training runs it, or only part of it runs there, it is refused.
        """
        region = runs[0]
        if self.placer is None:
            return placement
        missing = [name for name in region.key if name not in self.placer.sources]
        if len(missing) == len(region.key):
            return placement
        trained = self.regions.get(region.key)
        if trained is None:
            name = region.down.weight.name.rpartition(".")[0]
            why = self.reasons.get(name, "something else happens to its hidden value")
            if missing:
                why = f"{missing[0]} is not used there"
            return _refused(placement, f"in training mode it is not such an MLP: {why}")
        for run in trained:
            how = difference(region.program, run.program)
            if how:
                why = f"between its projections it does something else in training mode: {how}"
                return _refused(placement, why)
        there = self.placer.placement(trained, whole=placement.install == "module")
        if placement.install == "module" and there != placement:
            placement = placer.placement(runs, whole=False)
            there = self.placer.placement(trained, whole=False)
        if placement.install == "refused" or there == placement:
            return placement
        if there.install == "refused":
            return _refused(placement, f"in training mode {there.reason}")
        around = tuple(dict.fromkeys((*placement.around, *there.around)))
        return replace(placement, around=around)


def _refused(placement: Placement, reason: str) -> Placement:
    return Placement("refused", reason, module=placement.module)
