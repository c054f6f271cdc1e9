"""Moves the selection biases of routers once per step of an optimizer.

One hook on all optimizers of torch finds the routers that a step belongs to. Between two steps the
biases stand still: all micro-batches of a step see the same ones, and so does what checkpointing
recomputes in its backward passes.
"""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

log = logging.getLogger("moeify")

_FOREIGN_STEPS = 3
"""Steps of other optimizers, after training forwards, until a warning: enough for a second loss."""


class Balanced(Protocol):
    """What has a selection bias: a router, or the tensors of one in an exported graph."""

    weight: nn.Parameter
    selection_bias: Tensor | None
    pending_counts: Tensor | None
    bias_update: float
    group: str
    where: str


@dataclass(eq=False)
class BalancedGate:
    """A router in an exported graph: its tensors, and the step of its bias."""

    weight: nn.Parameter
    selection_bias: Tensor | None
    pending_counts: Tensor | None
    bias_update: float
    group: str = ""
    where: str = ""


@dataclass
class _Known:
    model: weakref.ref[nn.Module] | None = None  # the outermost module of its last forward
    ran: bool = False  # in training, since the last step of any optimizer
    foreign: int = 0  # steps of optimizers that hold nothing of this model


class Owner(Protocol):
    """A module with selection biases."""

    def balanced(self) -> tuple[Balanced, ...]:
        """Return what has them."""
        ...


_known: weakref.WeakKeyDictionary[Owner, _Known] = weakref.WeakKeyDictionary()


def follow_optimizers(owner: Owner) -> None:
    """Let the biases of a module, while it lives, move with the steps of torch's optimizers."""
    if not _known:
        _register()
    _known[owner] = _Known()


def note_forward(owner: Owner, model: nn.Module) -> None:
    """Remember the model whose training forward runs a module with biases."""
    known = _known.get(owner)
    if known is None:
        return
    known.ran = True
    if known.model is None or known.model() is not model:
        known.model = weakref.ref(model)


@torch.no_grad()
def move_bias(router: Balanced) -> None:
    """Lower the bias of experts with more than the mean pending load, and raise the others'.

    Source:
        Auxiliary-loss-free load balancing (Wang et al. 2024) algorithm 1.
    """
    bias, counts = router.selection_bias, router.pending_counts
    if bias is None or counts is None:
        return
    load = counts.to(torch.float32)
    weight = router.weight
    if not router.group and isinstance(weight, DTensor):
        # FSDP2 around a model that was converted in one process: its ranks hold different tokens.
        for dim in range(weight.device_mesh.ndim):
            dist.all_reduce(load, group=weight.device_mesh.get_group(dim))
    bias.add_((load.mean() - load).sign(), alpha=router.bias_update)
    counts.zero_()


def _register() -> None:
    if not _hook:
        _hook.append(register_optimizer_step_post_hook(_after_step))


_hook: list[Any] = []


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    found = [(each, known) for owner, known in list(_known.items()) for each in owner.balanced()]
    if not found:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for router, known in found:
        if _belongs(router, known, held):
            move_bias(router)
            known.foreign = 0
        elif known.ran and known.foreign <= _FOREIGN_STEPS:
            known.foreign += 1
            if known.foreign == _FOREIGN_STEPS:
                _warn(known, optimizer)
        known.ran = False


def _belongs(router: Balanced, known: _Known, held: set[int]) -> bool:
    """Tell whether an optimizer trains a router, or, if it is frozen, the model around it."""
    if id(router.weight) in held:
        return True
    model = None if known.model is None else known.model()
    if router.weight.requires_grad or model is None:
        return False
    return any(id(parameter) in held for parameter in model.parameters())


def _warn(known: _Known, optimizer: Optimizer) -> None:
    model = None if known.model is None else known.model()
    if model is None or not any(p.requires_grad for p in model.parameters()):
        return
    for other in _known.values():
        if other.model is not None and other.model() is model:
            other.foreign = _FOREIGN_STEPS + 1
    log.warning(
        "bias_update has no effect on this %s, because the optimizer that steps (%s) does not hold "
        "the parameters of the model itself: call moeify.update_router_biases(model) after each of "
        "its steps",
        type(model).__name__,
        type(optimizer).__name__,
    )
