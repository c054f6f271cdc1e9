"""Which dense layers can be sliced over tensor ranks, decided from the recorded graph.

Three steps, none of which knows a model by name:

1. Candidates: attention (`attention`) and the MLPs that the plan leaves dense,
   each as projections whose outputs are sliced and one that sums the slices up.
2. The slices are followed through the graph (`propagation`); what needs whole values
   refuses the candidate.
3. Trial run (`trial_run`): the model runs once more with projections of one rank's width.
   Where that fails, each kind of layer is tried alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from moeify.capture.capture import ExampleInputs
from moeify.hf.detect import example_inputs_for
from moeify.passes.infra.records import module_path_of
from moeify.passes.match.dataflow import Linear
from moeify.passes.match.operations import dtype_of, op_name, shape_of
from moeify.passes.match.placement import has_hooks, memory_of
from moeify.plan.layer_plan import LayerPlan, ResolvedPlan
from moeify.sites.discovery import Discovery, FoundSite, block_path, find_site
from moeify.tensor_parallel.apply import SlicedPair, SlicePlan, Way
from moeify.tensor_parallel.attention import find_attention
from moeify.tensor_parallel.propagation import Slicing, Unsliceable, follow
from moeify.tensor_parallel.trial_run import TrialRun

_Run = tuple[tuple[Linear, ...], Linear]


@dataclass(slots=True, eq=False)
class _Candidate:
    """A layer that might be sliced, with all its runs in the graph."""

    name: str
    kind: str
    runs: list[_Run] = field(default_factory=list)
    reason: str = ""
    slicing: Slicing = field(default_factory=Slicing)
    partial: tuple[str, ...] = ()

    @property
    def structure(self) -> tuple[object, ...]:
        """What is equal for layers that are alike: operations and sizes."""
        nodes = self.slicing.dims.items()
        return (self.kind, *((op_name(node), shape_of(node), dim) for node, dim in nodes))

    def pair(self) -> SlicedPair:
        ups, down = self.runs[0]
        paths = tuple(dict.fromkeys(up.weight.module for up in ups))
        return SlicedPair(self.name, self.kind, paths, down.weight.module, self.partial)


def derive(
    discovery: Discovery,
    resolved: ResolvedPlan,
    tensor: int,
    *,
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
) -> SlicePlan:
    """Decide what is sliced over `tensor` ranks; needs no process group and changes nothing."""
    if tensor == 1:
        return SlicePlan(1)
    if example_inputs is None:
        example_inputs = example_inputs_for(model)
    candidates = [*_attention(discovery), *_dense_mlps(discovery, resolved)]
    owners = _Owners(model, discovery, resolved, tensor)
    place = {n: i for i, n in enumerate(discovery.capture.graph_module.graph.nodes)}
    taken: dict[str, str] = {}
    for candidate in candidates:
        candidate.reason = candidate.reason or owners.refusal(candidate)
        if not candidate.reason:
            _follow(candidate, place, tensor, owners.parameters)
        if not candidate.reason:
            _take(candidate, taken)
    trial = TrialRun(model, example_inputs, discovery.capture, tensor)
    _refuse_failing(trial, [c for c in candidates if not c.reason])
    branches, refused = _branches(discovery, resolved, tensor)
    return SlicePlan(
        tensor,
        tuple(c.pair() for c in candidates if not c.reason),
        (*((c.name, c.reason) for c in candidates if c.reason), *refused),
        branches,
    )


def _attention(discovery: Discovery) -> list[_Candidate]:
    found: dict[tuple[str, ...], _Candidate] = {}
    graph = discovery.capture.graph_module.graph
    for one in find_attention(graph, discovery.linear_nodes):
        if one.down is None:
            found.setdefault((one.name,), _Candidate(one.name, "attention", reason=one.reason))
            continue
        key = (*sorted(up.weight.name for up in one.ups), one.down.weight.name)
        candidate = found.setdefault(key, _Candidate(one.name, "attention"))
        candidate.runs.append((one.ups, one.down))
    return list(found.values())


def _dense_mlps(discovery: Discovery, resolved: ResolvedPlan) -> list[_Candidate]:
    chosen = {layer.name for layer in resolved if layer.expert == "mlp"}
    found = []
    for one in discovery.found:
        if one.site.name not in chosen:
            runs = [(r.ups, r.down) for r in discovery.regions if r.key == one.region.key]
            found.append(_Candidate(one.site.name, "mlp", runs))
    return found


class _Owners:
    """Who owns and who reads the weights of projections."""

    def __init__(
        self, model: nn.Module, discovery: Discovery, resolved: ResolvedPlan, tensor: int
    ) -> None:
        self.model, self.tensor = model, tensor
        self.parameters = dict(model.named_parameters())
        self.capture = discovery.capture
        self.becomes = {p.weight for la in resolved for p in (*la.site.up, la.site.down)}
        self.names: dict[object, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(memory_of(parameter), []).append(name)
        self.calls: dict[str, int] = {}
        for call in self.capture.calls:
            self.calls[call.path] = self.calls.get(call.path, 0) + 1
        graph = self.capture.graph_module.graph
        self.sources = {str(n.target): n for n in graph.nodes if n.op == "get_attr"}

    def refusal(self, candidate: _Candidate) -> str:
        """Return why one of the projections cannot be sliced, or ""."""
        first_ups, first_down = candidate.runs[0]
        if first_down.weight.name in {up.weight.name for up in first_ups}:
            return f"{first_down.weight.module} is both ends of it"
        for linear, width in (
            *((up, up.out_features) for up in first_ups),
            (first_down, first_down.in_features),
        ):
            runs = [
                one
                for ups, down in candidate.runs
                for one in (*ups, down)
                if one.weight.name == linear.weight.name
            ]
            reason = self._unfit(linear, runs)
            if reason:
                return reason
            if width % self.tensor:
                return f"its width of {width} does not divide over {self.tensor} tensor ranks"
        return ""

    def _unfit(self, linear: Linear, runs: list[Linear]) -> str:
        path, name = linear.weight.module, linear.weight.name
        module = self.model.get_submodule(path)
        if linear.problem:
            return f"{path}: {linear.problem}"
        if name in self.becomes:
            return f"{path} becomes experts"
        if (
            not isinstance(module, nn.Linear)
            or type(module).forward is not nn.Linear.forward
            or "forward" in module.__dict__
            or set(module._parameters) != {"weight", "bias"}
        ):
            return f"{path or name} is not a plain nn.Linear"
        if linear.bias is not None and linear.bias.name != f"{path}.bias":
            return f"{path}: its bias {linear.bias.name} is added outside"
        if has_hooks(module):
            return f"{path} has hooks, which would see slices"
        for parameter in module.parameters():
            if type(parameter) is not nn.Parameter or not parameter.is_floating_point():
                return f"{path}: its parameters are not plain floating-point parameters"
            owners = self.names[memory_of(parameter)]
            if len(owners) > 1:
                return f"its parameter {owners[0]} is tied to {owners[1]}"
        if any(module_path_of(run.node) != path for run in runs):
            return f"{name} is used outside its module"
        users = {run.node for run in runs}
        if self.calls.get(path) != len(runs) or not set(self.sources[name].users) <= users:
            return f"{path} is also used elsewhere"
        return ""


def _follow(
    candidate: _Candidate,
    place: dict[fx.Node, int],
    tensor: int,
    parameters: dict[str, nn.Parameter],
) -> None:
    """Follow the slices of every run, or note why that is impossible."""
    try:
        for ups, down in candidate.runs:
            slicing = follow(ups, down, tensor, place)
            candidate.slicing.dims |= slicing.dims
            candidate.slicing.joined |= slicing.joined
        candidate.partial = _partial(candidate, parameters)
    except Unsliceable as why:
        candidate.reason = str(why)


def _take(candidate: _Candidate, taken: dict[str, str]) -> None:
    """Claim the projections of a layer, unless another one has them."""
    paths = candidate.pair().modules
    other = next((path for path in paths if path in taken), None)
    if other is not None:
        candidate.reason = f"{other} is sliced as part of {taken[other]}"
        return
    taken |= dict.fromkeys(paths, candidate.name)


def _partial(candidate: _Candidate, parameters: dict[str, nn.Parameter]) -> tuple[str, ...]:
    """Return the whole parameters that meet slices: each rank has a part of their gradient."""
    slicing, found = candidate.slicing, set()
    for whole in slicing.joined:
        depends = _depends(whole, parameters)
        for node in depends:
            if node.op == "get_attr":
                found.add(str(node.target))
            for user in node.users:
                if user not in depends and user not in slicing.dims:
                    path = module_path_of(user) or "the model"
                    raise Unsliceable(
                        f"what it is combined with, `{whole.name}`, has a gradient of its own "
                        f"through `{op_name(user)}` in {path}"
                    )
    return tuple(name for name in parameters if name in found)


def _depends(whole: fx.Node, parameters: dict[str, nn.Parameter]) -> set[fx.Node]:
    """Return the nodes through which `whole` depends on parameters, itself and them included."""
    if "float" not in dtype_of(whole):
        return set()
    above, todo = {whole}, [whole]
    while todo:
        for source in todo.pop().all_input_nodes:
            if source not in above and "float" in dtype_of(source):
                above.add(source)
                todo.append(source)
    trained = {n for n in above if n.op == "get_attr" and str(n.target) in parameters}
    depends, todo = set(trained), list(trained)
    while todo:
        for user in todo.pop().users:
            if user in above and user not in depends:
                depends.add(user)
                todo.append(user)
    return depends


def _refuse_failing(trial: TrialRun, candidates: Sequence[_Candidate]) -> None:
    """Refuse the kinds of layers that the model does not run with as it should."""
    kinds: dict[object, list[_Candidate]] = {}
    for candidate in candidates:
        kinds.setdefault(candidate.structure, []).append(candidate)
    if not candidates or not _failure(trial, candidates):
        return
    for same_kind in kinds.values():
        reason = _failure(trial, same_kind)
        for candidate in same_kind:
            candidate.reason = reason


def _failure(trial: TrialRun, candidates: Sequence[_Candidate]) -> str:
    ways: dict[str, Way] = {}
    dims: dict[fx.Node, int] = {}
    for candidate in candidates:
        ways |= candidate.pair().modules
        dims |= candidate.slicing.dims
    return trial.failure(ways, dims)


def _branches(
    discovery: Discovery, resolved: ResolvedPlan, tensor: int
) -> tuple[tuple[str, ...], list[tuple[str, str]]]:
    """Return the dense branches of Residual-MoE blocks that can be sliced, and why others not."""
    found, refused = [], []
    for layer in resolved:
        site = find_site(discovery, layer)
        if site is None or layer.residual == "none":
            continue
        path = f"{block_path(site, layer)}.mlp"
        reason = _branch_refusal(site, layer, tensor)
        if reason:
            refused.append((path, reason))
        else:
            found.append(path)
    return tuple(found), refused


def _branch_refusal(site: FoundSite, layer: LayerPlan, tensor: int) -> str:
    region = site.region
    if region.program.module is not None:
        return "between its projections is more than an activation"
    if region.program.gated and len(region.ups) == 1:
        return "its gate and its linear half are one projection"
    if region.down.channel != -1:
        return "its projections are convolutions"
    if layer.site.d_ff % tensor:
        return f"its width of {layer.site.d_ff} does not divide over {tensor} tensor ranks"
    return ""
