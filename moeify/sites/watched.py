"""Which attributes a site read in its run, so that a later change of one must be noticed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from torch import fx, nn

from moeify.capture.attribute_reads import PLAIN, AttributeRead
from moeify.capture.capture import Capture
from moeify.passes.infra.records import record_of
from moeify.passes.match.mlp_regions import Region
from moeify.passes.match.placement import Placement


def watched_by(
    model: nn.Module, recorded: Capture, runs: Sequence[Region], placement: Placement
) -> tuple[AttributeRead, ...]:
    """Return the attributes whose values are in the block of one site, each once.

    Of a module that is swapped these are its own. Across modules they are what was read between the
    first projection and the last one, functions read just before (`self.act(self.up(x))`), and
    numbers read around them that are the program's.
    """
    found: Iterable[AttributeRead]
    if placement.install == "module":
        found = [read for read in recorded.reads if read.path == placement.module]
    else:
        found = list(_across(model, recorded, runs, placement))
    return tuple({(read.path, read.name): read for read in found}.values())


def _across(
    model: nn.Module, recorded: Capture, runs: Sequence[Region], placement: Placement
) -> Iterator[AttributeRead]:
    place = {node: i for i, node in enumerate(recorded.nodes)}
    replaced = {*placement.taps, placement.block}
    gone = {id(model.get_submodule(path)) for path in replaced}
    names = {id(module): path for path, module in model.named_modules()}
    for run in runs:
        start = min(place[up.node] for up in run.ups)
        stop = place[run.down.node]
        numbers = list(_numbers(run))
        inside, around = _paths(run.interior), _paths(run.nodes)
        for read in recorded.reads:
            if read.path in replaced or read.name == "inplace":  # it changes no value
                continue
            between, after = start <= read.at <= stop, start < read.at <= stop
            if isinstance(read.value, nn.Module):
                ran = after or names.get(id(read.value)) in inside
                kept = not any(id(child) in gone for child in read.value.modules())
                watch = between and ran and kept
            elif is_plain(read):
                watch = after or (read.path in around and _is_one_of(read, numbers))
            else:
                watch = between
            if watch:
                yield read


def _paths(nodes: Iterable[fx.Node]) -> set[str]:
    """Return the paths of all modules that were running at these nodes."""
    return {path for node in nodes if (record := record_of(node)) for path in record.modules}


def _numbers(run: Region) -> Iterator[float]:
    """Yield the numbers of a program, as far as they say where they come from."""
    if run.program.module is None:
        return
    for node in run.program.module.graph.nodes:
        found: list[object] = []
        fx.node.map_aggregate((node.args, node.kwargs), found.append)
        for value in found:
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield value


def _is_one_of(read: AttributeRead, numbers: Sequence[float]) -> bool:
    plain = isinstance(read.value, int | float) and not isinstance(read.value, bool)
    return plain and any(type(n) is type(read.value) and n == read.value for n in numbers)


def is_plain(read: AttributeRead) -> bool:
    """Tell whether a value is compared as such."""
    return isinstance(read.value, PLAIN) and read.value == read.value  # not NaN
