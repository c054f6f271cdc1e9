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
    model: nn.Module,
    built: nn.Module | None,
    plan: Plan | None,
    inputs: ExampleInputs,
    seed: int,
    *,
    name: str,
) -> dict[str, Tensor]:
    """Draw all weights of a model from a seed, and return them by name, on the CPU.

    The model is on meta, and converted if there is a plan; `built` is its dense model as its config
    builds it, None without a config. The global random state stays as it was.
    """
    if plan is not None and plan.init.experts == "models":
        raise UnsupportedModuleError(
            name,
            "`weights: fresh` draws new weights, but `init: {experts: models}` takes them from "
            "checkpoints; use `weights: teacher`",
        )
    with quiet_random_state():
        torch.manual_seed(seed)
        dense = _drawn(model) if built is None else type(built)(copy.deepcopy(built.config))
    # Each parameter has a dtype of its own: a model may keep norms in float32.
    dtypes = {item.name: item.tensor.dtype for item in tensors_of(model)}
    main = next(model.parameters()).dtype
    for item in list(tensors_of(dense)):
        dtype = dtypes.get(item.name, main)
        if item.role == "parameter" and item.tensor.dtype != dtype:
            item.tensor.data = item.tensor.data.to(dtype)
    dense.eval()
    if plan is not None:
        convert(dense, plan, example_inputs=inputs, verify=False)
    return {item.name: item.tensor.detach() for item in tensors_of(dense)}


def _drawn(model: nn.Module) -> nn.Module:
    """Return the dense model behind a model on meta, with weights drawn by its own modules."""
    dense = skeleton(model)
    if ATTRIBUTE in dense.__dict__:
        revert(dense)
    _reset(dense)
    return dense


def _reset(model: nn.Module) -> None:
    made: dict[int, nn.Parameter] = {}  # tied ones stay tied
    for item in list(tensors_of(model)):
        if item.role == "parameter" and item.tensor.is_meta:
            empty = torch.full_like(item.tensor, torch.nan, device="cpu")
            new = made.setdefault(id(item.tensor), nn.Parameter(empty, item.tensor.requires_grad))
            setattr(item.module, item.key, new)
    for module in reversed(list(model.modules())):  # from the inside: containers come last
        for name in ("reset_parameters", "_reset_parameters"):
            if callable(reset := getattr(module, name, None)):
                reset()
                break
    for name, parameter in model.named_parameters():
        if bool(parameter.isnan().any()):
            raise UnsupportedModuleError(
                name, "no module's reset_parameters fills it; use `weights: teacher`"
            )
