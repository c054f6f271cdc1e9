"""What a conversion leaves on the model: the plan, what was swapped, and where each tensor went.

The record lives in one attribute of the model, travels with `deepcopy` and `torch.save`, and is
what `demoeify`, `save` and the statistics read.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx, nn

from moeify import compat
from moeify.block import Tap, TapReader
from moeify.discovery import FoundSite
from moeify.errors import MoeifyError, UnsupportedModuleError
from moeify.layer_plan import LayerPlan
from moeify.plan import Plan
from moeify.router import Router

ATTRIBUTE = "_moeify_conversion"

HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


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


class Installer:
    """Puts blocks into the model and can take all of them out again.

    Args:
        model: The user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fused: dict[str, Any] = {}
        self._done: list[tuple[nn.Module, str, nn.Module]] = []

    def install(
        self, layer: LayerPlan, found: FoundSite | None, path: str, block: fx.GraphModule
    ) -> list[Swap]:
        """Put one block in place: swap a module (T1), or tap its input (T2).

        Raises:
            UnsupportedModuleError: The module does more than the plan knows of.
        """
        if found is None or found.placement.install == "T1":
            return [self._swap(path, block, keep_hooks=found is not None)]
        region, placement = found.region, found.placement
        self._unfuse(placement.block)
        swaps, first = [], None
        for up, where in zip(region.ups, placement.taps, strict=True):
            width = up.out_features
            if region.program.narrow:
                width = min(width, region.program.narrow)
            tap = Tap(width, up.channel)
            first = first or tap
            swaps.append(self._swap(where, tap))
        assert first is not None
        _read_tap(block, first)
        swaps.append(self._swap(placement.block, block))
        return swaps

    def undo(self) -> None:
        """Put every original module back."""
        for parent, key, original in reversed(self._done):
            parent._modules[key] = original
        self._done.clear()
        for path, value in self.fused.items():
            compat.restore_fused_encoder(self.model.get_submodule(path), value)
        self.fused.clear()

    def _swap(self, path: str, new: nn.Module, *, keep_hooks: bool = False) -> Swap:
        original = self.model.get_submodule(path)
        if "forward" in original.__dict__:
            raise UnsupportedModuleError(path, "its forward is patched; remove the patch first")
        if keep_hooks:
            for table in HOOK_TABLES:
                new.__dict__[table] = original.__dict__[table]
        new.train(original.training)
        for parent in list(self.model.modules()):  # a shared module stands in several places
            for key, child in parent._modules.items():
                if child is original:
                    parent._modules[key] = new
                    self._done.append((parent, key, original))
        return Swap(path, original, new)

    def _unfuse(self, path: str) -> None:
        parts = path.split(".")
        for depth in range(len(parts)):
            around = ".".join(parts[:depth])
            former = compat.disable_fused_encoder(self.model.get_submodule(around))
            if former is not None:
                self.fused.setdefault(around, former)


def _read_tap(block: fx.GraphModule, tap: Tap) -> None:
    """Make the block read the tap's input instead of its own argument."""
    block.add_submodule("tap_reader", TapReader(tap))
    placeholder = next(node for node in block.graph.nodes if node.op == "placeholder")
    users = list(placeholder.users)
    with block.graph.inserting_after(placeholder):
        read = block.graph.call_module("tap_reader", (placeholder,))
    read._rename("tapped")
    for user in users:
        user.replace_input_with(placeholder, read)
    block.graph.lint()
    block.recompile()


def skeleton(module: nn.Module) -> nn.Module:
    """Return a copy of a module whose parameters and buffers are on `meta`."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        twin = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(twin, requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # it holds what cannot be copied, such as a scripted function
        return _share(module, memo)


def _share(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module's tables, with parameters from `memo`; share all its other attributes."""
    twin = copy.copy(module)
    twin._parameters = {
        k: None if p is None else memo[id(p)] for k, p in module._parameters.items()
    }
    twin._buffers = dict(module._buffers)
    twin._modules = {
        k: None if child is None else _share(child, memo) for k, child in module._modules.items()
    }
    return twin


def make_ledger(
    before: dict[str, nn.Parameter], model: nn.Module, layers: Sequence[ConvertedLayer]
) -> dict[str, tuple[Fate, str]]:
    """Say for each parameter of the dense model where it is now.

    Args:
        before: The dense model's parameters by every name they had.
        model: The converted model.
        layers: What was converted.

    Returns:
        Name to (fate, new name or block).

    Raises:
        MoeifyError: A tensor of the dense model is nowhere; the message names it.
    """
    now: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        now.setdefault(id(parameter), []).append(name)
    copied: dict[int, str] = {}  # by identity: a shared module has several names
    for converted in layers:
        site = converted.layer.site
        linears = (*site.up, site.down)
        names = [n for p in linears for n in (p.weight, p.bias) if n is not None]
        copied |= {id(before[name]): converted.block for name in (*names, *site.inner)}
    ledger: dict[str, tuple[Fate, str]] = {}
    for name, parameter in before.items():
        places = now.get(id(parameter), [])
        if name in places:
            ledger[name] = ("kept", name)
        elif places:
            ledger[name] = ("moved", places[0])
        elif id(parameter) in copied:
            ledger[name] = ("copied", copied[id(parameter)])
        else:
            raise MoeifyError(f"{name} would be lost: it is in no MoE block and not in the model")
    return ledger
