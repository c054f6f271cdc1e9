"""What distillation has to know of a model: its logits, its router losses, how to ask it.

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
def asked(teacher: nn.Module) -> Iterator[None]:
    """Put a teacher in evaluation, without gradients; then all is as it was."""
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


def shifts(student: nn.Module) -> bool:
    """Tell whether a model's labels are its inputs, one position later.

    Raises:
        MoeifyError: A Hugging Face model does not say what kind of loss it has.
    """
    own = unwrapped(student)
    own = own.get_base_model() if hasattr(own, "peft_config") else own  # type: ignore[operator]
    if not is_hf(own):
        return False
    if getattr(own, "loss_type", None) is None:
        # GPT-2's name says nothing; where a model asks for its loss, transformers then gives it
        # that of a causal language model.
        code = getattr(inspect.unwrap(type(own).forward), "__code__", None)
        if "loss_function" in getattr(code, "co_names", ()):
            return not getattr(own.config, "is_encoder_decoder", False)
        raise MoeifyError(
            f"{type(own).__name__} does not say what kind of loss it has: give shift=True if "
            "position t predicts label t + 1, as in a causal language model, else shift=False"
        )
    return shifts_labels(own)


def logits_of(output: Any, who: str) -> Tensor:
    """Return the logits [..., V] in a model's output.

    Raises:
        MoeifyError: There are none.
    """
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
    """Return the student's weighted router losses: ours, or those of a model with routers."""
    if any(isinstance(module, Router) for module in model.modules()):
        return aux_loss(model)
    own: Any = unwrapped(model)
    found = output.get("aux_loss") if isinstance(output, Mapping) else None
    weight = getattr(getattr(own, "config", None), "router_aux_loss_coef", None)
    return found * weight if isinstance(found, Tensor) and weight is not None else None


def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a model's inputs by name, the positional ones by their place."""
    return {**{str(i): value for i, value in enumerate(args)}, **kwargs}


def moved(inputs: Any, device: torch.device | None) -> Any:
    """Return inputs with their tensors on a device."""
    from torch.utils._pytree import tree_map_only

    return inputs if device is None else tree_map_only(Tensor, lambda t: t.to(device), inputs)


def same_words(student: Any, teacher: Any) -> int:
    """Return how many words two tokenizers share.

    Raises:
        MoeifyError: They give a word different ids.
    """
    ours, theirs = ({i: w for w, i in t.get_vocab().items()} for t in (student, teacher))
    size: int = min(max(ours), max(theirs)) + 1
    for i in range(size):
        if ours.get(i) != theirs.get(i):
            raise MoeifyError(
                f"the student's tokenizer has {ours.get(i)!r} as word {i} and the teacher's "
                f"{theirs.get(i)!r}: distillation needs one vocabulary"
            )
    return size


__all__ = [
    "asked",
    "logits_of",
    "moved",
    "named",
    "router_losses",
    "same_words",
    "shifts",
    "unwrapped",
]
