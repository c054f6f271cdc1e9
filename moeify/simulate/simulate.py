"""Simulate one training step of a converted model on rank 0 of a world of any size.

The model is on `meta` and converted as in a real run, under the `fake` process group; then a copy
of it takes a step on fake tensors, forward and backward. The collectives it issues are counted
(`moeify.simulate.counter`), the memory it would keep is added up, and nothing is computed. No time
is measured.

Sizes that depend on the routing are unknown without numbers, so a dropless plan is simulated with
an even load.
"""

from __future__ import annotations

import copy
from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moeify import api, compat
from moeify.capture.capture import ExampleInputs, split_inputs
from moeify.capture.torch_calls import tensors_in
from moeify.distributed.dtensor import is_sharded, local_of
from moeify.distributed.layout import Layout
from moeify.errors import MoeifyError
from moeify.hf.detect import example_inputs_for
from moeify.hf.example_inputs import BATCH, LENGTH
from moeify.init.strategies import generator_for, init_router
from moeify.plan.layer_plan import LayerPlan
from moeify.plan.plan import Plan
from moeify.simulate.counter import Call, Counter, fake_world
from moeify.simulate.zero import memory_by_stage, with_pieces
from moeify.sites.install import skeleton
from moeify.sites.record import Conversion, require_conversion, routers_of
from moeify.train import losses

__all__ = ["Simulation", "simulate", "step"]

_SUMS = "count hops payload_bytes node_bytes network_bytes".split()

_SAMPLE = 4096  # random tokens for a fresh router, fewer for very wide models


@dataclass(frozen=True, slots=True)
class Collectives:
    """The collectives of one layer, phase, kind and group in one step."""

    layer: str  # module path, or ""
    phase: str  # "forward", "backward", "gradients" or "optimizer"
    kind: str  # see `Call`
    ranks: int  # size of the group
    nodes: int  # that it spans
    count: int
    hops: int  # point-to-point steps of a rank, all calls together
    payload_bytes: int  # of the input tensors
    node_bytes: int  # sent within the node
    network_bytes: int  # sent to other nodes


@dataclass(frozen=True, slots=True)
class Imbalance:
    """The load of a fresh router on random tokens: the largest over the mean."""

    layer: str  # name of the site
    experts: float
    ranks: float  # the same over the ranks that share the experts
    tokens: int


@dataclass(frozen=True, slots=True)
class Simulation:
    """One step, counted on rank 0."""

    model: str  # class of the model
    world: int
    node: int  # ranks per node
    layout: Mapping[str, int | str]  # sizes of dp, tensor and expert groups
    inputs: Mapping[str, list[int]]  # shapes, of one rank
    even_load: bool  # whether a dropless plan was simulated with an even load
    collectives: tuple[Collectives, ...]
    parameters: Mapping[str, int]  # elements on this rank, "dense" and "expert"
    parameter_bytes: Mapping[str, int]
    activation_bytes: int  # what autograd keeps for the backward pass, without parameters
    imbalance: tuple[Imbalance, ...]  # by layer
    zero: Mapping[str, int | str]  # the plan's stage and engine
    # Bytes on this rank with an optimizer of two states, by ZeRO stage, "dense" or "expert", and
    # field of `zero.plan.Memory`.
    memory: Mapping[int, Mapping[str, Mapping[str, int]]]

    def totals(self) -> dict[str, int]:
        """Return the sums over all collectives of a step."""
        return {name: sum(getattr(row, name) for row in self.collectives) for name in _SUMS}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self) | {"totals": self.totals()}


def simulate(
    model: nn.Module,
    plan: Plan | Mapping[str, Any] | str,
    *,
    world: int,
    node: int,
    example_inputs: ExampleInputs | None = None,
    batch: int | None = None,
    length: int | None = None,
) -> Simulation:
    """Convert a copy of a model for a large world and count one training step of rank 0.

    Args:
        model: The dense model; read only, on `meta` or not.
        plan: As for `moeify`.
        world: Number of ranks.
        node: Ranks per node.
        example_inputs: Inputs of one rank; made from a Hugging Face config if None.
        batch: Sequences per rank, if the inputs are made.
        length: Tokens per sequence, if the inputs are made.

    Raises:
        MoeifyError: A process group is running already, or the inputs have no such size.
        PlanError: The plan does not fit the model or the world.
    """
    chosen, even = _with_capacity(Plan.of(plan))
    # Made at their size now: it decides the form of the exchange, if the plan leaves that open.
    sized = example_inputs
    if sized is None:
        sized = _resized(example_inputs_for(model), batch, length)
    # ZeRO changes no shape that a step computes with: its collectives are added afterwards.
    whole = Plan.of(chosen.data() | {"zero": {"prefetch": chosen.zero.prefetch}})
    with fake_world(world, node):
        sharded = api.moeify(skeleton(model), whole, example_inputs=sized, verify=False)
        record = require_conversion(sharded)
        calls, kept = step(sharded, sized, [layer.block for layer in record.layers])
        parameters, sizes = _parameters(sharded, record)
    layout = Layout.of(chosen.parallel, world)
    zero = None if record.parallel is None else record.parallel.zero
    if zero is not None:
        zero = replace(zero.under(chosen.zero), device="cuda")
        counts = {f"{la.block}.experts": la.layer.experts for la in record.layers}
        calls = with_pieces(calls, zero, layout, counts)
    return Simulation(
        model=type(model).__name__,
        world=world,
        node=node,
        layout={
            "dp": layout.dp,
            "tensor": layout.tensor,
            "expert": layout.expert,
            "experts_in_tp": layout.experts_in_tp,
        },
        inputs=_shapes(sized),
        even_load=even,
        collectives=tuple(_grouped(calls, node)),
        parameters=parameters,
        parameter_bytes=sizes,
        activation_bytes=kept,
        imbalance=tuple(_imbalance(converted.layer, layout) for converted in record.layers),
        zero={"stage": chosen.zero.stage, "engine": chosen.zero.engine},
        memory={} if zero is None else memory_by_stage(zero),
    )


def step(
    model: nn.Module, example_inputs: ExampleInputs, blocks: Iterable[str] = ()
) -> tuple[list[Call], int]:
    """Run a copy of a model on fake tensors, forward and backward, in training mode.

    `blocks` are the paths of modules that count as one layer each. Return the collectives in order,
    and the bytes that autograd keeps for the backward pass.
    """
    mode = compat.fake_mode()
    fakes = {id(t): _fake_copy(mode, t) for t in (*model.parameters(), *model.buffers())}
    fake = copy.deepcopy(model, dict(fakes)).train()
    own = {compat.storage_id(s) for t in fakes.values() for s in _storages(t)}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        for storage in _storages(tensor):
            if compat.storage_id(storage) not in own:
                kept[compat.storage_id(storage)] = storage.nbytes()
        return tensor

    counter = Counter(_labels(fake, tuple(blocks)))
    args, kwargs = _fake_inputs((*split_inputs(example_inputs),), mode)
    with mode, counter.watching(), torch.enable_grad():
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = [t for t in tensors_in(fake(*args, **kwargs)) if t.requires_grad]
            if not outputs:
                raise MoeifyError(f"{type(model).__name__}: none of its outputs has a gradient")
            loss = torch.stack([t.float().mean() for t in outputs]).sum()
            if any(True for _ in routers_of(fake)):
                loss = loss + losses.aux_loss(fake)
        loss.backward()  # type: ignore[no-untyped-call]
    return counter.calls, sum(kept.values())


def _fake_copy(mode: Any, tensor: Tensor) -> Tensor:
    """Return a fake of a tensor, or of a DTensor with the same placement."""
    if not is_sharded(tensor):
        return compat.fake_like(mode, tensor)
    with mode:
        fake = compat.dtensor_like(compat.fake_like(mode, local_of(tensor.detach())), tensor)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(fake, requires_grad=tensor.requires_grad)
    return fake


def _storages(tensor: Tensor) -> list[torch.UntypedStorage]:
    storage = compat.storage_of(local_of(tensor.detach()))
    return [] if storage is None else [storage]


def _fake_inputs(value: Any, mode: Any) -> Any:
    if isinstance(value, Tensor):
        return compat.fake_like(mode, value)
    if isinstance(value, list | tuple):
        return type(value)(_fake_inputs(part, mode) for part in value)
    if isinstance(value, Mapping):
        return {key: _fake_inputs(part, mode) for key, part in value.items()}
    return value


def _labels(model: nn.Module, blocks: tuple[str, ...]) -> dict[nn.Module, str]:
    """Return the layer of each module: the block around it, or itself."""
    labels = {}
    for path, module in model.named_modules():
        if path:
            around = (b for b in blocks if path == b or path.startswith(f"{b}."))
            labels[module] = next(around, path)
    return labels


def _grouped(calls: Iterable[Call], node: int) -> Iterable[Collectives]:
    """Yield sums over equal layers, phases, kinds and groups, in the order of their first call."""
    rows: dict[tuple[str, str, str, int, int], Tally[str]] = {}
    for call in calls:
        nodes = len({rank // node for rank in call.ranks})
        near, far = call.sent(node)
        row = rows.setdefault(
            (call.layer, call.phase, call.kind, len(call.ranks), nodes), Tally[str]()
        )
        row.update(
            count=1,
            hops=call.hops,
            payload_bytes=call.payload,
            node_bytes=near,
            network_bytes=far,
        )
    for key, row in rows.items():
        yield Collectives(*key, *(row[name] for name in _SUMS))


def _parameters(model: nn.Module, record: Conversion) -> tuple[dict[str, int], dict[str, int]]:
    """Return the elements and the bytes of this rank's parameters, dense and of experts."""
    inside = tuple(f"{converted.block}.experts." for converted in record.layers)
    counts, sizes = {"dense": 0, "expert": 0}, {"dense": 0, "expert": 0}
    for name, parameter in model.named_parameters():
        kind = "expert" if name.startswith(inside) else "dense"
        local = local_of(parameter.detach())
        counts[kind] += local.numel()
        sizes[kind] += local.numel() * local.element_size()
    return counts, sizes


def _imbalance(layer: LayerPlan, layout: Layout) -> Imbalance:
    """Route random tokens with this layer's initial router weights."""
    width, experts = layer.site.d_in, layer.experts
    count = max(1, min(_SAMPLE, 2**24 // width))
    tokens = torch.randn(count, width, generator=generator_for(0, layer.name, "simulate"))
    drawn = layer.init  # a router that would start from data is random, as the tokens are
    if drawn.router != "zeros":
        drawn = drawn.model_copy(update={"router": "normal"})
    weight = init_router((experts, width), tokens, drawn, layer.name)
    chosen = (tokens @ weight.t()).topk(layer.top_k).indices
    load = torch.bincount(chosen.flatten(), minlength=experts).float()
    ranks = load.view(layout.ep(experts), -1).sum(1)
    return Imbalance(layer.name, _peak(load), _peak(ranks), count)


def _peak(load: Tensor) -> float:
    return round(float(load.max() / load.mean()), 4)


def _with_capacity(plan: Plan) -> tuple[Plan, bool]:
    """Return the plan with an even capacity instead of none, and whether that changed it."""
    data = plan.data()
    routers = [data.setdefault("router", {}), *(rule.get("router", {}) for rule in data["layers"])]
    changed = False
    for router in routers:
        if router.get("capacity_factor", 1.0) is None:
            router |= {"capacity_factor": 1.0, "min_capacity": 1}
            changed = True
    return (Plan.of(data), True) if changed else (plan, False)


def _resized(inputs: Mapping[str, Any], batch: int | None, length: int | None) -> dict[str, Any]:
    """Return inputs that were made with another batch size and another number of tokens."""
    tokens = {k for k, v in inputs.items() if isinstance(v, Tensor) and v.shape[1:2] == (LENGTH,)}
    if length is not None and not tokens:
        raise MoeifyError(f"length: the inputs {', '.join(inputs)} have no tokens to resize")
    resized = {}
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            shape = list(value.shape)
            if batch is not None and shape and shape[0] == BATCH:
                shape[0] = batch
            if length is not None and name in tokens:
                shape[1] = length
            value = torch.empty(shape, dtype=value.dtype, device="meta")
        resized[name] = value
    return resized


def _shapes(inputs: Any) -> dict[str, list[int]]:
    args, kwargs = split_inputs(inputs)
    named = {**{str(i): value for i, value in enumerate(args)}, **kwargs}
    return {name: list(v.shape) for name, v in named.items() if isinstance(v, Tensor)}
