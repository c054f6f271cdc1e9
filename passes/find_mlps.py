"""find-mlps: mark the MLPs of a recorded graph (analysis; the graph itself is not changed).

Before and after, the same graph::

    %gate   = linear(%x, gate_proj.weight)                   role=up
    %up     = linear(%x, up_proj.weight)                     role=up
    %silu   = silu(%gate)                                    role=inner
    %mul    = mul(%silu, %up)                                role=inner
    %down   = linear(%mul, down_proj.weight)                 role=down

A site is found from its end: from each projection backwards through elementwise operations until
other projections are reached. It is one if these share their input, something between is not
linear, nothing outside reads the hidden value, and the width that comes out is the width that
went in. What fails one of these tests only is a near miss, kept with its reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import networkx as nx
from torch import fx

from moeify.passes.base import Fact, PassResult, PlanContext
from moeify.passes.dataflow import (
    CASTS,
    DROPOUTS,
    ELEMENTWISE,
    NONLINEAR,
    OVER_WIDTH,
    RESHAPES,
    SPLITS,
    Linear,
    changed_views,
    dataflow,
    is_slice_of_width,
    linears_of,
    op_name,
    strip,
)
from moeify.passes.inner_program import InnerProgram, NotTokenwise, build_program
from moeify.passes.records import record_of, update_record

_INNER = ELEMENTWISE | RESHAPES | CASTS | DROPOUTS | OVER_WIDTH | SPLITS | {"glu", "prelu"}


@dataclass(frozen=True, slots=True)
class NearMiss:
    """Something like an MLP that is none.

    Attributes:
        name: Path of the module that holds its last projection, or its weight.
        reason: The test that it failed.
    """

    name: str
    reason: str


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One run of one MLP in the graph.

    Attributes:
        ups: The first projections, in execution order.
        down: The last projection.
        interior: The nodes between, in execution order.
        source: The value that is projected, before reshapes.
        program: What the nodes between compute.
    """

    ups: tuple[Linear, ...]
    down: Linear
    interior: tuple[fx.Node, ...]
    source: fx.Node
    program: InnerProgram

    @property
    def key(self) -> tuple[str, ...]:
        """The weights: two regions with the same key are one MLP run twice."""
        return (*(up.weight.name for up in self.ups), self.down.weight.name)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Every node of the region."""
        ups = (node for up in self.ups for node in up.nodes)
        return (*ups, *self.interior, *self.down.nodes)


@dataclass(frozen=True, slots=True)
class FindMlps:
    """Write `site` and `role` on the nodes of every MLP.

    Args:
        regions: The MLPs, where they have been found before; searched for if None.
    """

    regions: tuple[Region, ...] | None = None
    name: ClassVar[str] = "find-mlps"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.CAPTURED})
    provides: ClassVar[frozenset[str]] = frozenset({Fact.MLP_SITES})
    invalidates: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        """Mark the regions of `gm`; the site's provisional name is its last projection's weight."""
        regions = self.regions if self.regions is not None else find_regions(gm.graph)[0]
        for region in regions:
            name = region.down.weight.name
            roles = [(node, "up") for up in region.ups for node in up.nodes]
            roles += [(node, "inner") for node in region.interior]
            roles += [(node, "down") for node in region.down.nodes]
            for node, role in roles:
                update_record(node, site=name, role=role)
        return PassResult(gm, False)


def find_regions(graph: fx.Graph) -> tuple[list[Region], list[NearMiss]]:
    """Return the MLPs of a recorded graph in execution order, and what nearly was one.

    Args:
        graph: A graph whose nodes carry records, as `capture` writes it.

    Returns:
        The regions (an MLP that runs twice gives two), and the near misses.
    """
    search = _Search(graph)
    found: list[Region] = []
    missed: list[NearMiss] = []
    for down in search.linears:
        match = search.match(down)
        if isinstance(match, Region):
            found.append(match)
        elif match is not None:
            missed.append(match)
    found, overlapping = _without_overlaps(found)
    found, routed = search.without_routed(found)
    return found, list(dict.fromkeys([*missed, *overlapping, *routed]))


class _Search:
    def __init__(self, graph: fx.Graph) -> None:
        self.flow: nx.DiGraph[fx.Node] = dataflow(graph)
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.linears = linears_of(graph)
        self.by_out = {linear.out: linear for linear in self.linears}
        self.parts = {node for linear in self.linears for node in linear.nodes}

    def match(self, down: Linear) -> Region | NearMiss | None:
        """Match one projection as the end of an MLP."""
        ups, interior, obstacle = self._walk(down)
        name = _path(down)
        if not ups or not any(_is_nonlinear(node, interior) for node in interior):
            return None
        sources = {strip(up.source) for up in ups}
        if len(sources) != 1 or down.node in {up.node for up in ups}:
            if len(sources) > 1 and not obstacle and down.out_features == ups[0].in_features:
                return NearMiss(name, "its first projections do not share one input")
            return None
        leak = self._leak(ups, interior, down)
        if leak is not None and (obstacle is not None or down.out_features != ups[0].in_features):
            return None
        for linear in (*ups, down):
            if linear.problem:
                return NearMiss(name, f"{_path(linear)}: {linear.problem}")
        if obstacle is not None:
            path = getattr(record_of(obstacle), "module_path", "")
            where = f" in {path}" if path else ""
            return NearMiss(name, f"`{op_name(obstacle)}`{where} is not elementwise")
        if down.out_features != ups[0].in_features:
            widths = f"{down.out_features} is not its input width {ups[0].in_features}"
            return NearMiss(name, f"its output width {widths}")
        if leak is not None:
            return NearMiss(name, leak)
        if len({up.weight.name for up in ups} | {down.weight.name}) != len(ups) + 1:
            return NearMiss(name, "two of its projections share one weight")
        if len({linear.channel for linear in (*ups, down)}) != 1:
            return NearMiss(name, "it mixes convolutions and linear layers")
        ordered = tuple(sorted(ups, key=lambda up: self.order[up.node]))
        inner = tuple(sorted(interior, key=lambda node: self.order[node]))
        try:
            program = build_program(ordered, inner, down)
        except NotTokenwise as reason:
            return NearMiss(name, str(reason))
        return Region(ordered, down, inner, next(iter(sources)), program)

    def _walk(self, down: Linear) -> tuple[list[Linear], list[fx.Node], fx.Node | None]:
        """Go backwards from `down`; return projections, nodes between, and the first obstacle."""
        ups: list[Linear] = []
        interior: list[fx.Node] = []
        obstacle: fx.Node | None = None
        seen: set[fx.Node] = set()
        todo = [down.source]
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.by_out:
                ups.append(self.by_out[node])
            elif self._is_parameter(node):
                continue
            elif self._passes(node):
                interior.append(node)
                todo += self._data_inputs(node)
            elif obstacle is None:
                obstacle = node
        return ups, interior, obstacle

    def _is_parameter(self, node: fx.Node) -> bool:
        return node.op == "get_attr"

    def _passes(self, node: fx.Node) -> bool:
        if node.op not in ("call_method", "call_function"):
            return False
        name = op_name(node)
        if name == "getitem":
            return is_slice_of_width(node, -1) or self._unpacks(node)
        return name in _INNER and bool(node.all_input_nodes)

    def _unpacks(self, node: fx.Node) -> bool:
        source = node.args[0]
        return isinstance(source, fx.Node) and op_name(source) in SPLITS

    def _data_inputs(self, node: fx.Node) -> list[fx.Node]:
        inputs = list(node.all_input_nodes)
        return inputs[:1] if op_name(node) in CASTS else inputs

    def _leak(self, ups: list[Linear], interior: list[fx.Node], down: Linear) -> str | None:
        inside = {*interior, *down.nodes} | {node for up in ups for node in up.nodes}
        for node in inside - set(down.nodes):
            for user in self.flow.successors(node):
                if user not in inside:
                    path = getattr(record_of(user), "module_path", "") or "the model"
                    what = "returned" if user.op == "output" else f"used by `{op_name(user)}`"
                    return f"its hidden value is also {what} in {path}"
            for user in changed_views(node):
                if user not in inside:
                    return "its hidden value is changed in place through a view"
        return None

    def without_routed(self, regions: list[Region]) -> tuple[list[Region], list[NearMiss]]:
        """Drop the experts of existing MoE blocks: their input is a choice of tokens."""
        tokens: set[fx.Node] = set()
        for linear in self.linears:
            if linear.weight.stacked:
                tokens.add(_before_choice(linear.source))
        for node in self.flow.nodes:
            if op_name(node) in ("grouped_mm", "_grouped_mm", "bmm", "baddbmm"):
                tokens |= {_before_choice(i) for i in node.all_input_nodes if _is_choice(i)}
        routed = {r for r in regions if _is_choice(r.source)}
        tokens |= {_before_choice(region.source) for region in routed}
        kept, missed = [], []
        for region in regions:
            if region in routed:
                reason = "its input is a choice of tokens, as in an existing MoE block"
            elif region.source in tokens:
                reason = "it is the shared expert of an existing MoE block"
            else:
                kept.append(region)
                continue
            missed.append(NearMiss(_path(region.down), reason))
        return kept, missed


def _is_nonlinear(node: fx.Node, interior: Iterable[fx.Node]) -> bool:
    name = op_name(node)
    if name in NONLINEAR:
        return True
    tensors = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    return name in ("mul", "rmul") and len(tensors) == 2


def _is_choice(node: fx.Node) -> bool:
    """Tell whether a value is a selection of rows by a tensor of indices."""
    node = strip(node)
    name = op_name(node)
    if name in ("index_select", "gather", "masked_select", "take_along_dim", "embedding"):
        return name != "embedding" and len(node.all_input_nodes) > 1
    return name == "getitem" and len(node.all_input_nodes) > 1


def _before_choice(node: fx.Node) -> fx.Node:
    node = strip(node)
    while _is_choice(node):
        node = strip(node.all_input_nodes[0])
    return node


def _path(linear: Linear) -> str:
    return linear.weight.name.rpartition(".")[0] or linear.weight.name


def _without_overlaps(regions: list[Region]) -> tuple[list[Region], list[NearMiss]]:
    used: set[fx.Node] = set()
    kept, missed = [], []
    for region in regions:
        if used & set(region.nodes):
            missed.append(NearMiss(_path(region.down), "it shares a projection with another MLP"))
            continue
        used |= set(region.nodes)
        kept.append(region)
    return kept, missed


__all__ = ["FindMlps", "NearMiss", "Region", "find_regions"]
