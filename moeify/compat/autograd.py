"""Private torch APIs about derivatives: how an op gets them, and the state of a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def in_backward() -> bool:
    """Tell whether the autograd engine is running, that is, an activation is being recomputed.

    Private because torch offers no public way to know that a checkpointed forward runs again.
    Under a compiler the answer is a constant: recomputation is then a matter of the graph.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def graph_task() -> int:
    """Return the number of the current backward pass, -1 outside of one.

    A backward pass inside another has its own number. Private like `in_backward`.
    """
    return int(torch._C._current_graph_task_id())


def at_end_of_backward(callback: Callable[[], None]) -> None:
    """Let the autograd engine call `callback` once when the current backward pass ends.

    The engine drops it uncalled when that pass raises. Private because torch has no public hook
    for the end of a backward pass; its own DDP and FSDP use this.
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def node_number() -> int | None:
    """Return the number of the autograd node that is running, or None outside of a backward pass.

    Nodes are numbered in the order of the forward pass; those that accumulate gradients share a
    huge number. Private because torch shows it to its own tracers only.
    """
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def next_node_number() -> int:
    """Return the number that the next autograd node of this thread will have."""
    return int(torch._C._autograd._get_sequence_nr())


def restore_hooks(parameter: nn.Parameter) -> None:
    """Make a parameter's hooks work again after `torch.utils.swap_tensors`.

    `model.to()` uses it for a DTensor: the engine then no longer knows the hooks, which Python
    still lists. Private because the lists are; assigning one tells the engine.
    """
    parameter._backward_hooks = parameter._backward_hooks
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks


def differentiated_by_formula(args: Sequence[Any]) -> bool:
    """Tell whether a call has derivatives that `autograd.Function` does not give.

    That is inside a transform of `torch.func`, and for arguments with a tangent (forward mode).
    Private because torch tells neither publicly: its own `autograd.Function.apply` asks the first,
    and the level of forward mode has no public name.
    """
    if torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level < 0:
        return False
    tensors = (arg for arg in args if isinstance(arg, Tensor))
    return any(_tangent(tensor) is not None for tensor in tensors)


def _tangent(tensor: Tensor) -> Tensor | None:
    unpack: Callable[[Tensor], Any] = forward_ad.unpack_dual
    tangent: Tensor | None = unpack(tensor).tangent
    return tangent


def any_requires_grad(args: Sequence[Any]) -> bool:
    """Tell whether autograd has to record a call with these arguments.

    Private because only torch's own loop over arguments is fast.
    """
    return torch.is_grad_enabled() and bool(torch._C._any_requires_grad(*args))


def below_autograd(op: Any, keys: Any, args: Sequence[Any]) -> Any:
    """Run an op's implementation from inside its kernel for autograd.

    Private because `torch.library` wraps it in a class of its own, which refuses `torch.func` and
    leaves forward mode without a tangent.
    """
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *args)


def known_values(tensor: Tensor) -> list[int] | None:
    """Return the values of a tensor of integers, or None where they are not known.

    They are not while a graph is traced, nor inside `vmap`. Private because torch has no public
    name for "fake, whatever it is wrapped in".
    """
    from torch._subclasses.fake_tensor import is_fake

    if is_fake(tensor) or tensor.is_meta:
        return None
    try:
        values: list[int] = tensor.tolist()
    except RuntimeError:  # a batched tensor, or one that a tracer follows
        return None
    return values
