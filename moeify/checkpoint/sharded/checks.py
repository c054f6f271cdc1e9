"""Whether a sharded checkpoint fits a model; everything is checked before anything is assigned."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from moeify.checkpoint.sharded.manifest import ShardedManifest
from moeify.errors import CheckpointError
from moeify.plan.layer_description import describe_layer
from moeify.sites.record import require_conversion
from moeify.storage.model_state import State
from moeify.storage.strict_json import canonical_digest
from moeify.units import dtype_name

__all__ = ["check_layers", "check_plan", "match"]

log = logging.getLogger("moeify")

_LAYOUT = ("parallel", "zero")  # keys of a plan that a checkpoint does not depend on
_KEYS = {
    "experts": "{} experts",
    "top_k": "top_k {}",
    "residual": "residual {}",
    "d_in": "input width {}",
    "d_ff": "hidden width {}",
    "d_out": "output width {}",
    "gated": "gated {}",
    "activation": "activation {}",
}


def check_layers(model: nn.Module, manifest: ShardedManifest, where: str) -> None:
    """Check that the same layers were converted in the same way."""
    layers = [describe_layer(converted.layer) for converted in require_conversion(model).layers]
    now = {layer.name: layer for layer in layers}
    then = {record.plan.name: record.plan for record in manifest.layers}
    for name, plan in then.items():
        if name not in now:
            raise CheckpointError(
                f"{where}: {name}: is a MoE layer in the checkpoint, but not in the model"
            )
        for key, text in _KEYS.items():
            saved, here = getattr(plan, key), getattr(now[name], key)
            if saved != here:
                raise CheckpointError(
                    f"{where}: {name}: {text.format(saved)} in the checkpoint, {here} in the model"
                )
    for name in now:
        if name not in then:
            raise CheckpointError(
                f"{where}: {name}: is a MoE layer in the model, but not in the checkpoint"
            )


def check_plan(model: nn.Module, manifest: ShardedManifest, where: str, *, strict: bool) -> None:
    """Check that the plan is the same but for what it says of ranks."""
    plan = _without_layout(require_conversion(model).plan.data())
    saved_plan = _without_layout(manifest.plan)
    if canonical_digest(plan) == canonical_digest(saved_plan):
        return
    keys = [key for key in {**saved_plan, **plan} if saved_plan.get(key) != plan.get(key)]
    key, saved, now = _first(keys[0], saved_plan.get(keys[0]), plan.get(keys[0]))
    message = (
        f"{where}: was saved under another plan: {key} was {saved!r:.60} and is {now!r:.60}; "
        "convert by the same plan, or pass strict=False to load it anyway"
    )
    if strict:
        raise CheckpointError(message)
    log.warning("%s", message)


def _without_layout(plan: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in plan.items() if key not in _LAYOUT}


def _first(path: str, one: Any, other: Any) -> tuple[str, Any, Any]:
    """Return the first place where two values differ, and the two values there."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return _first(f"{path}.{key}", one.get(key), other.get(key))
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        for place, (a, b) in enumerate(zip(one, other, strict=True)):
            if a != b:
                return _first(f"{path}[{place}]", a, b)
    return path, one, other


def match(
    state: State,
    masters: dict[str, Tensor],
    saved: Mapping[str, tuple[list[int], str, str]],
    names: dict[str, str],
    where: str,
    *,
    strict: bool,
) -> dict[str, Tensor]:
    """Return what each saved tensor is loaded into: live tensors by the name that is stored.

    Args:
        state: The model.
        masters: Master weights, which replace their parameters.
        saved: Shape, dtype and role by name.
        names: Every saved name to the one its tensor is stored under.
        where: The checkpoint.
        strict: Refuse missing and unexpected tensors.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.tensors.items():
        stored = names.get(name)
        role = state.roles[name]
        if stored is None:
            aliases = [alias for alias, first in state.aliases.items() if first == name]
            stored = next((names[alias] for alias in aliases if alias in names), None)
        if stored is None:
            if role != "scratch":
                _mismatch(f"{where}: {name}: the model needs it, but it was not saved", strict)
            continue
        shape, dtype, kind = saved[stored]
        live = masters.get(name, tensor)
        fits = shape == list(live.shape) and dtype == dtype_name(live.dtype)
        if role == "scratch":
            if fits:
                found[stored] = live
            continue
        if (kind == "parameter") != (role == "parameter"):
            raise CheckpointError(f"{where}: {name}: was saved as {kind}, but is a {role} here")
        if shape != list(live.shape):
            raise CheckpointError(
                f"{where}: {name}: was saved with shape {shape}, but the model has "
                f"{list(live.shape)}"
            )
        if dtype != dtype_name(live.dtype):
            kept = "master weight" if name in masters else "model"
            raise CheckpointError(
                f"{where}: {name}: was saved as {dtype}, but the {kept} has "
                f"{dtype_name(live.dtype)}: cast the model first"
            )
        if found.setdefault(stored, live) is not live:
            raise CheckpointError(f"{where}: {name}: was tied to {stored} when it was saved")
    known = state.names()
    for name, stored in names.items():
        if name not in known and stored not in found and saved[stored][2] != "scratch":
            _mismatch(f"{where}: {name}: was saved, but the model has no place for it", strict)
    return found


def _mismatch(message: str, strict: bool) -> None:
    if strict:
        raise CheckpointError(message)
    log.warning("%s", message)
