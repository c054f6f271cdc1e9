"""Parameters of which a rank holds a share: DTensors, and their local part.

Experts are `Shard(0)` over the expert ranks; sliced ones also over their hidden width. As DTensors
they carry their layout along, which checkpoints and FSDP2 read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeify import compat

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["is_sharded", "local", "shard_parameter", "whole"]


def local(tensor: Any, sharded: bool) -> Any:
    """Return this rank's part of a DTensor, with its gradient, if the module is `sharded`.

    The module says so, because a compiler cannot ask a parameter for its class.
    """
    return tensor.to_local() if sharded and tensor is not None else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a DTensor, gathered, which every rank of its mesh must ask for; else itself."""
    return compat.full_tensor(tensor) if is_sharded(tensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor."""
    return hasattr(tensor, "to_local")


def shard_parameter(
    part: Tensor,
    mesh: DeviceMesh,
    shape: torch.Size,
    *,
    dim: int | None = None,
    halves: bool = False,
    requires_grad: bool = True,
) -> nn.Parameter:
    """Return a parameter of which this rank holds one part; nothing is sent.

    Args:
        part: This rank's part.
        mesh: Mesh ("ep",), or ("ep", "etp") if `dim` is given.
        shape: Shape of the whole.
        dim: Dimension that is sliced over "etp"; dimension 0 is always sharded over "ep".
        halves: Whether `dim` is two halves (gate and up), each sliced for itself.
        requires_grad: Whether it trains.
    """
    from torch.distributed.tensor import DTensor, Shard

    placements: list[Any] = [Shard(0)] if dim is None else [Shard(0), Shard(dim)]
    if halves and dim is not None:
        whole = compat.sharded_halves(part, mesh, placements, shape, dim)
    else:
        stride = torch.empty(shape, device="meta").stride()
        whole = DTensor.from_local(
            part, mesh, placements, run_check=False, shape=shape, stride=stride
        )
    return nn.Parameter(whole, requires_grad=requires_grad)
