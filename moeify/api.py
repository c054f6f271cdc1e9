"""The public doors: convert a model, revert it, load a saved one, apply a plan to one.

Nothing below imports this module: what loads a model calls `convert`, and a door attaches what a
model in a user's hands needs, `moeify.formats.save_hook`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from moeify.capture.capture import ExampleInputs
from moeify.checkpoint import single
from moeify.convert.convert_model import convert
from moeify.convert.pipeline import resolve_on
from moeify.convert.revert import revert
from moeify.formats.save_hook import guard, unguard
from moeify.passes.infra.base import Pass
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.plan import Plan
from moeify.sites.discovery import discover
from moeify.sites.record import is_spread
from moeify.tensor_parallel.derive import derive

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

    The model is run on fake tensors to find its MLPs by dataflow, also at other sizes and in
    training mode; the plan chooses among them; each chosen one becomes a block that is itself a
    `torch.fx.GraphModule`; the result is compared with the dense model. After any error the model
    is exactly the dense one again.

    Args:
        model: Any `nn.Module`, not compiled, sharded or wrapped yet. On `meta` it stays on `meta`.
        plan: A `Plan`, a dict, the name of a preset such as "pr-moe", or a path to YAML or JSON.
        example_inputs: A dict of keyword arguments, a tuple of positional ones, or a tensor; made
            from the config of a Hugging Face model if None.
        mesh: Your own DeviceMesh with the dimensions "dp" and "tp", in a world of several ranks;
            made from the plan if None.
        passes: Your own graph passes. Each goes right before `lower-kernels`, unless its facts ask
            for another place among moeify's.
        verify: Run the dense and the converted model on the example inputs and compare outputs, and
            gradients by every dense weight.

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
    convert(model, plan, example_inputs=example_inputs, mesh=mesh, passes=passes, verify=verify)
    guard(model)
    if hasattr(model, "save_pretrained") and is_spread(model):
        with contextlib.suppress(ImportError):  # without accelerate there is no Trainer
            from moeify.formats.trainer_checkpoint import attach

            attach(model)
    return model


def demoeify(model: Model) -> Model:
    """Turn a converted model back into the dense one, in place.

    Exact, bit for bit, if nothing has been trained and the experts are copies (`init: copy`, or
    `granular` with a power of two; other granularities scale by a number that rounds). Where
    experts differ, their weights are averaged, the dense branch of a residual block is mixed in
    with the shares it starts with, and a warning is logged: such a step changes what the model
    computes. Routers, coefficients and what your own passes added to the blocks are dropped.

    The dense MLPs follow the device, dtype, training flag and hooks of the blocks they replace.
    Their parameters are new objects (unless a residual block still held the dense ones, and they
    are what comes out): make a new optimizer afterwards.

    Args:
        model: A model that `moeify` converted, this very object. On `meta` it stays on `meta`.

    Returns:
        The same object.

    Raises:
        MoeifyError: The model was not converted.
        UnsupportedModuleError: A block was replaced or sharded, or has learned something that the
            dense module has no place for. The model is then unchanged.

    Source:
        Averaging experts: model soups (Wortsman et al. 2022).

    Example:
        >>> from moeify import moeify
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> model, x = nn.Sequential(mlp, nn.LayerNorm(8)), torch.randn(4, 8)
        >>> before = model(x)
        >>> plan = {"layers": [{"select": "all", "experts": 4}]}
        >>> torch.equal(demoeify(moeify(model, plan, example_inputs=x))(x), before)
        True
    """
    revert(model)
    unguard(model)
    return model


def load(
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    passes: Sequence[Pass] = (),
    verify: bool = True,
) -> nn.Module:
    """Load a saved model, in any process, without the dense weights.

    Args:
        directory: What `save` wrote.
        device: Where the tensors go; "meta" reads none, for planning.
        dtype: Floating-point dtype to cast parameters and buffers to; as saved if None. The
            buffers of routers keep theirs.
        model: For a model that is not of transformers: an instance of its dense class, as it was
            before the conversion. Its weights do not matter and may be on meta; it is converted
            in place and returned.
        passes: Your own graph passes with which the model was converted.
        verify: Compare every file with its SHA-256.

    Returns:
        The converted model, in the mode it was saved in, which gives the same outputs bit for bit.

    Raises:
        CheckpointError: The folder is incomplete or damaged, or does not fit the model. A model
            that was passed is then as it was.
        ValueError: `dtype` is not a floating-point dtype.
    """
    loaded = single.load(
        directory, device=device, dtype=dtype, model=model, passes=passes, verify=verify
    )
    guard(loaded)
    return loaded


def resolve_plan(plan: Plan, model: nn.Module, example_inputs: Any = None) -> ResolvedPlan:
    """Apply a plan to a model, changing nothing: the body of `Plan.resolve`."""
    found = discover(model, example_inputs)
    resolved = resolve_on(plan, found)
    if plan.parallel.tensor == 1:
        return resolved
    slices = derive(
        found, resolved, plan.parallel.tensor, model=model, example_inputs=example_inputs
    )
    return dataclasses.replace(resolved, notes=tuple(slices.lines()))


__all__ = ["demoeify", "load", "moeify", "resolve_plan"]
