"""Clip gradients by their common norm, on whatever meshes they are sharded.

Parameters of one model are on several meshes: dense ones whole or over "dp" or "tp", experts over
"ep" or ("edp", "ep"). The norm of a whole gradient is summed over exactly those mesh dimensions
over which it is sharded; replicas count once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from moeify import compat
from moeify.distributed.dtensor import local_of
from moeify.zero.fsdp2 import settle

__all__ = ["clip_grad_norm_"]


@torch.no_grad()
def clip_grad_norm_(
    model_or_parameters: nn.Module | Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    *,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale all gradients down, in place, so that their common norm is at most `max_norm`.

    Call it after the backward pass, when gradients are reduced, on every rank with the same
    parameters: those that train take part in the same all-reduces, whether or not they have a
    gradient on this rank; those that do not train are ignored.

    Args:
        model_or_parameters: A model, or parameters; plain tensors (the same on all ranks) and
            DTensors of any meshes, also with gradients in CPU memory.
        max_norm: Largest norm that is not scaled.
        norm_type: p of the norm, at least 0; `inf` is the largest element; 0 counts the parameters
            with a gradient other than zero, as torch does.
        error_if_nonfinite: Raise on every rank, before any change, if the norm is not finite.
        foreach: Run one kernel for many tensors; None does so where that is faster.

    Returns:
        The norm before clipping: a plain 0-dim tensor, float32 (float64 if gradients are), the
        same on every rank.

    Raises:
        ValueError: `norm_type` is negative or NaN.
        RuntimeError: The norm is not finite and `error_if_nonfinite` is set.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> (layer(torch.ones(1, 2)) * 10).sum().backward()
        >>> norm = clip_grad_norm_(layer, 1.0)
        >>> round(float(norm), 3), round(float(clip_grad_norm_(layer, 1.0)), 3)
        (17.321, 1.0)
    """
    order = float(norm_type)
    if not order >= 0:
        raise ValueError(f"norm_type: {norm_type} must be at least 0")
    parameters = [p for p in _parameters(model_or_parameters) if p.requires_grad]
    for parameter in parameters:
        _redistribute(parameter)
    grads = [p.grad for p in parameters if p.grad is not None]
    device = grads[0].device if grads else torch.device("cpu")
    wide = any(grad.dtype == torch.float64 for grad in grads)
    powers = [_reduced(members, order, foreach) for members in _groups(parameters)]
    total = _combined([power.to(device) for power in powers], order, device)
    if error_if_nonfinite and not math.isfinite(total.item()):
        raise RuntimeError(
            f"the norm of order {order} of all gradients is {total.item()}, so they cannot be "
            "clipped; look for what overflowed, or pass error_if_nonfinite=False to scale by it"
        )
    factor = torch.clamp(float(max_norm) / (total + 1e-6), max=1.0)
    _scale([local_of(grad) for grad in grads], factor, foreach)
    return total if wide else total.float()


def _parameters(given: nn.Module | Tensor | Iterable[Tensor]) -> list[Tensor]:
    """Return each parameter once, in an order that is the same on all ranks."""
    if isinstance(given, nn.Module):
        settle(given)
        return list(given.parameters())
    if isinstance(given, Tensor):
        return [given]
    return list({id(parameter): parameter for parameter in given}.values())


def _redistribute(parameter: Tensor) -> None:
    """Give a gradient that is a partial sum, or sharded otherwise, its parameter's placements."""
    grad = parameter.grad
    if not isinstance(grad, DTensor) or not isinstance(parameter, DTensor):
        return
    if grad.placements == parameter.placements:
        return
    if _sharded(grad) != _sharded(parameter) or any(p.is_partial() for p in grad.placements):
        parameter.grad = grad.redistribute(placements=parameter.placements)


def _sharded(tensor: Tensor) -> tuple[int, ...]:
    """Return the mesh dimensions over which a tensor is sharded."""
    if not isinstance(tensor, DTensor):
        return ()
    places = enumerate(tensor.placements)
    return tuple(i for i, p in places if not isinstance(p, Replicate) and not p.is_partial())


def _groups(parameters: list[Tensor]) -> list[list[Tensor]]:
    """Group parameters by the mesh dimensions that their norms are summed over."""
    groups: dict[Any, list[Tensor]] = {}
    for parameter in parameters:
        dims = _sharded(parameter)
        key = (parameter.device_mesh, dims) if isinstance(parameter, DTensor) and dims else None
        groups.setdefault(key, []).append(parameter)
    return list(groups.values())


def _reduced(parameters: list[Tensor], order: float, foreach: bool | None) -> Tensor:
    """Return |g|^p, or the largest element, of each parameter's whole gradient: [n] float64."""
    # Not their sum, from which p = 0 could not count the gradients.
    places = [i for i, p in enumerate(parameters) if p.grad is not None]
    local = [local_of(g) for p in parameters if (g := p.grad) is not None]
    sizes = _norms(local, order, foreach)
    first = parameters[0]
    mesh = first.device_mesh if isinstance(first, DTensor) else None
    if mesh is None:
        device = local[0].device if local else torch.device("cpu")
    else:  # where its collectives run; gradients may be in CPU memory
        device = torch.device(mesh.device_type)
    values = torch.zeros(len(parameters), dtype=torch.float64, device=device)
    if sizes:
        found = torch.stack([size.to(device, torch.float64) for size in sizes])
        values[torch.tensor(places, device=device)] = _power(found, order)
    if mesh is None or not (dims := _sharded(first)):
        return values
    # A maximum may lose a NaN: it is sent as a separate flag.
    nans = values.isnan()
    if order == math.inf:
        values = torch.cat([values.masked_fill(nans, 0.0), nans.double()])
    for dim in dims:
        kind = dist.ReduceOp.MAX if order == math.inf else dist.ReduceOp.SUM
        dist.all_reduce(values, op=kind, group=mesh.get_group(dim))
    if order == math.inf:
        values, flags = values.chunk(2)
        values = values.masked_fill(flags > 0, math.nan)
    return values


def _power(norms: Tensor, order: float) -> Tensor:
    return norms if order in (0.0, 1.0, math.inf) else norms**order


def _combined(powers: list[Tensor], order: float, device: torch.device) -> Tensor:
    """Return the norm of everything, [] float64."""
    if not powers:
        return torch.zeros((), dtype=torch.float64, device=device)
    values = torch.cat(powers)
    if order == math.inf:
        return values.max()
    if order == 0:
        return (values != 0).double().sum()
    total = values.sum()
    return total if order == 1 else total ** (1 / order)


def _norms(tensors: list[Tensor], order: float, foreach: bool | None) -> list[Tensor]:
    """Return the norm of each tensor, accumulated in at least float32."""
    norms: list[Tensor | None] = [None] * len(tensors)
    groups: dict[Any, list[int]] = {}
    for place, tensor in enumerate(tensors):
        if tensor.numel() == 0:
            norms[place] = torch.zeros((), device=tensor.device)
        # On a CPU float32 sums are wrong in the third digit for 2e7 elements.
        elif tensor.device.type == "cpu" or foreach is False:
            wide = tensor.device.type == "cpu" or tensor.dtype == torch.float64
            dtype = torch.float64 if wide else torch.float32
            norms[place] = torch.linalg.vector_norm(tensor, order, dtype=dtype)
        else:
            groups.setdefault((tensor.device, tensor.dtype), []).append(place)
    for (_, dtype), places in groups.items():
        sums = torch.float64 if dtype == torch.float64 else torch.float32
        found = compat.foreach_norm([tensors[place] for place in places], order, sums)
        for place, norm in zip(places, found, strict=True):
            norms[place] = norm
    return [norm for norm in norms if norm is not None]


def _scale(tensors: list[Tensor], factor: Tensor, foreach: bool | None) -> None:
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (device, dtype), members in groups.items():
        # In half precision the factor itself would be rounded; a 0-dim factor does not promote.
        local = factor.to(device, torch.float64 if dtype == torch.float64 else torch.float32)
        if foreach is False:
            for member in members:
                member.mul_(local)
        else:
            compat.foreach_mul_(members, local)
