"""`moeify inspect` and `moeify plan show --model`: a model's MLPs, without its weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from moeify.checkpoint import single
from moeify.cli.output import make_table, say
from moeify.errors import MoeifyError
from moeify.formats.manifest import FormatManifest, read_format_manifest
from moeify.formats.reader import is_converted
from moeify.hf.local_folder import build_on_meta, model_folder
from moeify.plan.layer_description import LayerDescription, describe_layer
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.plan import Plan
from moeify.plan.selection import shorten
from moeify.plan.site import Site
from moeify.sites.discovery import Discovery, discover
from moeify.sites.record import conversion_of
from moeify.storage.atomic_folder import Folder
from moeify.storage.folder_reader import CheckpointReader
from moeify.units import format_bytes

_SITES = {
    "#": "right",
    "site": "left",
    "replaces": "left",
    "widths": "left",
    "activation": "left spare",
    "gated": "left spare",
    "parameters": "right",
}
_LAYERS = {
    "#": "right",
    "layer": "left",
    "experts": "right",
    "k": "right",
    "residual": "left",
    "widths": "left",
    "parameters": "right",
}


def dense_folder(path: str | Path, otherwise: str = "") -> Path:
    """Return the folder of a dense model; `otherwise` ends the message for a converted one."""
    folder = Path(path)
    if is_converted(folder):
        raise MoeifyError(
            f"{folder}: is already converted; give the dense model's folder{otherwise}"
        )
    return model_folder(folder)


def resolve_on_meta(plan: Plan, path: str) -> ResolvedPlan:
    """Apply a plan to the model that a folder describes."""
    return plan.resolve(build_on_meta(dense_folder(path)))


def inspect_model(path: str, console: Console) -> dict[str, Any]:
    """Print what is in a model, dense or converted, and return it as data."""
    folder = Path(path)
    if is_converted(folder):
        with Folder(folder) as opened:
            export = read_format_manifest(opened)
        return _saved(folder, console) if export is None else _exported(folder, export, console)
    model = build_on_meta(model_folder(folder))
    found = discover(model)
    _print(model, found, console)
    return {
        "model": str(folder),
        "class": type(model).__name__,
        "parameters": found.parameters,
        "bytes": found.parameter_bytes,
        "sites": [_data(site) for site in found.sites],
        "near_misses": [{"name": m.name, "reason": m.reason} for m in found.near_misses],
    }


def _data(site: Site) -> dict[str, Any]:
    fields = "index name install reason d_in d_ff d_out activation gated calls dtype parameters"
    return {name: getattr(site, name) for name in fields.split()}


def _print(model: nn.Module, found: Discovery, console: Console) -> None:
    sites = found.sites
    rows = [
        (
            "-" if site.install == "refused" else site.index,
            site.name if site.calls == 1 else f"{site.name} (runs {site.calls} times)",
            site.install,
            f"{site.d_in}->{site.d_ff}->{site.d_out}",
            site.activation,
            "yes" if site.gated else "no",
            f"{site.parameters:,}",
        )
        for site in sites
    ]
    if rows:
        console.print(make_table(_SITES, rows))
    for site in sites:
        if site.install == "refused":
            say(console, f"refused: {site.name}: {site.reason}")
    reasons: dict[str, list[str]] = {}
    for miss in found.near_misses:
        reasons.setdefault(miss.reason, []).append(miss.name)
    for reason, names in reasons.items():
        say(console, f"near miss: {shorten(names, 4)}: {reason}")
    usable = [site for site in sites if site.install != "refused"]
    share = sum(site.parameters for site in usable) / max(found.parameters, 1)
    say(
        console,
        f"{type(model).__name__}: {len(usable)} MLPs can become MoE layers and hold {share:.0%} of "
        f"{found.parameters:,} parameters ({format_bytes(found.parameter_bytes)})",
    )


def _saved(folder: Path, console: Console) -> dict[str, Any]:
    """Show what `moeify.save` wrote."""
    model = single.load(folder, device="meta")
    record = conversion_of(model)
    assert record is not None, "load returns converted models only"
    parameters = list(model.parameters())
    return _converted(
        folder,
        console,
        kind="moeify",
        name=type(model).__name__,
        plan=record.plan.data(),
        layers=[describe_layer(converted.layer) for converted in record.layers],
        count=sum(p.numel() for p in parameters),
        total=sum(p.numel() * p.element_size() for p in parameters),
    )


def _exported(folder: Path, manifest: FormatManifest, console: Console) -> dict[str, Any]:
    """Show a folder that transformers reads; counts include padding."""
    with CheckpointReader(folder) as files:
        specs = [entry.spec for entry in files.keys.values()]
    return _converted(
        folder,
        console,
        kind=manifest.kind,
        name=manifest.architecture,
        plan=manifest.plan,
        layers=[record.plan for record in manifest.layers],
        count=sum(math.prod(spec.shape) for spec in specs),
        total=sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs),
    )


def _converted(
    folder: Path,
    console: Console,
    *,
    kind: str,
    name: str,
    plan: dict[str, Any],
    layers: list[LayerDescription],
    count: int,
    total: int,
) -> dict[str, Any]:
    rows: list[Sequence[object]] = [
        (
            index,
            layer.name,
            layer.experts,
            layer.top_k,
            "-" if layer.residual == "none" else layer.residual,
            f"{layer.d_in}->{layer.d_ff}->{layer.d_out}",
            f"{layer.parameters_after:,}",
        )
        for index, layer in enumerate(layers)
    ]
    console.print(make_table(_LAYERS, rows))
    say(
        console,
        f"{name}, converted by moeify: {len(layers)} MoE layers, {count:,} parameters "
        f"({format_bytes(total)}), kind `{kind}`",
    )
    return {
        "model": str(folder),
        "class": name,
        "kind": kind,
        "parameters": count,
        "bytes": total,
        "plan": plan,
        "layers": [layer.data() for layer in layers],
    }
