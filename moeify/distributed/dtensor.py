"""Parameters of which a rank holds a shard: DTensors, and their local part.

Experts are `Shard(0)` over the expert ranks; sliced ones also over their hidden width. Checkpoints
and FSDP2 read this layout from the DTensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeify import compat

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["from_local", "is_sharded", "local", "local_of", "shard_parameter", "whole"]


def local(tensor: Any, sharded: bool, factor: float = 1.0) -> Any:
    """Return this rank's part of a DTensor, differentiably, if the module is `sharded`.

    Its gradient is multiplied by `factor` first: here, in the graph, because whatever hangs on a
    parameter is lost when torch swaps, casts or replaces it (`model.to()`).
    """
    # Passed in, because a compiler cannot ask a parameter for its class.
    if not sharded or tensor is None:
        return tensor
    part = tensor.to_local()
    return part if factor == 1.0 else _scaled(part, factor)


class _ScaledGradient(torch.autograd.Function):
    """The identity; gradients, of any order, are multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def _scaled(part: Tensor, factor: float) -> Tensor:
    apply: Callable[..., Tensor] = _ScaledGradient.apply
    return apply(part, factor)


def whole(tensor: Tensor) -> Tensor:
    """Return the full value of a DTensor, a collective of its mesh; a plain tensor as it is."""
    return compat.full_tensor(tensor) if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def local_of(tensor: Any) -> Tensor:
    """Return this rank's part of a DTensor; a plain tensor as it is."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return part


def from_local(
    local: Tensor, mesh: DeviceMesh, placements: Sequence[Any], shape: torch.Size
) -> Any:
    """Return a contiguous DTensor of this shape from this rank's part; nothing is communicated."""
    from torch.distributed.tensor import DTensor

    stride, step = [], 1  # as numbers: a compiler cannot run `torch.empty` for this
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=shape, stride=tuple(reversed(stride))
    )


def shard_parameter(
    part: Tensor,
    mesh: DeviceMesh,
    shape: torch.Size,
    *,
    dim: int | None = None,
    halves: bool = False,
    requires_grad: bool = True,
) -> nn.Parameter:
    """Return a parameter of this whole shape of which this rank holds one part; nothing is sent.

    Dimension 0 is sharded over "ep" and `dim`, if given, sliced over "etp"; `halves` slices the two
    halves of `dim` (gate and up) separately.
    """
    from torch.distributed.tensor import Shard

    placements: list[Any] = [Shard(0)] if dim is None else [Shard(0), Shard(dim)]
    if halves and dim is not None:
        made = compat.sharded_halves(part, mesh, placements, shape, dim)
    else:
        made = from_local(part, mesh, placements, shape)
    return nn.Parameter(made, requires_grad=requires_grad)
