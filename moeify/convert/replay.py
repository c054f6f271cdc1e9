"""Repeat a recorded conversion on a dense model, and prove that the result is the same.

A folder keeps the plan, the form of the example inputs and a few facts of every converted layer.
Whatever loads one (a checkpoint, a model of generated code, the way back to a dense folder)
converts a dense model without values by that plan, and compares the result with these facts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import nn

from moeify.capture.input_spec import check_description, make_inputs
from moeify.convert.convert_model import convert_without_values
from moeify.errors import CheckpointError, MoeifyError
from moeify.passes.infra.base import Pass
from moeify.plan.layer_description import describe_layer
from moeify.plan.plan import Plan
from moeify.sites.record import Conversion, require_conversion
from moeify.storage.manifest import LayerRecord
from moeify.storage.model_state import graph_digests
from moeify.version import __version__

log = logging.getLogger("moeify")

_ADVICE = "the library changed, or another model was given"


@dataclass(frozen=True, slots=True)
class Recorded:
    """What was kept of a conversion: enough to do it again, and to tell whether it is the same."""

    where: str  # the folder or file, for messages
    fields: str  # precedes the name of a field in messages, such as "out/moeify.json: "
    plan: Mapping[str, Any]  # the plan's data
    plan_sha256: str
    inputs: Any  # description of the example inputs; None: made from the config
    # what must come out, in order; None: nothing is known of it
    layers: Sequence[LayerRecord] | None
    # compare only these fields of a layer's plan, and not what its block computes
    only: Collection[str] | None = None
    ignore: Collection[str] = ()  # fields of a layer's plan that may differ
    # where every dense parameter must go; None: that was not kept
    ledger: Mapping[str, Sequence[str]] | None = None
    versions: Mapping[str, str] | None = None  # of the packages that wrote it
    # what to do if a block computes something else
    passes: str = "if the model was converted with your own passes, give them again as passes="


def replay(
    model: nn.Module,
    then: Recorded,
    *,
    passes: Sequence[Pass] = (),
    rebuild: Callable[[], None] | None = None,
) -> Conversion:
    """Convert a dense model whose values do not matter as it once was, and prove it.

    Raises:
        CheckpointError: What was kept is damaged, does not fit this model, or something else came
            out; names the layer.
    """
    plan, inputs = _plan(then), _inputs(then)
    try:
        convert_without_values(model, plan, inputs, passes=passes, rebuild=rebuild)
    except MoeifyError as error:
        raise CheckpointError(
            f"{then.where}: the saved plan does not fit this {type(model).__name__}: {error}"
        ) from error
    conversion = require_conversion(model)
    if then.layers is not None:
        _check_layers(then.layers, layer_records(model, conversion), then)
    if then.ledger is not None:
        _check_ledger(then.ledger, conversion, then)
    return conversion


def _plan(then: Recorded) -> Plan:
    try:
        plan = Plan.of(then.plan)
    except MoeifyError as error:
        raise CheckpointError(f"{then.fields}plan: {error}") from error
    if plan.digest() != then.plan_sha256:
        raise CheckpointError(f"{then.fields}plan_sha256: is not the digest of the plan")
    return plan


def _inputs(then: Recorded) -> Any:
    if then.inputs is None:
        return None
    try:
        check_description(then.inputs)
        return make_inputs(then.inputs)
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as error:
        raise CheckpointError(f"{then.fields}inputs: cannot be made again: {error}") from error


# -- the proof


def _check_layers(old: Sequence[LayerRecord], new: Sequence[LayerRecord], then: Recorded) -> None:
    names = [[layer.plan.name for layer in layers] for layers in (old, new)]
    if names[0] != names[1]:
        raise CheckpointError(
            f"{then.fields}layers: were {names[0]}, and are now {names[1]}: {_ADVICE}"
        )
    for before, now in zip(old, new, strict=True):
        _check_facts(before, now, then)
        if then.only is None:
            _check_graphs(before, now, then)


def _check_facts(old: LayerRecord, new: LayerRecord, then: Recorded) -> None:
    """Compare what the plan made of a layer, and where it is in the model."""
    was = {**old.plan.data(), "block": old.block, "swaps": old.swaps}
    now = {**new.plan.data(), "block": new.block, "swaps": new.swaps}
    for key in was if then.only is None else then.only:
        if key not in then.ignore and was[key] != now[key]:
            raise CheckpointError(
                f"{then.where}: {old.plan.name}: {key} was {was[key]!r} and is now {now[key]!r}: "
                f"{_ADVICE}"
            )


def _check_graphs(old: LayerRecord, new: LayerRecord, then: Recorded) -> None:
    """Compare what a block computes.

    Another release may write a graph differently, which is only worth a warning.
    """
    here = versions()
    # moeify alone makes the block's own graph; the graphs inside it come from all packages.
    outer = ["moeify"] if old.graph != new.graph else []
    inner = list(here) if old.inner != new.inner else []
    if not outer and not inner:
        return
    wrote = then.versions or {}
    if any(wrote.get(key, here[key]) != here[key] for key in (*outer, *inner)):
        log.warning(
            "%s: %s: its block has another graph than the one that %s wrote: compare outputs",
            then.where,
            old.plan.name,
            wrote,
        )
        return
    if outer:
        raise CheckpointError(
            f"{then.where}: {old.plan.name}: its block computes something else: {then.passes}"
        )
    raise CheckpointError(
        f"{then.where}: {old.plan.name}: the dense MLP computes something else between its "
        "projections: another model was given"
    )


def _check_ledger(old: Mapping[str, Sequence[str]], conversion: Conversion, then: Recorded) -> None:
    """Compare where every dense parameter went."""
    was = {name: list(fate) for name, fate in old.items()}
    now = {name: list(fate) for name, fate in conversion.ledger.items()}
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            raise CheckpointError(
                f"{then.where}: {name}: went to {was.get(name)}, now to {now.get(name)}: {_ADVICE}"
            )


# -- what is kept


def layer_records(model: nn.Module, conversion: Conversion) -> list[LayerRecord]:
    """Return what is kept of every converted layer."""
    records = []
    for converted in conversion.layers:
        graph, inner = graph_digests(model.get_submodule(converted.block))
        records.append(
            LayerRecord(
                plan=describe_layer(converted.layer),
                block=converted.block,
                swaps=[swap.path for swap in converted.swaps],
                graph=graph,
                inner=inner,
            )
        )
    return records


def versions() -> dict[str, str]:
    """Return the versions of the packages that a saved model depends on."""
    found = {"moeify": __version__, "torch": str(torch.__version__)}
    with contextlib.suppress(PackageNotFoundError):
        found["transformers"] = version("transformers")
    return found
