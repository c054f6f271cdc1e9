"""Private torch APIs about the backward pass: whether it runs, where it is, when it ends."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


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
