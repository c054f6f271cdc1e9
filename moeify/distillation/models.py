"""What distillation needs of a model: its logits, its router losses, and running it as a teacher.

Shapes: V words.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeify.errors import MoeifyError
from moeify.hf.detect import is_hf
from moeify.nn.router import Router
from moeify.train.losses import aux_loss, shifts_labels


@contextmanager
def evaluating(teacher: nn.Module) -> Iterator[None]:
    """Put a teacher in evaluation, without gradients and statistics, for a while."""
    modes = [module for module in teacher.modules() if module.training]
    for module in modes:
        module.training = False
    try:
        with ExitStack() as stack, torch.no_grad():
            for module in teacher.modules():
                if isinstance(module, Router):
                    stack.enter_context(module.aside())
            yield
    finally:
        for module in modes:
            module.training = True


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile and DDP."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def labels_are_shifted(student: nn.Module) -> bool:
    """Return whether a model's labels are its inputs, one position later."""
    model = unwrapped(student)
    if hasattr(model, "peft_config"):
        model = model.get_base_model()  # type: ignore[operator]
    if not is_hf(model):
        return False
    if getattr(model, "loss_type", None) is None:
        # A name such as GPT-2's does not say; a model that calls its loss_function then gets that
        # of a causal language model from transformers.
        code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
        if "loss_function" in getattr(code, "co_names", ()):
            return not getattr(model.config, "is_encoder_decoder", False)
        raise MoeifyError(
            f"{type(model).__name__} does not say what kind of loss it has: give shift=True if "
            "position t predicts label t + 1, as in a causal language model, else shift=False"
        )
    return shifts_labels(model)


def logits_of(output: Any, who: str) -> Tensor:
    """Return the logits [..., V] in a model's output; `who` returned it, for messages."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple | list) and not hasattr(output, "logits"):
        found = output[0] if output else None
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() < 2 or not found.is_floating_point():
        raise MoeifyError(f"the {who} returned a {type(output).__name__} without logits [..., V]")
    return found


def router_losses(model: nn.Module, output: Any) -> Tensor | None:
    """Return the student's weighted router losses: moeify's, or those of its own routers."""
    if any(isinstance(module, Router) for module in model.modules()):
        return aux_loss(model)
    config = getattr(unwrapped(model), "config", None)
    found = output.get("aux_loss") if isinstance(output, Mapping) else None
    weight = getattr(config, "router_aux_loss_coef", None)
    return found * weight if isinstance(found, Tensor) and weight is not None else None


def inputs_by_name(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a model's inputs by name, positional ones by their position."""
    return {**{str(i): value for i, value in enumerate(args)}, **kwargs}


def to_device(inputs: Any, device: torch.device | None) -> Any:
    """Return inputs with their tensors on a device; None leaves them where they are."""
    from torch.utils._pytree import tree_map_only

    return inputs if device is None else tree_map_only(Tensor, lambda t: t.to(device), inputs)


def shared_vocab(student: Any, teacher: Any) -> int:
    """Return how many words two tokenizers share; refuse different ids for a word."""
    ours, theirs = ({i: w for w, i in t.get_vocab().items()} for t in (student, teacher))
    size: int = min(max(ours), max(theirs)) + 1
    for i in range(size):
        if ours.get(i) != theirs.get(i):
            raise MoeifyError(
                f"the student's tokenizer has {ours.get(i)!r} as word {i} and the teacher's "
                f"{theirs.get(i)!r}: distillation needs one vocabulary"
            )
    return size
