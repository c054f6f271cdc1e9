"""How an MLP found in the graph can be replaced in the model.

module: one submodule's call is exactly the MLP: swap that submodule. What may follow inside it is a
dropout, which the block applies instead.

across modules: the MLP is written out in a larger module, or spread over several. Its first
projections become taps, which remember their input, and its last projection becomes the block.

Else the site is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx, nn

from moeify import compat
from moeify.capture.capture import Capture
from moeify.capture.recorder import ModuleCall
from moeify.passes.infra.records import module_path_of
from moeify.passes.match.attached import (
    attribute_that_would_be_lost,
    hook_that_would_be_lost,
    users_hooks,
)
from moeify.passes.match.dataflow import Linear
from moeify.passes.match.mlp_regions import Region
from moeify.passes.match.operations import (
    CASTS,
    DROPOUTS,
    RESHAPES,
    VIEWS,
    op_name,
    shape_of,
    strip,
    written_after,
)
from moeify.units import dtype_name

_DROPOUT_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a site goes."""

    install: Literal["module", "across modules", "refused"]
    reason: str = ""
    module: str = ""  # the module to swap; across modules, the smallest one around the MLP
    argument: str = ""  # of the swapped module, if it is passed by keyword
    taps: tuple[str, ...] = ()  # the modules of the first projections, in order
    block: str = ""  # the module of the last projection
    around: tuple[str, ...] = ()  # the smallest module around each run of it, once each
    tail_dropout: float = 0.0  # of a dropout after the last projection, inside the swapped module
    # refused for what the user can change: the state of its weights, or hooks
    blocked: bool = False


class Placer:
    """Decide the placement of each MLP of one capture."""

    def __init__(self, model: nn.Module, capture: Capture) -> None:
        self.model, self.capture = model, capture
        self.modules = dict(model.named_modules())
        self.place = {node: i for i, node in enumerate(capture.nodes)}
        self.calls_of: dict[str, list[ModuleCall]] = {}
        for call in capture.calls:
            self.calls_of.setdefault(call.path, []).append(call)
        self.owners: dict[object, list[str]] = {}
        for path, module in self.modules.items():
            for name, parameter in module.named_parameters(recurse=False):
                owners = self.owners.setdefault(memory_of(parameter), [])
                owners.append(f"{path}.{name}".lstrip("."))
        self.sources = {
            str(node.target): node
            for node in capture.graph_module.graph.nodes
            if node.op == "get_attr"
        }

    def placement(self, regions: Sequence[Region], *, whole: bool = True) -> Placement:
        """Place one MLP, given every run of it; `whole` allows swapping a whole module."""
        reason = self._shared(regions[0]) or self._also_read(regions)
        if reason:
            return Placement("refused", reason, module=self._around(regions))
        reason = self._unfit(regions[0])
        if reason:
            return Placement("refused", reason, module=self._around(regions), blocked=True)
        place = self.whole_module(regions) if whole else None
        place = place or self._tapped(regions)
        if place.install == "refused":
            return place
        reason = self._customised(regions, place)
        if reason:
            return Placement("refused", reason, module=place.module, blocked=True)
        return place

    # -- one module

    def whole_module(self, regions: Sequence[Region]) -> Placement | None:
        """Return where one MLP is a whole module, given every run of it, or None."""
        placements = {self._whole_call(region) for region in regions}
        placement = placements.pop()
        if placements or placement is None:
            return None
        return placement if len(self.calls_of[placement.module]) == len(regions) else None

    def _whole_call(self, region: Region) -> Placement | None:
        for call in self._common_calls(region.nodes):
            if not call.path or not call.plain:
                continue
            name, given = call.inputs[0]
            if shape_of(given) != shape_of(call.outputs[0]):
                continue  # it flattens its input and does not undo it
            if strip(given) is not region.source or not self._only_these(call.path, region):
                continue
            tail = self._tail(call, region)
            if tail is None:
                continue
            argument = name if isinstance(name, str) else ""
            return Placement("module", module=call.path, argument=argument, tail_dropout=tail)
        return None

    def _tail(self, call: ModuleCall, region: Region) -> float | None:
        """Return the dropout after the MLP inside `call`; None if anything else is inside it."""
        inside = set(region.nodes)
        dropout = 0.0
        last = strip(call.outputs[0])
        if op_name(last) in DROPOUTS:
            dropout = float(_given(last, 1, "p", 0.5))  # type: ignore[arg-type]
            active = bool(_given(last, 2, "train" if "train" in last.kwargs else "training", True))
            on_time = active == self.capture.training or not dropout
            if op_name(last) != "dropout" or not on_time:
                return None  # another kind, or one that is on in evaluation or off in training
            inside.add(last)
            last = strip(last.all_input_nodes[0])
        if last is not strip(region.down.out):
            return None
        for node in self.capture.nodes[call.start : call.end]:
            if node in inside or op_name(node) in RESHAPES or not node.all_input_nodes:
                continue
            if all(source.op == "get_attr" for source in node.all_input_nodes):
                continue  # a view of a weight
            return None
        return dropout

    def _only_these(self, path: str, region: Region) -> bool:
        """Tell whether the module at `path` owns nothing but the region's parameters."""
        module = self.modules[path]
        own = {id(p) for p in module.parameters()}
        return own <= self._parameter_ids(region) and not any(True for _ in module.buffers())

    # -- across modules

    def _tapped(self, regions: Sequence[Region]) -> Placement:
        around = self._around(regions)
        paths = []
        for linear in (*regions[0].ups, regions[0].down):
            path = linear.weight.module
            runs = [self._same(linear, region) for region in regions]
            if not path or not all(self._is_own_module(path, run) for run in runs):
                where = f"`{path}`" if path else "the model itself"
                reason = (
                    f"its weight {linear.weight.name} is used inside {where}, which does more "
                    "than this projection: put the MLP or the projection in a module of its own"
                )
                return Placement("refused", reason, module=around)
            if len(self.calls_of[path]) != len(regions):
                return Placement("refused", f"{path} is also called elsewhere", module=around)
            paths.append(path)
        reason = next((r for region in regions if (r := self._out_of_step(region))), "")
        reason = reason or self._interleaved(regions)
        if reason:
            return Placement("refused", reason, module=around)
        *taps, block = paths
        scopes = tuple(dict.fromkeys(self._around([region]) for region in regions))
        return Placement(
            "across modules", module=around, taps=tuple(taps), block=block, around=scopes
        )

    def _same(self, linear: Linear, region: Region) -> Linear:
        candidates = (*region.ups, region.down)
        return next(c for c in candidates if c.weight.name == linear.weight.name)

    def _is_own_module(self, path: str, linear: Linear) -> bool:
        call = next((c for c in self.capture.chain(linear.node) if c.path == path), None)
        if call is None or not call.plain:
            return False
        if strip(call.inputs[0][1]) is not strip(linear.source):
            return False
        if strip(call.outputs[0]) is not strip(linear.out):
            return False
        tensors = [linear.weight] if linear.bias is None else [linear.weight, linear.bias]
        own = {id(self.model.get_parameter(tensor.name)) for tensor in tensors}
        return {id(p) for p in self.modules[path].parameters()} <= own

    # -- both

    def _shared(self, region: Region) -> str:
        """Return which of the MLP's parameters are used elsewhere too, or ""."""
        for name in parameter_names(region):
            owners = self.owners.get(memory_of(self.model.get_parameter(name)), [])
            if len(owners) > 1:
                other = next(o for o in owners if o != name)
                return f"its parameter {name} is tied to {other}"
        return ""

    def _unfit(self, region: Region) -> str:
        names = parameter_names(region)
        tensors = [self.model.get_parameter(name) for name in names]
        for name, tensor in zip(names, tensors, strict=True):
            if type(tensor) is not nn.Parameter:
                return f"{name} is a {type(tensor).__name__}, not a plain parameter"
            if not tensor.is_floating_point():
                return f"{name} is quantised ({dtype_name(tensor.dtype)})"
            if tensor.layout is not torch.strided:
                return f"{name} is sparse"
        dtypes = {dtype_name(t.dtype) for t in tensors}
        if len(dtypes) > 1:
            found = ", ".join(sorted(dtypes))
            return f"its parameters have different dtypes ({found}): load the model in one dtype"
        if len({t.requires_grad for t in tensors}) > 1:
            frozen = next(n for n, t in zip(names, tensors, strict=True) if not t.requires_grad)
            return f"some of its parameters are frozen ({frozen}) and some are not"
        if len({t.device for t in tensors}) > 1:
            return "its parameters are on different devices"
        return ""

    def _customised(self, regions: Sequence[Region], place: Placement) -> str:
        """Return which module that would be lost has hooks or a patched forward, or ""."""
        if place.install == "module":
            lost = {p for p in self.modules if p.startswith(f"{place.module}.")}
            patched = {place.module, *lost}
        else:
            patched = {*place.taps, place.block}
            lost = set(patched)
            for node in (node for region in regions for node in region.nodes):
                paths = [call.path for call in self.capture.chain(node)]
                inside = paths[: paths.index(place.module)] if place.module in paths else []
                lost.update(inside)
        for path in sorted(patched):
            if "forward" in self.modules[path].__dict__:
                return f"the forward of {path} is patched: remove the patch first"
        for path in sorted(lost):
            if has_hooks(self.modules[path]):
                return f"{path} has hooks, which would be lost: remove them first"
        for path in sorted(patched | lost):
            if users_hooks(compat.state_dict_hooks(self.modules[path])):
                return f"{path} has hooks on its state dict, which would be lost: remove them first"
        whole = self.modules[place.module if place.install == "module" else place.block]
        for path in sorted(lost):
            module = self.modules[path]
            if isinstance(module, _DROPOUT_MODULES) and module.training != whole.training:
                modes = [("evaluation", "training")[m.training] for m in (module, whole)]
                return (
                    f"{path} is in {modes[0]} mode inside a module in {modes[1]} mode: give both "
                    "the same first, and set the mode of the block's experts afterwards"
                )
        return self._attached(regions[0])

    def _attached(self, region: Region) -> str:
        """Return what hangs on a parameter and would be lost, or ""."""

        def of(*names: str | None) -> dict[str, nn.Parameter]:
            return {name: self.model.get_parameter(name) for name in names if name is not None}

        weights = of(*(linear.weight.name for linear in region.ups))
        biases = of(*(b.name for linear in region.ups if (b := linear.bias) is not None))
        rest = [of(name) for name in parameter_names(region) if name not in {*weights, *biases}]
        return hook_that_would_be_lost(of(*parameter_names(region))) or next(
            filter(None, map(attribute_that_would_be_lost, (weights, biases, *rest))), ""
        )

    def _also_read(self, regions: Sequence[Region]) -> str:
        """Return which of the MLP's parameters something else reads, or ""."""
        own = {node for region in regions for node in region.nodes}
        for name in parameter_names(regions[0]):
            todo = [self.sources[name]] if name in self.sources else []
            while todo:
                for user in todo.pop().users:
                    if user in own:
                        continue
                    if op_name(user) in VIEWS | CASTS:
                        todo.append(user)
                    elif user.op != "output":
                        where = module_path_of(user) or "the model itself"
                        return f"its parameter {name} is also used by `{op_name(user)}` in {where}"
        return ""

    def _out_of_step(self, region: Region) -> str:
        """Return why the block cannot stand in for the last projection, or ""."""
        first, last = region.ups[0], region.down
        if _without(shape_of(first.source), first.channel) != _without(
            shape_of(last.out), last.channel
        ):
            return "its tokens are reshaped between its projections"
        start = min(self.place[up.node] for up in region.ups)
        stop = self.place[last.node]
        for up in region.ups:
            for node in written_after(up.source):
                if node not in region.nodes and start < self.place.get(node, -1) < stop:
                    return "its input is changed in place before its last projection has run"
        return ""

    def _interleaved(self, regions: Sequence[Region]) -> str:
        """Return that one run of the MLP starts before the run before it has ended, or ""."""
        ended = -1
        for region in sorted(regions, key=lambda r: self.place[r.down.node]):
            if min(self.place[up.node] for up in region.ups) < ended:
                return "it runs again before its last projection has run"
            ended = self.place[region.down.node]
        return ""

    def _around(self, regions: Sequence[Region]) -> str:
        calls = self._common_calls(regions[0].nodes)
        return calls[0].path if calls else ""

    def _common_calls(self, nodes: Iterable[fx.Node]) -> list[ModuleCall]:
        """Return the module calls around all of `nodes`, innermost first."""
        chains = [self.capture.chain(node) for node in nodes]
        shared = set.intersection(*({call.index for call in chain} for chain in chains))
        return [call for call in chains[0] if call.index in shared]

    def _parameter_ids(self, region: Region) -> set[int]:
        return {id(self.model.get_parameter(name)) for name in parameter_names(region)}


def parameter_names(region: Region) -> tuple[str, ...]:
    """Return every parameter of a region: weights, biases, then those of its inner program."""
    names = []
    for linear in (*region.ups, region.down):
        names.append(linear.weight.name)
        if linear.bias is not None:
            names.append(linear.bias.name)
    return (*names, *region.program.params)


def has_hooks(module: nn.Module) -> bool:
    """Tell whether a module itself has forward or backward hooks."""
    return any(getattr(module, table) for table in _HOOKS)


def memory_of(parameter: nn.Parameter) -> object:
    """Return a key that is the same for two names of one tensor, even if they are two objects."""
    return id(parameter) if parameter.is_meta else compat.storage_key(parameter) or id(parameter)


def _given(node: fx.Node, place: int, name: str, default: object) -> object:
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def _without(shape: tuple[int, ...], channel: int) -> tuple[int, ...]:
    place = channel % len(shape)
    return shape[:place] + shape[place + 1 :]
