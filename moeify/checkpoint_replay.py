"""Converts a model as a saved one was converted, and proves that it was the same conversion."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Sequence
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

from moeify import __version__
from moeify.api import moeify as convert
from moeify.checkpoint_build import inputs_of
from moeify.checkpoint_manifest import LayerRecord, Manifest
from moeify.checkpoint_shards import DTYPES
from moeify.checkpoint_state import graph_digests, tensors_of, to_meta
from moeify.conversion import Conversion, require_conversion
from moeify.errors import CaptureError, CheckpointError, MoeifyError
from moeify.layer_description import describe_layer
from moeify.passes.base import Pass
from moeify.plan import Plan

log = logging.getLogger("moeify")


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


def convert_again(model: nn.Module, manifest: Manifest, passes: Sequence[Pass], where: str) -> None:
    """Convert a model whose weights do not matter by the saved plan, on meta.

    Raises:
        CheckpointError: The plan is damaged, or does not fit this model.
    """
    try:
        plan = Plan.of(manifest.plan)
    except MoeifyError as error:
        raise CheckpointError(f"{where}/moeify.json: plan: {error}") from error
    if plan.digest() != manifest.plan_sha256:
        raise CheckpointError(f"{where}/moeify.json: plan_sha256: is not the digest of the plan")
    to_meta(model, _dtypes(manifest))
    inputs = inputs_of(manifest, f"{where}/moeify.json")
    try:
        try:
            convert(model, plan, example_inputs=inputs, passes=passes, verify=False)
        except CaptureError:
            # It reads values on the way, so that fake tensors will not do: zeros may.
            for item in list(tensors_of(model)):
                if item.role == "parameter" and item.tensor.is_meta:
                    zeros = torch.zeros_like(item.tensor, device="cpu")
                    setattr(item.module, item.key, nn.Parameter(zeros, item.tensor.requires_grad))
            convert(model, plan, example_inputs=inputs, passes=passes, verify=False)
    except MoeifyError as error:
        raise CheckpointError(
            f"{where}: the saved plan does not fit this {type(model).__name__}: {error}"
        ) from error


def _dtypes(manifest: Manifest) -> dict[str, torch.dtype]:
    """Return the dtypes that the dense model had when it was converted, by name.

    What was copied into experts is known from the plan of its layer. The model may have been cast
    after the conversion: what became of the experts became of the rest.
    """
    names = manifest.names()
    before = {layer.block: layer.plan.dtype for layer in manifest.layers}
    cast = {}
    for name, tensor in manifest.tensors.items():
        block = name.partition(".experts.")[0]
        if block in before and tensor.role == "parameter":
            cast[tensor.dtype] = before[block]
    found = {}
    for name, stored in names.items():
        dtype = manifest.tensors[stored].dtype
        found[name] = cast.get(dtype, dtype)
    for name, (fate, place) in manifest.ledger.items():
        if fate == "copied" and place in before:
            found[name] = before[place]
        elif fate == "moved" and place in found:
            found[name] = found[place]
    return {name: DTYPES[dtype] for name, dtype in found.items() if dtype in DTYPES}


def check_conversion(model: nn.Module, manifest: Manifest, where: str) -> None:
    """Check that the plan did to this model what it did to the saved one.

    Raises:
        CheckpointError: It did not; the message names the layer.
    """
    conversion = require_conversion(model)
    advice = "the library changed, or another model was given"
    now = layer_records(model, conversion)
    for old, new in zip(manifest.layers, now, strict=False):
        check_layer(old, new, where, advice)
        _check_graphs(old, new, manifest, where)
    if len(now) != len(manifest.layers):
        odd = (manifest.layers if len(manifest.layers) > len(now) else now)[
            min(len(now), len(manifest.layers))
        ]
        raise CheckpointError(
            f"{where}: {odd.plan.name}: {len(manifest.layers)} layers were converted, and now "
            f"{len(now)}: {advice}"
        )
    ledger = {name: list(fate) for name, fate in conversion.ledger.items()}
    for name in sorted(ledger.keys() | manifest.ledger.keys()):
        if ledger.get(name) != manifest.ledger.get(name):
            raise CheckpointError(
                f"{where}: {name}: went to {manifest.ledger.get(name)}, now to "
                f"{ledger.get(name)}: {advice}"
            )


def check_layer(
    old: LayerRecord,
    new: LayerRecord,
    where: str,
    advice: str,
    *,
    ignore: Collection[str] = (),
) -> None:
    """Check that a layer became what it was, its graphs aside.

    Args:
        old: What was saved.
        new: What came out of the conversion.
        where: What is read, for messages.
        advice: Why it may differ, for messages.
        ignore: Parts of the description that may differ.

    Raises:
        CheckpointError: It did not.
    """
    name, then, now = old.plan.name, old.plan.data(), new.plan.data()
    then |= {"block": old.block}
    now |= {"block": new.block}
    for key in then:
        if key not in ignore and then[key] != now[key]:
            raise CheckpointError(
                f"{where}: {name}: {key} was {then[key]!r} and is now {now[key]!r}: {advice}"
            )
    if old.swaps != new.swaps:
        raise CheckpointError(f"{where}: {name}: replaced {old.swaps}, now {new.swaps}: {advice}")


def _check_graphs(old: LayerRecord, new: LayerRecord, manifest: Manifest, where: str) -> None:
    """Check that a block computes what it did.

    Graphs may be written differently by another release, which is worth a warning and no more.

    Raises:
        CheckpointError: It does not, though it was saved by the same release.
    """
    name, here = old.plan.name, versions()
    ours = [key for key in ("moeify",) if old.graph != new.graph]
    theirs = [key for key in here if old.inner != new.inner]
    if not ours and not theirs:
        return
    if any(manifest.versions.get(key, here[key]) != here[key] for key in (*ours, *theirs)):
        log.warning(
            "%s: %s: the graph of its block is not the one that %s wrote: compare outputs",
            where,
            name,
            manifest.versions,
        )
        return
    if ours:
        raise CheckpointError(
            f"{where}: {name}: its block computes something else: if the model was converted with "
            "passes of your own, give them again as passes="
        )
    raise CheckpointError(
        f"{where}: {name}: the dense MLP computes something else between its projections: "
        "another model was given"
    )


def versions() -> dict[str, str]:
    """Return the versions of the packages that a saved model depends on."""
    found = {"moeify": __version__, "torch": str(torch.__version__)}
    with contextlib.suppress(PackageNotFoundError):
        found["transformers"] = version("transformers")
    return found
