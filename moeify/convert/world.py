"""A conversion on several ranks: one layout, agreed on before anything is built or sent.

Ranks that disagree would hang in the first collective, or exchange garbage. So what each of them
is about to do is compared at set-up, and what goes wrong on one rank is raised on all of them.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeify.capture.input_spec import describe_inputs
from moeify.distributed.agreement import assert_same_on_ranks, can_talk
from moeify.distributed.dtensor import is_sharded
from moeify.distributed.exchange import is_coordinated
from moeify.distributed.gradient_reducer import GradientReducer, Reduction
from moeify.distributed.layout import Layout
from moeify.distributed.mesh import World, is_running, world_size
from moeify.errors import PlanError
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.plan import Plan
from moeify.plan.zero_checks import check_process

if TYPE_CHECKING:
    from moeify.tensor_parallel.apply import SlicePlan
    from moeify.zero.plan import ZeroPlan
    from moeify.zero.stage1 import Cut, Guard

log = logging.getLogger("moeify")

_SAME_CALL = "call moeify on every rank with the same plan, weights and form of example inputs"


@dataclass(slots=True)
class Parallel:
    """What a conversion records of its ranks; copied with the model."""

    layout: Layout
    rank: int
    reducer: GradientReducer | None = None
    slices: SlicePlan | None = None
    zero: ZeroPlan | None = None
    # how optimizer states are cut at stages 0 and 1, by parameter name
    cuts: dict[str, Cut] = field(default_factory=dict)
    # weights in float32, until an optimizer takes them
    masters: dict[str, Tensor] = field(default_factory=dict)
    guard: Guard | None = None  # makes optimizers that know nothing of `zero` refuse


def check_whole_world(mesh: Any) -> None:
    """Raise a PlanError if a user's mesh leaves ranks out, which may not even make this call."""
    ranks = getattr(mesh, "mesh", None)
    if isinstance(ranks, Tensor) and is_running() and ranks.numel() < world_size():
        raise PlanError(
            f"mesh: holds {ranks.numel()} of the {world_size()} ranks of the world, and a model is "
            "converted over all of them: give a mesh of all ranks, or start torch.distributed with "
            "these alone",
            path="parallel",
        )


def init_world(
    plan: Plan, mesh: Any, model: nn.Module, *, verify: bool = True, loading: bool = False
) -> World | None:
    """Return the meshes of a plan in the running world; None where one process is the world.

    `mesh` is the user's own dense mesh, or None; `model` tells the device. Where a saved model is
    `loading`, a `zero:` that needs a world is left out without one.
    """
    world = world_size()
    running = is_running()
    try:
        check_process(plan, distributed=running)
    except PlanError as error:
        if not loading:
            raise
        log.warning(
            "%s; without it weights keep the dtype they were saved in, and mf.optimizer keeps no "
            "master weights",
            error,
        )
    if world == 1 and mesh is None and not (running and plan.zero.is_active):
        _fit(plan, world)
        return None
    if not running:
        raise PlanError("mesh: torch.distributed does not run: call init_process_group first")
    device = next((p.device.type for p in model.parameters()), "cpu")
    facts = {
        "the plan": plan.digest()[:12],
        "`verify`": str(verify),
        "`mesh`": _described(mesh),
        "the device": device,
    }
    assert_same_on_ranks(facts, _SAME_CALL)
    layout = _fit(plan, world)
    return World.create(layout, "cpu" if device == "meta" else device, mesh)


def _described(mesh: Any) -> str:
    if mesh is None:
        return "none"
    names, ranks = getattr(mesh, "mesh_dim_names", None), getattr(mesh, "mesh", None)
    return f"{names} of ranks {ranks.tolist() if isinstance(ranks, torch.Tensor) else mesh}"


def _fit(plan: Plan, world: int) -> Layout:
    try:
        return Layout.of(plan.parallel, world)
    except PlanError as error:
        raise plan.fault(tuple(error.path.split(".")), error.message) from None


def assert_same_layers(resolved: ResolvedPlan, model: nn.Module, example_inputs: Any) -> None:
    """Compare what is about to be converted, and the dense weights, over all ranks."""
    if not can_talk():
        return
    layers = [(la.name, la.experts, la.top_k, la.residual, la.site.d_in) for la in resolved]
    facts = {"the number of layers": str(len(layers))}
    facts |= {f"layer {i}": " ".join(map(str, layer)) for i, layer in enumerate(layers)}
    facts |= _weight_digests(model)
    # Their size decides how rows travel.
    facts["the example inputs"] = json.dumps(describe_inputs(example_inputs))
    assert_same_on_ranks(facts, _SAME_CALL)


def _weight_digests(model: nn.Module) -> dict[str, str]:
    """Return a digest of each module's own parameters, cheap enough to compare at set-up."""
    digests: dict[str, str] = {}
    for path, module in model.named_modules():
        text = ""
        for name, parameter in module.named_parameters(recurse=False):
            text += f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad} "
            if not parameter.is_meta:
                text += f"{_checksum(parameter.detach())} "
        if text:
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
            digests[f"the weights of {path or 'the model'}"] = digest
    return digests


def _checksum(tensor: torch.Tensor) -> int:
    """Return a sum over the bits, each element times an odd number of its place.

    Of integers, so that it does not depend on the order of a device or of threads.
    """
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32}.get(tensor.itemsize, torch.int64)
    total = 0
    for number, part in enumerate(torch.split(tensor.flatten(), _PIECE)):
        values = part.view(bits)
        odd = torch.arange(values.shape[0], device=values.device) * 2 + 1
        total += (number + 1) * int((values * odd).sum())
    return total


_PIECE = 1 << 20
"""Elements at a time: a checksum needs 32 bytes for each."""


def reduce_gradients(
    model: nn.Module, world: World, resolved: ResolvedPlan, blocks: dict[str, str], which: str
) -> GradientReducer | None:
    """Hook the reduction of gradients into every backward pass of a converted model.

    The single process minimises the mean of the ranks' losses. So dense gradients are averaged over
    dp; an expert's are summed over all the ranks that sent it tokens, which is what its backward
    pass does within ep and this does over edp, and divided by dp.

    `blocks` are the paths by layer name; `which` is "all", "experts" or "none".
    """
    layout = world.layout
    if which == "none" or layout.world == 1:
        return None
    reductions = []
    seen: set[int] = set()
    watched = [model]
    for layer in resolved:
        if layout.ep(layer.experts) == 1:
            continue
        path = f"{blocks[layer.name]}.experts"
        experts: Any = model.get_submodule(path)
        mesh = world.sparse(layer.experts)
        size = layout.edp(layer.experts)
        experts.gradient_factor = gradient_factor(
            layout, layer.experts, model.get_submodule(blocks[layer.name])
        )
        names = [f"{path}.{n}" for n, p in experts.named_parameters() if id(p) not in seen]
        seen |= {id(p) for p in experts.parameters()}
        group = world.reducing(mesh, "edp") if size > 1 else ""
        reductions.append(Reduction.of(model, names, group, size))
        watched.append(experts)
    rest = [
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if id(parameter) not in seen and (which == "all" or is_sharded(parameter))
    ]  # tied parameters under all their names; DDP leaves out what is sharded, slices too
    if rest and layout.dp > 1:
        group = world.reducing(world.dense, "dp")
        reductions.append(Reduction.of(model, rest, group, layout.dp))
    if not reductions:
        return None
    complete = which == "all" and layout.dp > 1
    return GradientReducer(reductions, watched=watched, complete=complete)


def gradient_factor(layout: Layout, experts: int, block: nn.Module) -> float:
    """Return what gradients of a block's experts are multiplied by, before the average over edp.

    It makes them gradients of the mean of the ranks' losses; 1 where experts are not sharded.
    """
    if layout.ep(experts) == 1:
        return 1.0
    copies = layout.copies(coordinated=is_coordinated(block))
    return layout.edp(experts) / layout.dp / copies


def sharded_names(model: nn.Module) -> list[str]:
    """Return the names of the parameters of which this rank holds a share."""
    return [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
