"""Convert a model in place: the whole way from the plan to the installed blocks.

The public door `moeify.moeify` and everything that loads a saved model come through here. What
belongs to a model in a user's hands alone (`save_pretrained`) is attached by the doors.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch import nn

from moeify.capture.capture import ExampleInputs
from moeify.capture.leaked_fakes import ONE_AT_A_TIME
from moeify.convert.install import Installation
from moeify.convert.memory import release
from moeify.convert.pipeline import prepare, read_plan, run_pipeline
from moeify.convert.world import assert_same_layers, check_whole_world, init_world
from moeify.distributed.agreement import run_on_all_ranks
from moeify.distributed.meeting import LONG, meet
from moeify.distributed.mesh import World
from moeify.errors import CaptureError
from moeify.init.calibration import mlp_inputs
from moeify.init.from_checkpoints import averaging
from moeify.init.weights import assert_same_starts
from moeify.passes.infra.base import Pass
from moeify.plan.plan import Plan
from moeify.storage.model_state import tensors_of, to_meta


def convert(
    model: nn.Module,
    plan: Plan | Mapping[str, Any] | str | os.PathLike[str],
    *,
    example_inputs: ExampleInputs | None = None,
    mesh: Any = None,
    passes: Sequence[Pass] = (),
    verify: bool = True,
    loading: bool = False,
) -> None:
    """Convert a model in place; arguments and errors as of `moeify.moeify`.

    A model that is `loading` runs without what its `zero:` needs, if need be.
    """
    check_whole_world(mesh)
    meet("take model and plan", LONG)
    chosen = run_on_all_ranks("take model and plan", lambda: read_plan(model, plan))
    world = init_world(chosen, mesh, model, verify=verify, loading=loading)
    try:
        # Ranks wait for each other, and may be threads of one process.
        with ONE_AT_A_TIME if world is None else nullcontext():
            _convert(model, chosen, example_inputs, world, passes, verify)
    finally:
        release(model)


def _convert(
    model: nn.Module,
    chosen: Plan,
    example_inputs: ExampleInputs | None,
    world: World | None,
    passes: Sequence[Pass],
    verify: bool,
) -> None:
    inputs, discovery, resolved = run_on_all_ranks(
        "apply the plan", lambda: prepare(model, chosen, example_inputs)
    )
    with ExitStack() as undo:  # an error puts back what the average of checkpoints replaced
        run_on_all_ranks(
            "average its checkpoints", lambda: undo.enter_context(averaging(model, resolved))
        )
        if world is not None:
            assert_same_layers(resolved, model, inputs)
            world.prepare(layer.experts for layer in resolved)
        rows = run_on_all_ranks(
            "look at its MLPs' inputs", lambda: mlp_inputs(model, discovery, resolved, inputs)
        )
        built = run_on_all_ranks(
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
        release(model)  # the comparison needs memory
        if world is not None:
            assert_same_starts(model, resolved, discovery, rows)
        Installation(
            model,
            chosen,
            resolved,
            discovery,
            built,
            inputs,
            calibrated=rows,
            verify=verify,
            world=world,
        ).run()


def convert_without_values(
    model: nn.Module,
    plan: Plan,
    inputs: ExampleInputs | None,
    *,
    passes: Sequence[Pass] = (),
    rebuild: Callable[[], None] | None = None,
) -> None:
    """Convert a model whose parameters are on meta, or whose values do not matter, unverified.

    A model that reads values while it runs does not run on fake tensors. It is then converted with
    zeros for its parameters on meta, and all its parameters go to meta afterwards. `rebuild` is
    called before that: it gives buffers on meta their values.
    """
    try:
        convert(model, plan, example_inputs=inputs, passes=passes, verify=False, loading=True)
    except CaptureError:
        if not any(item.tensor.is_meta for item in tensors_of(model)):
            raise
        if rebuild is not None:
            rebuild()
        _fill_with_zeros(model)
        convert(model, plan, example_inputs=inputs, passes=passes, verify=False, loading=True)
        to_meta(model)


def _fill_with_zeros(model: nn.Module) -> None:
    """Replace parameters on meta by zeros on the CPU; tied ones stay tied."""
    zeros: dict[int, nn.Parameter] = {}
    for item in list(tensors_of(model)):
        tensor = item.tensor
        if item.role == "parameter" and tensor.is_meta:
            if id(tensor) not in zeros:
                empty = torch.zeros_like(tensor, device="cpu")
                zeros[id(tensor)] = nn.Parameter(empty, tensor.requires_grad)
            setattr(item.module, item.key, zeros[id(tensor)])
