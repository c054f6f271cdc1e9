"""Router losses and statistics of a converted model, and how they reach a Hugging Face loss."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from moeify.compat import in_backward, is_exporting
from moeify.conversion import routers_of
from moeify.errors import MoeifyError
from moeify.hf import is_hf
from moeify.router_losses import RouterLosses


class LayerStats(TypedDict):
    """Statistics of one MoE layer's last forward.

    Attributes:
        counts: [E] int32, routes per expert before dropping.
        load: [E] float32, the same as fractions of all routes; an even load is 1 / E.
        entropy: Mean entropy of the router's distribution per token, in nats; at most log E.
        dropped: Fraction of the routes that found their expert full.
        tokens: Number of tokens.
    """

    counts: Tensor
    load: Tensor
    entropy: float
    dropped: float
    tokens: int


def aux_loss(model: nn.Module) -> Tensor:
    """Return the weighted router losses of the model's last forward, to add to the loss.

    Balance loss and z-loss, each times its coefficient in the plan, summed over the MoE layers.
    A Hugging Face model that returns a loss in training has them added already.

    Args:
        model: A converted model, also compiled or wrapped, or what `moeify.export` made of it.

    Returns:
        Scalar tensor with a graph to the routers; zero if no forward has run.

    Raises:
        MoeifyError: The model has no MoE layer, or its forward ran without a graph (reentrant
            checkpointing), so that the loss could not train the routers.

    Source:
        Switch Transformers (Fedus et al. 2021) eq. 4; ST-MoE (Zoph et al. 2022) eq. 5.
    """
    routers = [router for _, router in routers_of(model)]
    if not routers:
        exported = [m.last_aux_loss for m in model.modules() if isinstance(m, RouterLosses)]
        if exported:
            return torch.zeros(()) if exported[0] is None else exported[0]
        raise MoeifyError("this model has no MoE layer: convert it with moeify(model, plan) first")
    losses = [r.last_aux_loss for r in routers if r.last_aux_loss is not None]
    if not losses:
        weight = routers[0].weight
        return torch.zeros((), dtype=torch.float32, device=weight.device)
    if torch.is_grad_enabled() and model.training and not torch.compiler.is_compiling():
        trains = any(r.weight.requires_grad for r in routers)
        if trains and not any(loss.requires_grad for loss in losses):
            raise MoeifyError(
                "the router losses have no gradient, because the forward ran under no_grad: with "
                "activation checkpointing use use_reentrant=False (Hugging Face: "
                'gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": '
                "False}))"
            )
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss.to(total.device)
    return total


def router_stats(model: nn.Module) -> dict[str, LayerStats]:
    """Return what each MoE layer did in the model's last forward.

    Args:
        model: A converted model.

    Returns:
        Statistics by layer path; layers that have not run are left out.

    Raises:
        MoeifyError: The model has no MoE layer.
    """
    stats: dict[str, LayerStats] = {}
    found = False
    for name, router in routers_of(model):
        found = True
        last = router.last_stats
        if last is None:
            continue
        counts = last["counts"].detach()
        stats[name] = {
            "counts": counts,
            "load": counts.float() / counts.sum().clamp_min(1),
            "entropy": float(last["entropy"]),
            "dropped": float(last["dropped"]),
            "tokens": int(last["tokens"]),
        }
    if not found:
        raise MoeifyError("this model has no MoE layer: convert it with moeify(model, plan) first")
    return stats


class ForwardWithRouterLosses:
    """Stands before a Hugging Face model's `forward`: adds the router losses to its loss.

    In training only, so that losses of an evaluation stay comparable with the dense model's. It is
    an attribute of the model and not a forward hook, because `torch.compile` runs the hooks of the
    outermost module in a graph of their own.

    Args:
        model: The converted model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the model's own forward, which trainers look at."""
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward and add the losses to what it returns."""
        model = self.model
        output = type(model).forward(model, *args, **kwargs)
        if model.training and not is_exporting():
            return with_router_losses(model, output, kwargs.get("labels") is not None)
        return output


def with_router_losses(model: nn.Module, output: Any, labelled: bool) -> Any:
    """Return a model's output with the router losses in its loss, if it has one.

    Args:
        model: The converted model.
        output: A tuple whose first element is the loss if `labelled`, or anything with a `loss`.
        labelled: Whether the model was given labels.
    """
    if isinstance(output, tuple):
        if not labelled or not output or not _is_loss(output[0]):
            return output
        return (output[0] + aux_loss(model).to(output[0].dtype), *output[1:])
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None or not _is_loss(loss):
        return output
    total = loss + aux_loss(model).to(loss.dtype)
    if isinstance(output, Mapping):
        output["loss"] = total  # type: ignore[index]
    else:
        output.loss = total
    return output


def _is_loss(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def update_router_biases(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Forward pre-hook: move the selection biases before a training forward, never in a recompute.

    Source:
        Auxiliary-loss-free load balancing (Wang et al. 2024) algorithm 1.
    """
    if not model.training or in_backward() or is_exporting():
        return
    for _, router in routers_of(model):
        if not router.lift_capacity:
            router.update_bias()


def attach(model: nn.Module) -> None:
    """Let a Hugging Face model add the router losses to its loss, and any model move its biases."""
    if any(router.bias_update > 0 for _, router in routers_of(model)):
        model.register_forward_pre_hook(update_router_biases)
    if is_hf(model) and "forward" not in model.__dict__:
        model.__dict__["forward"] = ForwardWithRouterLosses(model)


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is update_router_biases:
            del model._forward_pre_hooks[key]
    if isinstance(model.__dict__.get("forward"), ForwardWithRouterLosses):
        del model.__dict__["forward"]
