"""Every private torch API that moeify touches, in one place, each with the reason.

Tested on torch 2.11 and 2.13.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def in_backward() -> bool:
    """Tell whether the autograd engine is running, that is, an activation is being recomputed.

    Private because torch offers no public way to know that a checkpointed forward runs again.
    Under a compiler the answer is a constant: recomputation is then a matter of the graph.
    """
    if torch.compiler.is_compiling():
        return False
    return bool(torch._C._current_graph_task_id() != -1)


def fake_mode() -> Any:
    """Return a fresh `FakeTensorMode` that accepts real constants.

    Private because torch has no public name for running a model without its memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(mode: Any, tensor: Tensor) -> Tensor:
    """Return a fake twin of `tensor`: same shape, strides, dtype, class; meta becomes CPU.

    Masks and caches read values, which plain `meta` tensors refuse; fakes on a real device do not.
    """
    if tensor.device.type != "meta":
        return cast(Tensor, mode.from_tensor(tensor))
    with mode:
        twin = torch.empty_strided(
            tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device="cpu"
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(twin, requires_grad=tensor.requires_grad)
        return twin


def storage_key(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return what identifies the memory behind `tensor`, fake or real; None where it has none.

    Private because fake tensors have no data pointer; the storage's handle exists for both.
    """
    try:
        handle = tensor.untyped_storage()._cdata
        return handle, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
    except (NotImplementedError, RuntimeError):
        return None


def is_compiled_module(module: nn.Module) -> bool:
    """Tell whether `module` is the wrapper that `torch.compile` returns (a private class)."""
    from torch._dynamo.eval_frame import OptimizedModule

    return isinstance(module, OptimizedModule)


def disable_fused_encoder(layer: nn.Module) -> object | None:
    """Turn off the fused evaluation kernel of torch's own encoder layer.

    That kernel reads `linear1.weight` and bypasses a replaced `linear1`. The layer and the
    encoder around it both ask `activation_relu_or_gelu` first: 0 means "not fusable".

    Returns:
        The former value, to restore, or None where `layer` has no such kernel.
    """
    if not isinstance(layer, nn.TransformerEncoderLayer):
        return None
    former: object = layer.activation_relu_or_gelu
    layer.activation_relu_or_gelu = 0
    return former
