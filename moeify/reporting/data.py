"""What a report shows of a model: gathered from a model, a folder, or the head of a run.

A converted model is reverted, on meta and in a copy, and its plan is applied once more: that gives
the layers that stayed dense, the totals and the graph at every pass. Where that is not possible,
the part is missing, and the report says why.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from moeify.capture.capture import ExampleInputs
from moeify.capture.input_spec import describable, make_inputs
from moeify.convert.pipeline import prepare, run_pipeline
from moeify.convert.revert import revert
from moeify.distillation.size import describe
from moeify.errors import MoeifyError
from moeify.formats.reader import is_converted, read_any_manifest
from moeify.formats.streaming_reverse import dense_on_meta
from moeify.hf.local_folder import build_on_meta, model_folder
from moeify.plan import strict_yaml
from moeify.plan.layer_description import LayerDescription, describe_layer
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.plan import Plan
from moeify.reporting.graphs import Stage, Stages
from moeify.reporting.run import Run
from moeify.sites.record import ATTRIBUTE, conversion_of
from moeify.storage.atomic_folder import Folder
from moeify.storage.manifest import Manifest
from moeify.storage.model_state import to_meta

log = logging.getLogger("moeify")


@dataclass(frozen=True, slots=True)
class Row:
    """One MLP of the model."""

    name: str
    state: Literal["moe", "dense", "refused"]
    experts: int = 0
    top_k: int = 0
    residual: str = "none"
    widths: str = ""  # such as "32->128->32"
    start: str = ""  # how its experts were initialised
    before: int = 0  # parameters before the conversion
    after: int = 0
    active: int = 0  # used by a token, after
    why: str = ""  # it was refused


@dataclass(slots=True)
class Facts:
    """What is known of a model; None is unknown."""

    source: str  # where it came from, for people
    model: str = ""  # its class
    kind: str = ""  # what it is, for people
    rows: list[Row] = field(default_factory=list)  # in execution order
    whole: bool = False  # `rows` has the dense layers too
    plan: str | None = None  # as YAML
    dense: int | None = None  # parameters of the dense model
    total: int | None = None  # parameters
    active: int | None = None  # parameters that a token uses
    size: int | None = None  # bytes of the parameters
    stages: list[Stage] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what is not known, and why
    notes: list[str] = field(default_factory=list)


def of_model(model: nn.Module, plan: Plan | None, inputs: ExampleInputs | None = None) -> Facts:
    """Gather what is known of a model in memory, converted or dense with a plan; only read it."""
    record = conversion_of(model)
    name = type(model).__name__
    if record is None:
        if plan is None:
            raise MoeifyError(f"this {name} is dense: give the plan to report on, or convert it")
        facts = Facts(f"a {name} in memory", name, "dense, with what the plan would make of it")
        _replay(facts, model, plan, inputs)
        return facts
    if plan is not None:
        raise MoeifyError(f"this {name} is converted already, by its own plan: give none")
    facts = Facts(f"a {name} in memory", name, "converted")
    facts.rows = rows_of([describe_layer(converted.layer) for converted in record.layers])
    facts.plan = _plan_text(record.plan.data())
    dense = None
    if record.parallel is None:
        _count(facts, model)
        dense = _dense_copy(facts, model)
    else:
        facts.missing.append("totals, dense layers and graphs: the model lies on several ranks")
    if dense is not None:
        total, size = facts.total, facts.size
        _try_replay(facts, dense, record.plan, record.inputs)
        if facts.total != total:
            facts.notes.append(
                f"the model has {total:,} parameters, but {facts.total:,} by its plan: adapters or "
                "something else changed it after the conversion; the page shows the plan's"
            )
        elif size is not None:
            facts.size = size
    return facts


def of_folder(folder: Path, plan: Plan | None) -> Facts:
    """Gather what is known of a folder, converted or dense with a plan; weights are not read."""
    if not is_converted(folder):
        found = model_folder(folder)
        if plan is None:
            raise MoeifyError(f"{folder}: is dense: give the plan to report on, with --plan")
        dense = build_on_meta(found)
        kind = "dense, with what the plan would make of it"
        facts = Facts(str(folder), type(dense).__name__, kind)
        _replay(facts, dense, plan, None)
        return facts
    if plan is not None:
        raise MoeifyError(f"{folder}: is converted already, by its own plan: give none")
    with Folder(folder) as opened:
        manifest = read_any_manifest(opened)
    saved = isinstance(manifest, Manifest)
    if isinstance(manifest, Manifest):
        name, inputs, kind = manifest.model.name.rpartition(".")[2], manifest.inputs, "moeify"
    else:
        name, kind = manifest.architecture, manifest.kind
        inputs = manifest.details.get("inputs")
    facts = Facts(str(folder), name, f"converted, kind `{kind}`")
    facts.rows = rows_of([record.plan for record in manifest.layers])
    facts.plan = _plan_text(manifest.plan)
    if isinstance(manifest, Manifest):
        facts.total = manifest.parameters
        facts.active = facts.total - sum(row.after - row.active for row in facts.rows)
        facts.dense = facts.total - sum(row.after - row.before for row in facts.rows)
    try:
        if inputs is not None and not describable(inputs):
            raise MoeifyError("its example inputs cannot be made again")
        dense, again = dense_on_meta(folder), Plan.of(manifest.plan)
    except MoeifyError as error:
        parts = "dense layers and graphs" if saved else "dense layers, totals and graphs"
        facts.missing.append(f"{parts}: the dense model cannot be built: {error}")
        return facts
    _try_replay(facts, dense, again, inputs)
    return facts


def of_run(run: Run) -> Facts:
    """Take what a run says of its model."""
    facts = Facts(run.where, run.model, "a run")
    facts.rows = rows_of(run.layers)
    if facts.rows:
        facts.missing.append(
            "dense layers, totals and graphs: a run knows its MoE layers only; give the model too"
        )
    else:
        facts.missing.append("layers, totals and graphs: the run does not say; give the model too")
    if run.plan is not None:
        facts.plan = _plan_text(run.plan)
    else:
        facts.missing.append("the plan: the run does not say")
    return facts


def rows_of(layers: Iterable[LayerDescription]) -> list[Row]:
    """Return the rows of converted layers; refuse more experts than can be drawn."""
    rows = []
    for layer in layers:
        if layer.experts > 65536:
            raise MoeifyError(f"{layer.name[:80]}: {layer.experts} experts cannot be drawn")
        rows.append(
            Row(
                name=layer.name,
                state="moe",
                experts=layer.experts,
                top_k=layer.top_k,
                residual=layer.residual,
                widths=f"{layer.d_in}->{layer.d_ff}->{layer.d_out}",
                start=layer.init.experts,
                before=layer.parameters_before,
                after=layer.parameters_after,
                active=layer.active_parameters,
            )
        )
    return rows


def _plan_text(data: Mapping[str, Any]) -> str:
    return strict_yaml.dump(dict(data), "plan.yaml")


def _count(facts: Facts, model: nn.Module) -> None:
    size = describe(model)
    facts.total, facts.active, facts.size = size.parameters, size.active, size.bytes
    facts.dense = facts.total - sum(row.after - row.before for row in facts.rows)


def _dense_copy(facts: Facts, model: nn.Module) -> nn.Module | None:
    """Return the dense model behind a converted one, on meta; None and a note if impossible."""
    inner = next(m for m in model.modules() if ATTRIBUTE in m.__dict__)
    # Copied to meta directly: the weights are not held twice.
    memo: dict[int, Any] = {
        id(p): torch.nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in inner.parameters()
    }
    try:
        dense = copy.deepcopy(inner, memo)
        to_meta(dense)
        revert(dense)
        return dense
    except Exception as error:  # parts of a user's model may fail to copy in any way
        log.debug("the model cannot be copied", exc_info=True)
        facts.missing.append(f"dense layers and graphs: the model cannot be copied: {error}")
        return None


def _try_replay(facts: Facts, dense: nn.Module, plan: Plan, described: Any) -> None:
    """Apply the plan once more; if that fails, note why."""
    before = [row for row in facts.rows if row.state == "moe"]
    known = (facts.total, facts.active, facts.dense)
    try:
        inputs = None if described is None else make_inputs(described)
        resolved = _replay(facts, dense, plan, inputs)
    except (MoeifyError, ValueError) as error:
        facts.missing.append(f"dense layers and graphs: the plan cannot be applied again: {error}")
        return
    if [row for row in facts.rows if row.state == "moe"] != before:
        facts.rows, facts.whole, facts.stages = before, False, []
        facts.total, facts.active, facts.dense = known
        facts.missing.append(
            f"dense layers and graphs: the plan gives {len(resolved)} other layers today: the "
            "library changed"
        )


def _replay(
    facts: Facts, dense: nn.Module, plan: Plan, inputs: ExampleInputs | None
) -> ResolvedPlan:
    """Apply a plan to a dense model, which is only read, and observe the passes."""
    inputs, discovery, resolved = prepare(dense, plan, inputs)
    facts.plan = _plan_text(plan.data())
    facts.dense, facts.total = resolved.dense_parameters, resolved.parameters
    facts.active, facts.size = resolved.active_parameters, resolved.bytes
    facts.notes += resolved.notes
    made = {row.name: row for row in rows_of([describe_layer(layer) for layer in resolved])}
    facts.rows = []
    for site in resolved.sites:
        row = made.pop(site.name, None)
        if row is None:
            widths = f"{site.d_in}->{site.d_ff}->{site.d_out}"
            refused = site.install == "refused"
            row = Row(
                site.name,
                "refused" if refused else "dense",
                widths=widths,
                before=site.parameters,
                after=site.parameters,
                active=site.parameters,
                why=site.reason if refused else "",
            )
        facts.rows.append(row)
    facts.rows += made.values()
    facts.whole = True
    stages = Stages()
    try:
        run_pipeline(dense, plan, resolved, discovery, observers=[stages])
    except MoeifyError as error:
        facts.missing.append(f"graphs: a pass failed: {error}")
    facts.stages = stages.found
    return resolved
