"""Router losses and statistics of a converted model, and their part in a Hugging Face loss."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import field, is_dataclass, make_dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from moeify.compat import is_exporting
from moeify.errors import MoeifyError
from moeify.hf.detect import is_hf
from moeify.nn import outer_forward
from moeify.nn.outer_forward import begin_forward, end_forward
from moeify.nn.router import Router
from moeify.nn.router_losses import RouterLosses
from moeify.nn.router_record import read_losses
from moeify.sites.record import routers_of

_NO_LAYER = "this model has no MoE layer: convert it with moeify(model, plan) first"


class LayerStats(TypedDict):
    """Statistics of one MoE layer's last forward.

    Attributes:
        counts: [E] int32, routes per expert before dropping.
        load: [E] float32, the same as fractions of all routes; an even load is 1 / E.
        entropy: Mean entropy of the router's distribution per token, in nats; at most log E.
        dropped: Fraction of the routes that found their expert full.
        tokens: Number of tokens that were routed, padding included.
        masked: Number of tokens that a mask kept out of routing; 0, because no mask reaches the
            routers.
    """

    counts: Tensor
    load: Tensor
    entropy: float
    dropped: float
    tokens: int
    masked: int


def aux_loss(model: nn.Module) -> Tensor:
    """Return the weighted router losses of the model's last forward, to add to the loss.

    Balance loss and z-loss, each times its coefficient in the plan, summed over the MoE layers,
    and over the calls of a layer that ran several times; a layer that did not run adds nothing.
    Read it after each training forward. If parts of a model were called one after the other, their
    losses are added up until they are read. A Hugging Face model that returns a loss in training
    has them added already.

    Args:
        model: A converted model, also compiled or wrapped, or the result of `moeify.export`.

    Returns:
        Scalar tensor with a graph to the routers; zero if no forward has run in this thread.

    Raises:
        MoeifyError: The model has no MoE layer, or its forward ran without a graph (reentrant
            checkpointing), so that the loss would not train the routers.

    Source:
        Switch Transformers (Fedus et al. 2021) eq. 4; ST-MoE (Zoph et al. 2022) eq. 5.
    """
    routers = [router for _, router in live_routers(model)]
    if not routers:
        exported = [m.last_aux_loss for m in model.modules() if isinstance(m, RouterLosses)]
        if exported:
            return torch.zeros(()) if exported[0] is None else exported[0]
        raise MoeifyError(_NO_LAYER)
    losses = read_losses([router.record for router in routers])
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
    """Return the statistics of each MoE layer in the last forward of this thread.

    Args:
        model: A converted model.

    Returns:
        Statistics by layer path; layers that have not run are left out.

    Raises:
        MoeifyError: The model has no MoE layer.
    """
    stats: dict[str, LayerStats] = {}
    routers = list(live_routers(model))
    if not routers:
        raise MoeifyError(_NO_LAYER)
    for name, router in routers:
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
            "masked": 0,
        }
    return stats


def live_routers(model: nn.Module) -> Iterator[tuple[str, Router]]:
    """Yield (layer path, router) of every MoE layer, once each.

    PEFT's `modules_to_save=["router"]` keeps the original router beside the one that trains; only
    the active one is yielded then, under the layer's own path.
    """
    for layer, router in routers_of(model):
        wrapper, _, leaf = layer.rpartition(".")
        if leaf != "modules_to_save":
            wrapper = layer
        around: Any = model.get_submodule(wrapper)
        if not hasattr(around, "original_module"):
            yield layer, router
            continue
        active = [] if around.disable_adapters else list(around.active_adapters)
        runs = [around.modules_to_save[name] for name in active if name in around.modules_to_save]
        if router is (runs[0] if runs else around.original_module):
            yield wrapper.rpartition(".")[0], router


class ForwardWithRouterLosses:
    """Wraps the `forward` of a Hugging Face model and adds the router losses to its loss.

    In training only, so that evaluation losses stay comparable with the dense model's. It is an
    attribute of the model and not a forward hook, because `torch.compile` runs the hooks of the
    outermost module in a separate graph.

    A trainer that passes `num_items_in_batch` expects a sum over the labels, divided by the labels
    of all its micro-batches and ranks. The router losses, a mean, are then weighted by this
    micro-batch's share of the labels, so that their sum is a mean.

    With `output_router_logits=True`, as an argument or in the config, the output has
    `router_logits`, the logits [T, E] of each MoE layer, and `aux_loss`, `moeify.aux_loss(model)`.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shifts = shifts_labels(model)
        # A model that has routers itself returns their logits.
        self.gives_logits = "output_router_logits" in self.__signature__.parameters

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the model's own forward, which trainers inspect."""
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward and add the router losses, and logits if asked for."""
        model = self.model
        wanted = False
        if not self.gives_logits:
            default = getattr(model.config, "output_router_logits", False)
            asked = kwargs.pop("output_router_logits", None)
            wanted = bool(default if asked is None else asked) and not is_exporting()
        training = model.training and not is_exporting()
        outermost = begin_forward(model)  # where `model.forward` is called, past its hooks
        try:
            return self._run(args, kwargs, training, wanted)
        finally:
            if outermost:
                end_forward(model)

    def _run(self, args: Any, kwargs: dict[str, Any], training: bool, wanted: bool) -> Any:
        model = self.model
        records = [router.record for _, router in live_routers(model)] if wanted else []
        for record in records:
            record.keep_logits, record.logits = True, ()
        try:
            output = type(model).forward(model, *args, **kwargs)
            logits = tuple(each for record in records for each in record.logits)
        finally:
            for record in records:
                record.keep_logits, record.logits = False, ()
        if training:
            labels = kwargs.get("labels")
            share = self._share(labels, kwargs)
            output = with_router_losses(model, output, labels is not None, share)
        if wanted:
            output = _with_logits(output, logits, aux_loss(model))
        return output

    def _share(self, labels: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
        """Return this micro-batch's share of the labels; None if the loss is a mean."""
        # Counted as `Trainer` does: a loss that shifts its labels never predicts the first.
        total: Tensor | int | None = kwargs.get("num_items_in_batch")
        shifted: Tensor | None = kwargs.get("shift_labels")
        if total is None or not isinstance(labels if shifted is None else shifted, Tensor):
            return None
        if shifted is None:
            shifted = labels[..., 1:] if self.shifts else labels
        items = shifted.ne(-100).sum().to(torch.float32)
        if not isinstance(total, Tensor):
            return items / max(total, 1)
        return items / total.to(items).flatten()[0].clamp_min(1)  # one entry per replica


def shifts_labels(model: nn.Module) -> bool:
    """Tell whether `Trainer` leaves out the first label of each row when it counts them."""
    losses = sys.modules.get("transformers.loss.loss_utils")
    causal = getattr(losses, "ForCausalLMLoss", None)
    function = getattr(losses, "LOSS_MAPPING", {}).get(getattr(model, "loss_type", None))
    pairs = getattr(model.config, "is_encoder_decoder", False)
    return causal is not None and function is causal and not pairs


def with_router_losses(
    model: nn.Module, output: Any, labelled: bool, share: Tensor | None = None
) -> Any:
    """Return a model's output with the router losses, times `share`, in its loss, if it has one.

    The loss of a tuple is its first element, if the model was given labels.
    """

    def added(loss: Tensor) -> Tensor:
        aux = aux_loss(model).to(loss.device)
        return loss + (aux if share is None else aux * share.to(loss.device)).to(loss.dtype)

    if isinstance(output, tuple):
        if not labelled or not output or not _is_loss(output[0]):
            return output
        return (added(output[0]), *output[1:])
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None or not _is_loss(loss):
        return output
    total = added(loss)
    if isinstance(output, Mapping):
        output["loss"] = total  # type: ignore[index]
    else:
        output.loss = total
    return output


def _with_logits(output: Any, logits: tuple[Tensor, ...], aux: Tensor) -> Any:
    """Return a model's output with the fields `router_logits` and `aux_loss`."""
    if isinstance(output, tuple) or not isinstance(output, Mapping):
        raise MoeifyError(
            "output_router_logits=True needs an output with named fields, not "
            f"{type(output).__name__}: use return_dict=True, or read moeify.router_stats(model)"
        )
    if not is_dataclass(output):
        return {**output, "aux_loss": aux, "router_logits": logits}
    return _named_output(type(output))(**output, aux_loss=aux, router_logits=logits)


@functools.cache
def _subclass(kind: type) -> type:
    known = getattr(kind, "__dataclass_fields__", {})
    names = [name for name in ("aux_loss", "router_logits") if name not in known]
    if not names:
        return kind
    fields = [(name, Any, field(default=None)) for name in names]
    return make_dataclass(f"{kind.__name__}WithRouters", fields, bases=(kind,))


def _named_output(kind: type) -> Any:
    """Return a subclass of an output's class with both fields."""
    return _subclass(kind)


# A compiler calls it once, instead of tracing how a class is made.
torch.compiler.assume_constant_result(_named_output)  # type: ignore[no-untyped-call]


def _is_loss(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def update_router_biases(model: nn.Module) -> None:
    """Move the selection biases of all routers of a model by their pending loads.

    Steps of torch's optimizers do it by themselves. Call this after each step of anything else that
    trains the model's weights, or a copy of them; a second call does nothing.

    Args:
        model: A converted model, also compiled or wrapped.

    Raises:
        MoeifyError: The model has no MoE layer.

    Source:
        Auxiliary-loss-free load balancing (Wang et al. 2024) algorithm 1.
    """
    routers = list(live_routers(model))
    if not routers:
        raise MoeifyError(_NO_LAYER)
    for _, router in routers:
        router.update_bias()


def attach(model: nn.Module) -> None:
    """Let forwards collect router losses, and add them to the loss of a Hugging Face model."""
    outer_forward.attach(model)
    if is_hf(model) and "forward" not in model.__dict__:
        model.__dict__["forward"] = ForwardWithRouterLosses(model)


def detach(model: nn.Module) -> None:
    """Undo `attach`."""
    outer_forward.detach(model)
    if isinstance(model.__dict__.get("forward"), ForwardWithRouterLosses):
        del model.__dict__["forward"]
