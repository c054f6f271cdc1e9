"""Router losses and statistics of a converted model, and how they reach a Hugging Face loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from moeify.conversion import routers_of
from moeify.errors import MoeifyError


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
        model: A converted model, also compiled or wrapped.

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


def add_router_losses(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Forward hook: add the router losses to the loss that the model returns, in training.

    Losses of an evaluation stay comparable with the dense model's.
    """
    if not module.training:
        return None
    if isinstance(output, tuple):
        if kwargs.get("labels") is None or not output or not _is_loss(output[0]):
            return None
        return (output[0] + aux_loss(module).to(output[0].dtype), *output[1:])
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not _is_loss(loss):
        return None
    total = loss + aux_loss(module).to(loss.dtype)
    if isinstance(output, Mapping):
        output["loss"] = total  # type: ignore[index]
    else:
        output.loss = total
    return output


def _is_loss(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def attach(model: nn.Module) -> None:
    """Add the hook to a model, once."""
    if add_router_losses not in model._forward_hooks.values():
        model.register_forward_hook(add_router_losses, with_kwargs=True)


def detach(model: nn.Module) -> None:
    """Remove the hook."""
    for key, hook in list(model._forward_hooks.items()):
        if hook is add_router_losses:
            del model._forward_hooks[key]
            model._forward_hooks_with_kwargs.pop(key, None)
