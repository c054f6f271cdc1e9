"""Run a model again: at other sizes, on the state that it left itself, and in training mode.

What differs from the first run was computed from sizes, counts calls, or is another function in
training: no constant of the first run may stand for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moeify.capture.capture import Capture, ExampleInputs, Mode, capture, capture_runs
from moeify.capture.other_inputs import Sizes, resized, sizes_of
from moeify.errors import CaptureError
from moeify.sites.run_check import RunCheck

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class LaterRun:
    """A run after the first one, which it finds the traces of."""

    sizes: Sizes | None  # None where the inputs have none
    where: str
    recorded: Capture


def evaluation_runs(model: nn.Module, inputs: ExampleInputs) -> tuple[Capture, list[LaterRun]]:
    """Record the run on `inputs`, and later ones at other sizes.

    Raises:
        CaptureError: The model does not run on these inputs.
    """
    sizes = sizes_of(inputs)
    first, later = _record(model, inputs, sizes, _planned(sizes))
    for retry in _retries(sizes) if first.mode == "fake" else ():
        if later:
            break
        log.debug("the model does not run at other sizes: trying %s", retry)
        # The last one is not watched either: it runs if the first one did.
        later = _record(model, inputs, sizes, [retry], watch=retry != sizes)[1]
    return first, later


def checks_for(
    model: nn.Module, inputs: ExampleInputs, later: Sequence[LaterRun]
) -> list[RunCheck]:
    """Return what compares sites with later runs, and with the model in training mode.

    In training mode it runs at the sizes of the first later run, which is compared before.
    """
    checks = []
    for run in later:
        single = run.sizes is not None and run.sizes[-1 if run.sizes.length else 0] == 1
        checks.append(RunCheck(model, run.recorded, run.where, partial=single))
    sizes = sizes_of(inputs)
    failed = ""
    for new in dict.fromkeys([*(run.sizes for run in later[:1]), sizes]):
        try:
            trained = capture(model, _of(inputs, sizes, new), training=True)
        except CaptureError as error:
            failed = str(error)
        else:
            return [*checks, RunCheck(model, trained, "in training mode", training=True)]
    log.debug("training mode was not checked: %s", failed)
    return checks


def _record(
    model: nn.Module,
    inputs: ExampleInputs,
    sizes: Sizes | None,
    planned: Sequence[Sizes | None],
    *,
    watch: bool = True,
) -> tuple[Capture, list[LaterRun]]:
    """Record a run, and one for each of the planned sizes until one fails."""
    real = [_in_bounds(sizes)]

    def make(mode: Mode) -> list[ExampleInputs]:
        wanted = planned if mode == "fake" else real
        return [_of(inputs, sizes, new) for new in wanted]

    first, *others = capture_runs(model, inputs, make, watch=watch)
    ran = planned if first.mode == "fake" else real
    later = [
        LaterRun(new, _where(sizes, new), recorded)
        for new, recorded in zip(ran, others, strict=False)
    ]
    return first, later


def _of(inputs: ExampleInputs, sizes: Sizes | None, new: Sizes | None) -> ExampleInputs:
    if sizes is None or new is None or sizes == new:
        return inputs
    changed: ExampleInputs = resized(inputs, sizes, new)
    return changed


def _where(sizes: Sizes | None, new: Sizes | None) -> str:
    return "in a second run" if new is None or new == sizes else f"in a later run with {new}"


def _planned(sizes: Sizes | None) -> list[Sizes | None]:
    """Return sizes for runs on fake tensors: all larger, then a single token."""
    if sizes is None:
        return [None]
    if sizes.length is None:  # rows may be tokens
        few = [Sizes(1, None)] if sizes.batch > 1 else []
        return [Sizes(3 * sizes.batch + 1, None), *few]
    larger = Sizes(sizes.batch + 1, 3 * sizes.length + 1)
    return [larger] if sizes.length == 1 else [larger, Sizes(sizes.batch, 1)]


def _retries(sizes: Sizes | None) -> list[Sizes | None]:
    """Return sizes to try where the model does not run on larger inputs; at last the same ones."""
    if sizes is None:
        return []
    tries: list[Sizes | None] = []
    if sizes.length is not None:
        if sizes.length > 2:
            tries.append(Sizes(sizes.batch + 1, sizes.length // 2))
        tries.append(Sizes(sizes.batch + 1, sizes.length))
    return [*tries, sizes]


def _in_bounds(sizes: Sizes | None) -> Sizes | None:
    """Return sizes for a run on real tensors, where no index may be out of bounds."""
    if sizes is None or sizes.length is None or sizes.length < 3:
        return sizes
    return Sizes(sizes.batch, sizes.length // 2)
