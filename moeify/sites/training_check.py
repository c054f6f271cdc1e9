"""Check that an MLP, found in evaluation mode, does the same in training mode.

Stochastic depth, noise or another activation that runs in training only would be lost with the
module that is replaced. So the model is recorded once more in training mode, on fake tensors, and
each site is searched for again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from moeify.capture.capture import ExampleInputs, capture
from moeify.errors import CaptureError
from moeify.passes.match.dataflow import linears_of
from moeify.passes.match.meaning import difference
from moeify.passes.match.mlp_regions import Region, find_regions
from moeify.passes.match.placement import Placement, Placer

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the check for one site."""

    reason: str = ""  # why it cannot be replaced
    whole: bool = True  # whether its whole module may be swapped


class TrainingCheck:
    """Compare sites with the model in training mode; where that cannot run, accept all of them."""

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs) -> None:
        self.placer: Placer | None = None
        self.regions: dict[tuple[str, ...], list[Region]] = {}
        self.ran: set[str] = set()
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
        self.ran = {linear.weight.name for linear in linears_of(graph)}
        self.reasons = {miss.name: miss.reason for miss in missed}
        self.placer = Placer(model, recorded)

    def verdict(self, runs: Sequence[Region], placement: Placement) -> Verdict:
        """Judge one site by all its runs in evaluation and the placement found there."""
        region = runs[0]
        if self.placer is None or not set(region.key) <= self.ran:
            return Verdict()
        trained = self.regions.get(region.key)
        if trained is None:
            name = region.down.weight.name.rpartition(".")[0]
            why = self.reasons.get(name, "something else happens to its hidden value")
            return Verdict(f"in training mode it is not such an MLP: {why}")
        for run in trained:
            how = difference(region.program, run.program)
            if how:
                return Verdict(
                    f"between its projections it does something else in training mode: {how}"
                )
        whole = self.placer.whole_module(trained)
        return Verdict(whole=whole == placement or placement.install != "module")
