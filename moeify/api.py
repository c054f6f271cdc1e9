"""`moeify(model, plan)`: the one line, from capture to proof; and `demoeify`, the way back."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeVar

from torch import fx, nn

from moeify import compat, losses
from moeify.calibration import mlp_inputs
from moeify.capture import ExampleInputs
from moeify.conversion import (
    ATTRIBUTE,
    Conversion,
    ConvertedLayer,
    Fate,
    Installer,
    make_ledger,
    skeleton,
)
from moeify.discovery import Discovery, FoundSite
from moeify.expert_models import averaging
from moeify.input_spec import describe_inputs
from moeify.mesh import World
from moeify.parallel import (
    Parallel,
    agree_on_layers,
    join,
    reduce_gradients,
    sharded_names,
    together,
)
from moeify.passes.base import Pass
from moeify.passes.blocks import block_path, find_site
from moeify.pipeline import Built, prepare, read_plan, run_pipeline
from moeify.plan import Plan
from moeify.resolve import LayerPlan, ResolvedPlan
from moeify.site_weights import agree_on_starts
from moeify.verification import Snapshot, check, check_untouched, coarsest, compare, snapshot
from moeify.zero import Partitioned, partition

if TYPE_CHECKING:
    from moeify.tensor_parallel import PartialSums

log = logging.getLogger("moeify")
Model = TypeVar("Model", bound=nn.Module)


def moeify(
    model: Model,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str],
    *,
    example_inputs: ExampleInputs | None = None,
    mesh: Any = None,
    passes: Sequence[Pass] = (),
    verify: bool = True,
) -> Model:
    """Turn chosen MLPs of a model into Mixture-of-Experts layers, in place.

    The model is run once on fake tensors to find its MLPs by dataflow; the plan chooses among
    them; each chosen one becomes a block that is itself a `torch.fx.GraphModule`; the result is
    compared with the dense model. After any error the model is exactly the dense one again.

    Args:
        model: Any `nn.Module`, not compiled, sharded or wrapped yet. On `meta` it stays on `meta`.
        plan: A `Plan`, a dict, the name of a preset such as "pr-moe", or a path to YAML or JSON.
        example_inputs: A dict of keyword arguments, a tuple of positional ones, or a tensor; made
            from the config of a Hugging Face model if None.
        mesh: Your own DeviceMesh with the dimensions "dp" and "tp", in a world of several ranks;
            made from the plan if None.
        passes: Your own graph passes. Each goes right before `lower-kernels`, unless its facts ask
            for another place among moeify's.
        verify: Run the dense and the converted model on the example inputs and compare outputs
            and gradients; needs memory for the gradients.

    Returns:
        The same object.

    Raises:
        PlanError: The plan cannot be read or does not fit the model.
        CaptureError: The model does not run on the example inputs.
        UnsupportedModuleError: A chosen site cannot be converted, or the model is wrapped.
        PassError, PassOrderError: A pass failed.
        VerificationError: The converted model does not give the dense model's numbers.

    Source:
        Sparse upcycling: Komatsuzaki et al. 2022. Residual and pyramid: DeepSpeed-MoE
        (Rajbhandari et al. 2022), section 4.

    Example:
        >>> import torch
        >>> nn = torch.nn
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> plan = {"layers": [{"select": "all", "experts": 4}]}
        >>> model = nn.Sequential(mlp, nn.LayerNorm(8))
        >>> model = moeify(model, plan, example_inputs=torch.randn(4, 8))
        >>> type(model[0]).__name__
        'MoEBlock'
    """
    chosen = together("take model and plan", lambda: read_plan(model, plan))
    world = join(chosen, mesh, model, verify=verify)
    inputs, discovery, resolved = together(
        "apply the plan", lambda: prepare(model, chosen, example_inputs)
    )
    with ExitStack() as undo:  # an error puts back what the average of checkpoints replaced
        together("average its checkpoints", lambda: undo.enter_context(averaging(model, resolved)))
        if world is not None:
            agree_on_layers(resolved, model, inputs)
            world.prepare(layer.experts for layer in resolved)
        rows = together(
            "look at its MLPs' inputs", lambda: mlp_inputs(model, discovery, resolved, inputs)
        )
        built = together(
            "build its blocks",
            lambda: run_pipeline(
                model,
                chosen,
                resolved,
                discovery,
                passes=passes,
                world=world,
                example_inputs=inputs,
                calibrated=rows,
            ),
        )
        if world is not None:
            agree_on_starts(model, resolved, discovery, rows)
        install_checked(model, chosen, resolved, discovery, built, inputs, verify, world)
    return model


def install_checked(
    model: nn.Module,
    plan: Plan,
    resolved: ResolvedPlan,
    discovery: Discovery,
    built: Built,
    example_inputs: ExampleInputs,
    verify: bool,
    world: World | None = None,
) -> None:
    """Put the blocks in place, compare with the dense model, and keep the record; or undo it all.

    Args:
        model: The dense model.
        plan: The plan.
        resolved: What it became.
        discovery: What was found in the model, or in another instance of it.
        built: From `run_pipeline`.
        example_inputs: To compare on.
        verify: Compare at all; a model on meta is never compared.
        world: The ranks; None for one process.
    """
    before = dict(model.named_parameters(remove_duplicate=False))
    versions = {name: (id(p), p._version) for name, p in before.items()}
    untouched = _untouched(before, resolved)
    numeric = verify and not any(p.is_meta for p in before.values())
    layers: list[ConvertedLayer] = []
    installer = Installer(model)
    undo = ExitStack()
    undo.callback(installer.undo)
    sums: list[PartialSums | None] = []

    def install() -> Snapshot | None:
        dense = snapshot(model, example_inputs, untouched) if numeric else None
        for layer in resolved:
            found = find_site(discovery, layer)
            layers.append(_install(installer, layer, found, built.blocks[layer.name]))
        return dense

    def slice_dense() -> dict[str, tuple[Fate, str]]:
        ledger = make_ledger(before, model, layers)
        check_untouched(versions, model)
        if built.slices is not None and world is not None:
            from moeify.tensor_parallel import apply

            sliced = apply(model, built.slices, world.dense["tp"])
            undo.callback(sliced.undo)
            sums.append(sliced.sums)
        return ledger

    def partition_state() -> Partitioned:
        if world is None or not plan.zero.is_active:
            return Partitioned()
        if built.zero is None:
            log.warning("partition-zero is disabled: nothing is partitioned")
            return Partitioned()
        paths = {converted.layer.name: converted.block for converted in layers}
        return partition(model, built.zero, world, resolved, paths, built.slices, undo)

    def prove() -> None:
        if dense is not None:
            difference = compare(dense, snapshot(model, example_inputs, untouched), resolved.layers)
            log.info("step-0 difference: %s", difference)
            check(difference, coarsest(p.dtype for p in before.values()))
        for converted in layers:
            for swap in converted.swaps:
                swap.original = skeleton(swap.original)

    try:
        # One after the other on all ranks: blocks that run wait for those of other ranks.
        dense = together("install its blocks", install)
        ledger = together("slice its dense layers", slice_dense)
        together("prove its blocks", prove)
        partitioned = together("partition its state", partition_state)
        record = Conversion(plan, layers, ledger, installer.fused, describe_inputs(example_inputs))
        if world is not None:
            paths = {converted.layer.name: converted.block for converted in layers}
            zero = built.zero
            pieces = zero is not None and zero.stage >= 2  # whose engine reduces gradients
            which = "none" if pieces else plan.parallel.gradients
            reducer = reduce_gradients(model, world, resolved, paths, which)
            record.parallel = Parallel(
                world.layout,
                world.rank,
                reducer,
                built.slices,
                None if pieces or not sums else sums[0],
                zero,
                partitioned.cuts,
                partitioned.masters,
                partitioned.guard,
            )
            compat.leave_out_of_ddp(model, sharded_names(model))
    except BaseException:
        undo.close()
        raise
    undo.pop_all()
    model.__dict__[ATTRIBUTE] = record
    losses.attach(model)
    from moeify import hf

    hf.guard(model)


def _install(
    installer: Installer, layer: LayerPlan, found: FoundSite | None, block: fx.GraphModule
) -> ConvertedLayer:
    path = block_path(found, layer)
    swaps = installer.install(layer, found, path, block)
    if found is None:
        return ConvertedLayer(layer, path, swaps)
    program = found.region.program
    return ConvertedLayer(layer, path, swaps, program.swap, program.params)


def _untouched(before: Mapping[str, nn.Parameter], resolved: ResolvedPlan) -> list[str]:
    touched = set()
    for layer in resolved:
        for projection in (*layer.site.up, layer.site.down):
            touched |= {projection.weight, projection.bias}
        touched |= set(layer.site.inner)
    return [name for name in before if name not in touched]


__all__ = ["moeify"]
