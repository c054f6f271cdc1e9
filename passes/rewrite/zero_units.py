"""Grouping the parameters of a model into the units that ZeRO gathers together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import fx, nn

from moeify.passes.infra.records import record_of
from moeify.passes.rewrite.blocks import MOE_ROLE, blocks_of
from moeify.zero.plan import Part, Unit


def zero_units(
    gm: fx.GraphModule, model: nn.Module, names: dict[str, Part], prefetch: int
) -> tuple[tuple[Unit, ...], tuple[tuple[str, str], ...]]:
    """Return the units in the order in which the graph enters them, and (module, reason) of others.

    A module that is not a unit of its own is merged into the one around it.
    """
    run = _run_of(gm)
    blocks = [path for path, _ in blocks_of(gm)]
    tied = _tied(model)
    merged: list[tuple[str, str]] = []
    candidates: list[str] = []
    for path in _candidates(model, blocks, run):
        reason = _shared(path, run, tied)
        if reason:
            merged.append((path, reason))
        else:
            candidates.append(path)
    held: dict[str, list[Part]] = {path: [] for path in ("", *candidates)}
    held |= {f"{path}.experts": [] for path in blocks}
    for name, part in names.items():
        holders = [path for path in held if not path or name.startswith(f"{path}.")]
        held[max(holders, key=len)].append(part)
    last = len(gm.graph.nodes)
    order = sorted(
        (path for path, parts in held.items() if parts),
        key=lambda path: (run.entered.get(path, last) if path else -1, path.count(".")),
    )
    made = []
    for path in order:
        outer = (other for other in candidates if path.startswith(f"{other}."))
        around = max(outer, key=len, default=path)
        parts = held[path]
        made.append(Unit(path, parts[0].kind, tuple(parts), around))
    return _with_prefetch(made, prefetch), tuple(merged)


@dataclass(slots=True)
class _Run:
    """Modules that the graph enters, in order, and who reads which parameter."""

    entered: dict[str, int] = field(default_factory=dict)
    readers: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)


def _run_of(gm: fx.GraphModule) -> _Run:
    run = _Run()
    for number, node in enumerate(gm.graph.nodes):
        record = record_of(node)
        if record is None or node.op == "get_attr":  # its users read it
            continue
        paths = record.modules
        if record.role == MOE_ROLE:
            path = str(node.target)
            paths = (*(p for p in paths if p != path), path, f"{path}.experts")
        for path in paths:
            run.entered.setdefault(path, number)
        for read in record.params:
            run.readers.setdefault(read.name, []).append(paths)
    return run


def _candidates(model: nn.Module, blocks: list[str], run: _Run) -> Iterator[str]:
    """Yield the modules of stacks, outermost first found, and blocks that are in none of them."""
    found: list[str] = []
    for path, module in model.named_modules():
        stack = isinstance(module, nn.ModuleList) or (
            isinstance(module, nn.Sequential)
            and any(b.startswith(f"{path}." if path else "") for b in blocks)
        )
        if not stack or path in blocks or _inside(path, [*found, *blocks]):
            continue
        for key, child in module.named_children():
            name = f"{path}.{key}" if path else key
            if name in run.entered and any(True for _ in child.parameters()):
                found.append(name)
    found += [path for path in blocks if not _inside(path, found) and path not in found]
    yield from found


def _inside(path: str, others: list[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others)


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Return for each name of a parameter with several names the others."""
    places: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places.setdefault(id(parameter), []).append(name)
    return {
        name: [n for n in names if n != name]
        for names in places.values()
        if len(names) > 1
        for name in names
    }


def _shared(path: str, run: _Run, tied: dict[str, list[str]]) -> str:
    """Return why a module cannot be gathered on its own, or ""."""
    prefix = f"{path}."
    for name, readers in run.readers.items():
        if name.startswith(prefix) and any(path not in reader for reader in readers):
            return f"{name} is read outside of it"
    for name, others in tied.items():
        outside = [other for other in others if not other.startswith(prefix)]
        if name.startswith(prefix) and outside:
            return f"{name} is tied to {outside[0]}"
    return ""


def _with_prefetch(units: list[Unit], prefetch: int) -> tuple[Unit, ...]:
    """Let each module gather what the next ones will need while it runs."""
    spans: dict[str, list[str]] = {}
    for unit in units:
        spans.setdefault(unit.around, []).append(unit.name)
    order = list(spans)
    made = []
    for unit in units:
        place = order.index(unit.around)
        ahead = order[place + 1 : place + 1 + prefetch]
        # The model's own is the first in the backward pass, too.
        end = place if unit.around else len(order)
        behind = order[max(0, end - prefetch) : end][::-1]
        first = spans[unit.around][0] == unit.name  # once for all that span a module
        after = tuple(name for span in ahead for name in spans[span]) if first else ()
        before = tuple(n for span in behind if span for n in spans[span]) if first else ()
        made.append(replace(unit, after=after, before=before))
    return tuple(made)
