"""A model's weights drawn anew, by its own initialisation and by its plan's."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from moeify.capture.capture import ExampleInputs
from moeify.capture.on_meta import quiet_random_state
from moeify.convert.convert_model import convert
from moeify.convert.revert import revert
from moeify.errors import UnsupportedModuleError
from moeify.plan.plan import Plan
from moeify.sites.install import skeleton
from moeify.sites.record import ATTRIBUTE
from moeify.storage.model_state import tensors_of


def draw_again(
    twin: nn.Module,
    built: nn.Module | None,
    plan: Plan | None,
    inputs: ExampleInputs,
    seed: int,
    *,
    like: nn.Module,
) -> dict[str, Tensor]:
    """Draw all weights of a model.

    Args:
        twin: The model on meta; converted if there is a plan.
        built: A dense one that was built from its config; None if it has none.
        plan: What to convert the dense weights by.
        inputs: For the conversion.
        seed: Of everything that is drawn; the global random state stays as it was.
        like: A model that has the dtypes to give, by their main one.

    Returns:
        Every tensor by name, on the CPU. On meta there is nothing to draw: none then.

    Raises:
        UnsupportedModuleError: A parameter is of no module that can reset it, or the plan takes
            experts from trained checkpoints.
    """
    if plan is not None and plan.init.experts == "models":
        raise UnsupportedModuleError(
            type(like).__name__,
            "`weights: fresh` starts from nothing trained, and `init: {experts: models}` from "
            "checkpoints; use `weights: teacher`",
        )
    with quiet_random_state():
        torch.manual_seed(seed)
        dense = _drawn(twin) if built is None else type(built)(copy.deepcopy(built.config))
    # A dtype for each parameter, as the twin has it: a model may keep norms in float32.
    dtypes = {item.name: item.tensor.dtype for item in tensors_of(twin)}
    for item in list(tensors_of(dense)):
        dtype = dtypes.get(item.name, next(iter(twin.parameters())).dtype)
        if item.role == "parameter" and item.tensor.dtype != dtype:
            item.tensor.data = item.tensor.data.to(dtype)
    dense.eval()
    if plan is not None:
        convert(dense, plan, example_inputs=inputs, verify=False)
    return {item.name: item.tensor.detach() for item in tensors_of(dense)}


def _drawn(twin: nn.Module) -> nn.Module:
    """Return the dense model behind a model on meta, with weights drawn by its own modules."""
    dense = skeleton(twin)
    if ATTRIBUTE in dense.__dict__:
        revert(dense)
    _reset(dense)
    return dense


def _reset(model: nn.Module) -> None:
    twins: dict[int, nn.Parameter] = {}
    for item in list(tensors_of(model)):
        if item.role == "parameter" and item.tensor.is_meta:
            empty = torch.full_like(item.tensor, torch.nan, device="cpu")
            twin = twins.setdefault(id(item.tensor), nn.Parameter(empty, item.tensor.requires_grad))
            setattr(item.module, item.key, twin)
    for module in reversed(list(model.modules())):  # from the inside: containers have the last word
        for name in ("reset_parameters", "_reset_parameters"):
            if callable(reset := getattr(module, name, None)):
                reset()
                break
    for name, parameter in model.named_parameters():
        if bool(parameter.isnan().any()):
            raise UnsupportedModuleError(
                name, "no module's reset_parameters fills it; use `weights: teacher`"
            )


__all__ = ["draw_again"]
