"""Replace dense modules by MoE blocks, and undo it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from moeify import compat
from moeify.errors import MoeifyError, UnsupportedModuleError
from moeify.nn.tap import Slot, Tap, TapReader, TapScope
from moeify.nn.watch import MoEBlock, Watched
from moeify.sites.discovery import FoundSite
from moeify.sites.record import ConvertedLayer, Fate, Swap
from moeify.sites.watched import is_plain

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


class Installer:
    """Put blocks into the user's model; `undo` takes all of them out again."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.fused: dict[str, Any] = {}
        self._done: list[tuple[nn.Module, str, nn.Module]] = []
        self._scoped: list[nn.Module] = []

    def install(self, found: FoundSite | None, path: str, block: fx.GraphModule) -> list[Swap]:
        """Swap the MLP's module for a block, or tap its input and swap its last projection."""
        if found is None or found.placement.install == "module":
            if found is not None and isinstance(block, MoEBlock):
                block.fix(path, [read.name for read in found.watched])
            return [self._swap(path, block, keep_hooks=found is not None)]
        region, placement = found.region, found.placement
        self._unfuse(placement.block)
        slots = [Slot(where, placement.block) for where in placement.taps]
        swaps = []
        for up, where, slot in zip(region.ups, placement.taps, slots, strict=True):
            width = up.out_features
            if region.program.narrow:
                width = min(width, region.program.narrow)
            swaps.append(self._swap(where, Tap(slot, width, up.channel)))
        watched = [
            Watched(
                read.path,
                self.model.get_submodule(read.path),
                read.name,
                read.value,
                is_plain(read),
            )
            for read in found.watched
        ]
        _read_taps(block, slots, watched)
        swaps.append(self._swap(placement.block, block))
        for path in placement.around:
            around = self.model.get_submodule(path)
            TapScope(slots).attach(around)
            self._scoped.append(around)
        return swaps

    def undo(self) -> None:
        """Put every original module back."""
        for parent, key, original in reversed(self._done):
            parent._modules[key] = original
        self._done.clear()
        while self._scoped:
            TapScope.detach(self._scoped.pop())
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
        for parent in list(self.model.modules()):  # a shared module has several parents
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


def _read_taps(block: fx.GraphModule, slots: Sequence[Slot], watched: Sequence[Watched]) -> None:
    """Make the block read its taps' input instead of its own argument."""
    block.add_submodule("tap_reader", TapReader(slots, watched))
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
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
    try:
        return copy.deepcopy(module, memo)
    except Exception:  # it holds what cannot be copied, such as a scripted function
        return _share(module, memo)


def _share(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy a module's tables, with parameters from `memo`; share all its other attributes."""
    copied = copy.copy(module)
    copied._parameters = {
        k: None if p is None else memo[id(p)] for k, p in module._parameters.items()
    }
    copied._buffers = dict(module._buffers)
    copied._modules = {
        k: None if child is None else _share(child, memo) for k, child in module._modules.items()
    }
    return copied


def make_ledger(
    before: dict[str, nn.Parameter], model: nn.Module, layers: Sequence[ConvertedLayer]
) -> dict[str, tuple[Fate, str]]:
    """Return (fate, new name or block) of each parameter of the dense model.

    `before` has the dense model's parameters by every name they had.

    Raises:
        MoeifyError: A parameter of the dense model is nowhere; the message names it.
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
