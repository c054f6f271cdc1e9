"""Example inputs of other sizes, to tell what a model computes from their sizes.

The sizes are told by the first tensor: its first dimension is the batch; its second one is the
length where it is `[batch, length]` of integers or `[batch, length, width]`. Other tensors follow
where their dimensions have these sizes. Values repeat, so that ids stay valid.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moeify.capture.torch_calls import tensors_in


class Sizes(NamedTuple):
    """The sizes of example inputs."""

    batch: int
    length: int | None  # None where there is none, as for images and rows

    def __str__(self) -> str:
        if self.length is None:
            return f"a batch of {self.batch}"
        return f"a batch of {self.batch} and length {self.length}"


def sizes_of(inputs: Any) -> Sizes | None:
    """Return the sizes of example inputs, or None where they hold no tensor with a batch."""
    first = next((t for t in tensors_in(inputs) if t.dim()), None)
    if first is None:
        return None
    sequence = first.dim() == 3 or (first.dim() == 2 and not first.is_floating_point())
    return Sizes(first.shape[0], first.shape[1] if sequence else None)


def resized(inputs: Any, sizes: Sizes, new: Sizes) -> Any:
    """Return inputs like these, of which the batch and the length are others."""
    if isinstance(inputs, Tensor):
        return _resized(inputs, sizes, new)
    if isinstance(inputs, Mapping):
        return {key: resized(value, sizes, new) for key, value in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(resized(value, sizes, new) for value in inputs)
    return inputs


def _resized(tensor: Tensor, sizes: Sizes, new: Sizes) -> Tensor:
    shape = tensor.shape
    for dim, size in enumerate(shape):
        width = dim == tensor.dim() - 1 and tensor.is_floating_point() and tensor.dim() != 4
        target = size
        if dim == 0 and size == sizes.batch:
            target = new.batch
        elif size == sizes.length and new.length is not None and not width:
            target = new.length
        if target != size:
            place = torch.arange(target, device=tensor.device) % size
            tensor = tensor.index_select(dim, place)
    return tensor
