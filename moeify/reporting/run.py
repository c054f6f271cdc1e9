"""Runs, as reports read them: lines of `RunLog`, or a Trainer's `trainer_state.json`.

Damage is refused with its line; a last line without an end (the run goes on, or was stopped) is
left out, with a note.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from moeify.errors import MoeifyError
from moeify.plan.layer_description import LayerDescription
from moeify.plan.strict_yaml import path_text
from moeify.train.run_log import FORMAT, VERSION

MAX_BYTES: Final = 1 << 28
_ROUTER: Final = re.compile(r"router/(.+)/(load_max|load_min|entropy|dropped)")
_WORDS: Final = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MOST: Final = 2**53


@dataclass(slots=True)
class Run:
    """What a run logged; lists of (step, value) are in the order of the steps."""

    where: str  # name of the file
    model: str = ""  # class
    plan: dict[str, Any] | None = None
    layers: list[LayerDescription] = field(default_factory=list)
    # Losses and the like by name; routes per expert by layer; `entropy`, `dropped`, `load_max` and
    # `load_min` by layer, then by name.
    numbers: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    counts: dict[str, list[tuple[int, list[float]]]] = field(default_factory=dict)
    facts: dict[str, dict[str, list[tuple[int, float]]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def steps(self) -> list[int]:
        """Every logged step."""
        rows = [
            *self.numbers.values(),
            *(f for facts in self.facts.values() for f in facts.values()),
        ]
        found = {step for row in rows for step, _ in row}
        return sorted(found | {step for row in self.counts.values() for step, _ in row})


def read_run(path: Path) -> Run:
    """Read lines of `RunLog`, or a `trainer_state.json` if the file's name ends in `.json`."""
    if not path.is_file():
        raise MoeifyError(f"{path}: no such file; give a run log or a trainer_state.json")
    if path.stat().st_size > MAX_BYTES:
        raise MoeifyError(f"{path}: has more than {MAX_BYTES >> 20} MiB; log less often")
    text = path.read_bytes().decode("utf-8", "replace")
    run = Run(str(path))
    records = _trainer(text, path) if path.suffix == ".json" else _lines(text, path, run)
    steps: dict[int, dict[Any, Any]] = {}
    back = 0
    for where, record in records:
        step = record.pop("step", None)
        if type(step) is not int or not 0 <= step < _MOST:
            raise MoeifyError(f"{where}: step: {step!r:.40} is not a step")
        if steps and step < next(reversed(steps)):  # it was resumed from an older checkpoint
            back += 1
            steps = {old: known for old, known in steps.items() if old < step}
        known = steps.setdefault(step, {})
        layers = _layers(record.pop("layers", {}), where)
        known |= {("", "", name): value for name, value in _named(record, where)}
        known |= layers
    if back:
        run.notes.append(
            f"the run went back to an earlier step {back} time(s): what it had logged after that "
            "step is left out"
        )
    for step, known in steps.items():
        _spread(run, step, known)
    _check_widths(run, path)
    if not steps:
        run.notes.append("the run has no steps yet")
    return run


def _lines(text: str, path: Path, run: Run) -> Iterator[tuple[str, dict[str, Any]]]:
    lines = text.split("\n")
    if lines[-1].strip():
        run.notes.append("the last line of the log has no end and is left out")
    for number, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        record = _parse(line, where)
        if record.get("format") == FORMAT:
            _describe(run, record, where)
        elif "format" in record:
            raise MoeifyError(f"{where}: format: {record['format']!r:.40} is not {FORMAT!r}")
        else:
            yield where, record


def _trainer(text: str, path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    history = _parse(text, str(path)).get("log_history")
    if not isinstance(history, list):
        raise MoeifyError(f"{path}: has no log_history, so it is not a trainer_state.json")
    for number, record in enumerate(history):
        where = f"{path}: log_history[{number}]"
        if not isinstance(record, dict):
            raise MoeifyError(f"{where}: is not a mapping")
        record = dict(record)
        record.pop("layers", None)
        yield where, record


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MoeifyError(f"{where}: is not JSON: {str(error)[:200]}") from None
    if not isinstance(data, dict):
        raise MoeifyError(f"{where}: is not a mapping")
    return data


def _describe(run: Run, record: dict[str, Any], where: str) -> None:
    """Take the line about the model into the run."""
    name, plan, layers = record.get("class"), record.get("plan"), record.get("layers")
    version = record.get("version")
    if version != VERSION:
        raise MoeifyError(
            f"{where}: version: {version!r:.40} cannot be read, only {VERSION}; "
            "use the moeify that wrote it"
        )
    fits = isinstance(name, str) and (plan is None or isinstance(plan, dict))
    if not fits or not isinstance(layers, list):
        raise MoeifyError(f"{where}: does not describe a model as RunLog does")
    try:
        run.layers = [LayerDescription.model_validate(layer) for layer in layers]
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise MoeifyError(
            f"{where}: layers: {path_text(first['loc']):.200}: {first['msg']:.200}"
        ) from None
    run.model, run.plan = str(name), plan


def _named(record: dict[str, Any], where: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a record; other texts are a Trainer's, and left out."""
    for name, value in record.items():
        number = _number(value, f"{where}: {name[:80]}", strict=False)
        if number is not None:
            yield name, number


def _layers(layers: Any, where: str) -> dict[tuple[str, str, str], Any]:
    if not isinstance(layers, dict):
        raise MoeifyError(f"{where}: layers: is not a mapping")
    found: dict[tuple[str, str, str], Any] = {}
    for name, layer in layers.items():
        place = f"{where}: layers: {name[:80]}"
        if not isinstance(layer, dict) or not isinstance(layer.get("counts"), list):
            raise MoeifyError(f"{place}: has no counts")
        counts = [_number(count, f"{place}: counts") or 0.0 for count in layer["counts"]]
        if not counts or not all(0 <= count < math.inf for count in counts):
            raise MoeifyError(f"{place}: counts: must be finite numbers of at least 0")
        found["layer", name, "counts"] = counts
        for key in ("entropy", "dropped"):
            if key in layer:
                found["layer", name, key] = _number(layer[key], f"{place}: {key}")
    return found


def _number(value: Any, where: str, *, strict: bool = True) -> float | None:
    if isinstance(value, str) and value in _WORDS:
        return _WORDS[value]
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise MoeifyError(f"{where}: is too large a number") from None
    if strict:
        raise MoeifyError(f"{where}: {value!r:.40} is not a number")
    return None


def _spread(run: Run, step: int, known: dict[Any, Any]) -> None:
    """Sort what was logged at a step into the lists of the run."""
    for (kind, layer, name), value in known.items():
        if kind == "layer" and name == "counts":
            run.counts.setdefault(layer, []).append((step, value))
            continue
        if kind != "layer":
            match = _ROUTER.fullmatch(name)
            if match is None:
                run.numbers.setdefault(name, []).append((step, value))
                continue
            layer, name = match.groups()
        run.facts.setdefault(layer, {}).setdefault(name, []).append((step, value))


def _check_widths(run: Run, path: Path) -> None:
    planned = {layer.name: layer.experts for layer in run.layers}
    for layer, row in run.counts.items():
        widths = {len(counts) for _, counts in row}
        want = planned.get(layer)
        if len(widths) > 1 or (want is not None and widths != {want}):
            raise MoeifyError(
                f"{path}: {layer[:80]}: counts of {sorted(widths)} experts in one run"
                + (f", whose model has {want}" if want is not None else "")
            )
