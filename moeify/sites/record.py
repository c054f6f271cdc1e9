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
    """One module that was replaced.

    Attributes:
        path: Where it was.
        original: The dense module; after the conversion only its skeleton, on `meta`.
        replacement: What stands there now.
    """

    path: str
    original: nn.Module
    replacement: nn.Module


@dataclass(slots=True)
class ConvertedLayer:
    """One converted layer.

    Attributes:
        layer: Its resolved plan.
        block: Path of the block in the model.
        swaps: The modules that were replaced for it.
        swap_halves: The linear half came first in the dense weights.
        program_params: Names of inner parameters in the dense model.
    """

    layer: LayerPlan
    block: str
    swaps: list[Swap]
    swap_halves: bool = False
    program_params: tuple[str, ...] = ()


Fate = Literal["kept", "moved", "copied"]


@dataclass(slots=True)
class Conversion:
    """The record of one conversion.

    Attributes:
        plan: The user's plan.
        layers: What was converted, in execution order.
        ledger: For every parameter of the dense model, whether it was kept under its name, moved
            (the new name follows) or copied into experts.
        fused: Encoder layers whose fused kernel was switched off, with the former value.
        inputs: Description of the example inputs, enough to make others of the same form.
        parallel: How it lies on its ranks; None if one process did it all.
    """

    plan: Plan
    layers: list[ConvertedLayer]
    ledger: dict[str, tuple[Fate, str]] = field(default_factory=dict)
    fused: dict[str, Any] = field(default_factory=dict)
    inputs: Any = None
    parallel: Any = None


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


def require_one_process(model: nn.Module, what: str) -> None:
    """Refuse what needs a whole model where a rank holds a share of it.

    Raises:
        MoeifyError: Experts or dense layers lie on several ranks.
    """
    record = conversion_of(model)
    if record is None or record.parallel is None:
        return
    layout, zero = record.parallel.layout, record.parallel.zero
    stage = 0 if zero is None else zero.stage
    if layout.expert * layout.tensor > 1 or stage >= 2:
        lies = f"expert {layout.expert}, tensor {layout.tensor}"
        lies += f", ZeRO stage {stage}" if stage >= 2 else ""
        raise MoeifyError(
            f"{what} needs the whole model, and its layers lie on {layout.world} ranks ({lies}): "
            "do it in one process; moeify.save_sharded saves from all ranks"
        )


def routers_of(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Yield (layer name, router) of every MoE layer, in module order."""
    for path, module in model.named_modules():
        if isinstance(module, Router):
            yield path.rpartition(".")[0], module
