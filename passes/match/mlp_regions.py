"""The MLPs of a recorded graph, found from their ends.

From each projection, walk backwards through elementwise operations until other projections are
reached. That is an MLP if these share their input, something between is not linear, nothing
outside reads the hidden value, and the width that comes out is the width that went in. What fails
only one of these tests is a near miss, kept with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch import fx

from moeify.passes.infra.records import module_path_of, record_of
from moeify.passes.match.dataflow import Linear, linears_of
from moeify.passes.match.existing_moe import ExistingMoe
from moeify.passes.match.inner_program import InnerProgram, Known, NotTokenwise, build_program
from moeify.passes.match.operations import (
    ACTIVATING,
    CASTS,
    CONSTANTS,
    DROPOUTS,
    ELEMENTWISE,
    GATES,
    NONLINEAR,
    OVER_WIDTH,
    RESHAPES,
    SPLITS,
    TRANSPOSES,
    changed_views,
    dataflow,
    is_slice_of_width,
    op_name,
    opaque_call,
    shape_of,
    strip,
)

_INNER = ELEMENTWISE | RESHAPES | CASTS | DROPOUTS | OVER_WIDTH | SPLITS | {"glu", "prelu"}

_TRANSPARENT = TRANSPOSES | frozenset(
    "setitem batch_norm group_norm instance_norm roll flip cumsum masked_scatter".split()
)
"""Not elementwise, but the search passes them: an MLP with one of these inside is a near miss."""

_CONTRACTIONS = frozenset(
    "scaled_dot_product_attention multi_head_attention_forward matmul bmm baddbmm einsum conv1d "
    "conv2d conv3d conv_transpose1d conv_transpose2d grouped_mm".split()
)
"""The search ends here: what comes before these is another layer."""


@dataclass(frozen=True, slots=True)
class NearMiss:
    """Something like an MLP that is not one."""

    name: str  # path of the module that holds its last projection, or its weight
    reason: str  # the test that it failed

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True, slots=True, eq=False)
class Region:
    """One run of one MLP in the graph."""

    ups: tuple[Linear, ...]  # the first projections, in execution order
    down: Linear
    interior: tuple[fx.Node, ...]  # the nodes between, in execution order
    source: fx.Node  # the value that is projected, before reshapes
    program: InnerProgram  # what the nodes between compute

    @property
    def key(self) -> tuple[str, ...]:
        """The weights: two regions with the same key are one MLP run twice."""
        return (*(up.weight.name for up in self.ups), self.down.weight.name)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        ups = (node for up in self.ups for node in up.nodes)
        return (*ups, *self.interior, *self.down.nodes)


def find_regions(graph: fx.Graph, *, training: bool = False) -> tuple[list[Region], list[NearMiss]]:
    """Return the MLPs of a recorded graph in execution order, and the near misses.

    An MLP that runs twice gives two regions. `training`: the graph was recorded in training mode.
    """
    search = _Search(graph, training)
    found: list[Region] = []
    missed: list[NearMiss] = []
    for down in search.linears:
        match = search.match(down)
        if isinstance(match, Region):
            found.append(match)
        elif match is not None:
            missed.append(match)
    found, overlapping = _without_overlaps(found)
    sources = [(region.source, region.key) for region in found]
    experts = ExistingMoe(search.flow, search.linears, sources)
    reasons = {region: experts.reason(region.source) for region in found}
    routed = [NearMiss(_path(r.down), why) for r, why in reasons.items() if why]
    found = [region for region in found if not reasons[region]]
    return found, list(dict.fromkeys([*missed, *overlapping, *routed]))


class _Search:
    def __init__(self, graph: fx.Graph, training: bool) -> None:
        self.training = training
        self.known: Known = {}
        self.flow: nx.DiGraph[fx.Node] = dataflow(graph)
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self.linears = linears_of(graph)
        self.by_out = {linear.out: linear for linear in self.linears}
        self.parts = {node for linear in self.linears for node in linear.nodes}

    def match(self, down: Linear) -> Region | NearMiss | None:
        """Match one projection as the end of an MLP."""
        ups, interior, passed, obstacle = self._walk(down)
        if not ups or not any(_is_nonlinear(node) for node in interior):
            return None
        sources = {strip(up.source) for up in ups}
        square = any(down.out_features == up.in_features for up in ups)
        if len(sources) != 1 or down.node in {up.node for up in ups}:
            if len(sources) > 1 and obstacle is None and square:
                return NearMiss(_path(down), self._several_inputs(ups))
            return None
        if obstacle is not None and len(obstacle.all_input_nodes) == 1:
            passed.append(obstacle)
        leak = self._leak(ups, [*interior, *passed], down)
        if leak is not None and (obstacle is not None or not square):
            return None
        if not square and not any(op_name(node) in ACTIVATING for node in interior):
            return None  # a low-rank projection with a norm inside
        reason = self._defect((*ups, down), obstacle, leak)
        if reason:
            return NearMiss(_path(down), reason)
        ordered = tuple(sorted(ups, key=lambda up: self.order[up.node]))
        inner = tuple(sorted(interior, key=lambda node: self.order[node]))
        uncut = {record.grad for n in (*ups, down) if (record := record_of(n.node))}
        for node in inner:
            record = record_of(node)
            if record is not None and node.all_input_nodes and uncut != {record.grad}:
                where = f"`{op_name(node)}` between its projections"
                return NearMiss(_path(down), f"{where} runs without gradients (no_grad)")
        try:
            program = build_program(ordered, inner, down, training=self.training, known=self.known)
        except NotTokenwise as problem:
            return NearMiss(_path(down), str(problem))
        return Region(ordered, down, inner, next(iter(sources)), program)

    def _defect(
        self, linears: tuple[Linear, ...], obstacle: fx.Node | None, leak: str | None
    ) -> str:
        """Return why projections around one hidden value are not an MLP, or ""."""
        *ups, down = linears
        for linear in linears:
            if linear.problem:
                return f"{_path(linear)}: {linear.problem}"
        if obstacle is not None:
            return _describe_obstacle(obstacle)
        if down.out_features != ups[0].in_features:
            widths = f"{down.out_features} is not its input width {ups[0].in_features}"
            return f"its output width {widths}"
        if leak is not None:
            return leak
        if len({linear.weight.name for linear in linears}) != len(linears):
            return "two of its projections share one weight"
        if len({linear.channel for linear in linears}) != 1:
            return "it mixes convolutions and linear layers"
        return self._is_gate(down) or self._goes_on(down)

    def _several_inputs(self, ups: list[Linear]) -> str:
        """Return why the first projections have different inputs: often an adapter beside one."""
        by_out = {strip(linear.out): linear for linear in self.linears}
        widest = max(up.out_features for up in ups)
        for up in ups:
            first = by_out.get(strip(up.source))
            if first is not None and first.out_features < min(widest, first.in_features):
                return (
                    f"a low-rank adapter ({_path(first)}, {_path(up)}) is added to its first "
                    "projection: merge the adapter first"
                )
        return "its first projections do not share one input"

    def _adapter(self, user: fx.Node, down: Linear) -> str:
        """Return that a reader of the hidden value is a low-rank adapter, or ""."""
        by_node = {linear.node: linear for linear in self.linears}
        while user not in by_node and len(user.users) == 1:
            user = next(iter(user.users))
        side = by_node.get(user)
        if side is None or side.out_features >= min(down.in_features, down.out_features):
            return ""
        return f"a low-rank adapter ({_path(side)}) reads its hidden value: merge the adapter first"

    def _is_gate(self, down: Linear) -> str:
        """Return that the output only scales another value, as in squeeze-and-excitation, or ""."""
        node, squashed = down.out, False
        while len(node.users) == 1:
            node = next(iter(node.users))
            squashed = squashed or op_name(node) in GATES
            if squashed and op_name(node) == "mul":
                return "its output only scales another value, as in squeeze and excitation"
            if op_name(node) not in RESHAPES | GATES:
                break
        return ""

    def _goes_on(self, down: Linear) -> str:
        """Return that an activation and another projection follow, as in a head, or ""."""
        sources = {linear.source for linear in self.linears}
        node, activated = down.out, False
        while len(node.users) == 1 and not (activated and node in sources):
            node = next(iter(node.users))
            activated = activated or op_name(node) in ACTIVATING
            if op_name(node) not in RESHAPES | CASTS | DROPOUTS | ACTIVATING:
                return ""
        return "it is part of an MLP of more layers" if activated and node in sources else ""

    def _walk(
        self, down: Linear
    ) -> tuple[list[Linear], list[fx.Node], list[fx.Node], fx.Node | None]:
        """Go backwards from `down`; return projections, nodes between, obstacles passed, the first.

        Some obstacles are passed, so that what would be an MLP without them is a near miss.
        """
        ups: list[Linear] = []
        interior: list[fx.Node] = []
        passed: list[fx.Node] = []
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
            elif node.op == "get_attr":
                continue
            elif self._passes(node, down.channel):
                interior.append(node)
                todo += self._data_inputs(node)
            elif op_name(node) in _CONTRACTIONS:
                return [], [], [], node
            else:
                obstacle = obstacle or node
                if op_name(node) in _TRANSPARENT:
                    passed.append(node)
                    todo += node.all_input_nodes[:1]
        return ups, interior, passed, obstacle

    def _passes(self, node: fx.Node, channel: int) -> bool:
        if node.op not in ("call_method", "call_function"):
            return False
        name = op_name(node)
        if name == "getitem":
            return is_slice_of_width(node, channel) or self._unpacks(node)
        if not node.all_input_nodes:
            return name in CONSTANTS and shape_of(node) == ()
        if name in _INNER:
            return True
        same_shape = shape_of(node) == shape_of(node.all_input_nodes[0])
        return opaque_call(node) is not None and same_shape

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
                    adapter = self._adapter(user, down)
                    if adapter:
                        return adapter
                    path = module_path_of(user) or "the model"
                    what = "returned" if user.op == "output" else f"used by `{op_name(user)}`"
                    return f"its hidden value is also {what} in {path}"
            for user in changed_views(node):
                if user not in inside:
                    return "its hidden value is changed in place through a view"
        return None


def _describe_obstacle(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"its hidden value also depends on `{node.name}`, which comes from outside"
    path = module_path_of(node)
    where = f" in {path}" if path else ""
    return f"`{op_name(node)}`{where} is not elementwise"


def _is_nonlinear(node: fx.Node) -> bool:
    name = op_name(node)
    if name in NONLINEAR or opaque_call(node) is not None:
        return True
    tensors = [a for a in node.args if isinstance(a, fx.Node) and a.op != "get_attr"]
    return name in ("mul", "rmul") and len(tensors) == 2


def _path(linear: Linear) -> str:
    """Name a projection by its weight's module, or by where it ran if that is elsewhere."""
    own = linear.weight.module or linear.weight.name
    ran_in = module_path_of(linear.node)
    return own if not ran_in or own.startswith(ran_in) else ran_in


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
