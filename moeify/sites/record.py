"""What a conversion leaves on the model: the plan, what was swapped, and where each tensor went.

The record lives in one attribute of the model, travels with `deepcopy` and `torch.save`, and is
what `demoeify`, `save` and the statistics read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from moeify.errors import MoeifyError
from moeify.nn.router import Router
from moeify.plan.layer_plan import LayerPlan
from moeify.plan.plan import Plan

ATTRIBUTE = "_moeify_conversion"


@dataclass(slots=True)
class Swap:
    """One module that was replaced."""

    path: str
    original: nn.Module  # after the conversion only its skeleton, on `meta`
    replacement: nn.Module


@dataclass(slots=True)
class ConvertedLayer:
    """One converted layer."""

    layer: LayerPlan
    block: str  # path of the block in the model
    swaps: list[Swap]
    swap_halves: bool = False  # the linear half came first in the dense weights
    program_params: tuple[str, ...] = ()  # names of inner parameters in the dense model


Fate = Literal["kept", "moved", "copied"]


@dataclass(slots=True)
class Conversion:
    """The record of one conversion."""

    plan: Plan
    layers: list[ConvertedLayer]  # in execution order
    # By parameter of the dense model: kept or moved under the name that follows, or copied into
    # the experts of the block that follows.
    ledger: dict[str, tuple[Fate, str]] = field(default_factory=dict)
    fused: dict[str, Any] = field(default_factory=dict)  # fused encoders: their former attributes
    inputs: Any = None  # description of the example inputs
    parallel: Any = None  # layout on its ranks; None in one process


def conversion_of(model: nn.Module) -> Conversion | None:
    """Return the record of a converted model (also inside a wrapper's `module`), or None."""
    for module in (model, *model.modules()):
        found = module.__dict__.get(ATTRIBUTE)
        if isinstance(found, Conversion):
            return found
    return None


def require_conversion(model: nn.Module) -> Conversion:
    """Return the record of a converted model.

    Raises:
        MoeifyError: The model has not been converted.
    """
    found = model.__dict__.get(ATTRIBUTE)
    if not isinstance(found, Conversion):
        raise MoeifyError(
            f"this {type(model).__name__} was not converted by moeify: call moeify(model, plan) "
            "first, on this very object"
        )
    return found


def is_spread(model: nn.Module) -> bool:
    """Tell whether each rank holds only a part of a model."""
    record = conversion_of(model)
    if record is None or record.parallel is None:
        return False
    layout, zero = record.parallel.layout, record.parallel.zero
    return layout.expert * layout.tensor > 1 or (zero is not None and zero.stage >= 2)


def require_one_process(model: nn.Module, what: str) -> None:
    """Refuse what needs the whole model where each rank holds a part of it.

    Raises:
        MoeifyError: Experts or dense layers are sharded over several ranks.
    """
    record = conversion_of(model)
    if record is None or record.parallel is None:
        return
    layout, zero = record.parallel.layout, record.parallel.zero
    stage = 0 if zero is None else zero.stage
    if is_spread(model):
        axes = f"expert {layout.expert}, tensor {layout.tensor}"
        axes += f", ZeRO stage {stage}" if stage >= 2 else ""
        raise MoeifyError(
            f"{what} needs the whole model, which is sharded over {layout.world} ranks ({axes}): "
            "do it in one process; moeify.save_sharded saves from all ranks"
        )


def routers_of(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Yield (layer name, router) of every MoE layer, in module order."""
    for path, module in model.named_modules():
        if isinstance(module, Router):
            yield path.rpartition(".")[0], module
