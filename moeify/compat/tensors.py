"""Private torch APIs about tensors: fake ones, the memory behind them, sums over many at once."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn


def fake_mode() -> Any:
    """Return a fresh `FakeTensorMode` that accepts real constants.

    Private because torch has no public name for running a model without its memory.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def fake_like(mode: Any, tensor: Tensor) -> Tensor:
    """Return a fake copy of `tensor`: same shape, strides, dtype, class; meta becomes CPU.

    Masks and caches read values, which plain `meta` tensors refuse; fakes on a real device do not.
    """
    if tensor.device.type != "meta":
        return cast(Tensor, mode.from_tensor(tensor))
    with mode:
        fake = torch.empty_strided(
            tuple(tensor.shape), tuple(tensor.stride()), dtype=tensor.dtype, device="cpu"
        )
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(fake, requires_grad=tensor.requires_grad)
        return fake


def is_fake(tensor: Tensor) -> bool:
    """Tell whether a tensor is a fake one."""
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Keep fake tensors from logging a traceback where an operator refuses their shapes.

    For runs that may fail, in this thread. Private because the logger has the name of a private
    module.
    """
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    thread = threading.get_ident()

    def is_of_another(record: logging.LogRecord) -> bool:
        return record.thread != thread

    logger.addFilter(is_of_another)
    try:
        yield
    finally:
        logger.removeFilter(is_of_another)


def storage_key(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return an identity of the memory behind `tensor`, fake or real; None where it has none.

    Private because fake tensors have no data pointer; the storage's handle exists for both.
    """
    try:
        handle = tensor.untyped_storage()._cdata
        return handle, tensor.storage_offset(), tuple(tensor.shape), tuple(tensor.stride())
    except (NotImplementedError, RuntimeError):
        return None


def storage_of(tensor: Tensor) -> torch.UntypedStorage | None:
    """Return the memory behind `tensor`, or None where it has none of its own."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def storage_id(storage: torch.UntypedStorage) -> int:
    """Return the identity of a storage, also of a fake tensor's, which has no data pointer."""
    key: int = storage._cdata
    return key


def copy_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    """Return a copy of a storage, unseen by every active mode."""
    with torch._C._DisableTorchDispatch(), torch._C.DisableTorchFunction():
        copy: torch.UntypedStorage = storage.clone()  # type: ignore[no-untyped-call]
        return copy


def version(tensor: Tensor) -> int:
    """Return how often the memory behind a tensor was written to in place, except via `.data`.

    Private because torch keeps the counter for its checks of saved tensors.
    """
    return int(tensor._version)


def foreach_norm(tensors: list[Tensor], order: float, dtype: torch.dtype) -> list[Tensor]:
    """Return the norm of each tensor (of one device and dtype), with few kernels.

    Private by its name only; torch's own `clip_grad_norm_` uses it and always sums in the dtype
    of the gradients.
    """
    return list(torch._foreach_norm(tensors, order, dtype=dtype))


def foreach_mul_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply tensors (of one device and dtype) in place by a 0-dim tensor; see `foreach_norm`."""
    torch._foreach_mul_(tensors, factor)


def assert_async(condition: Tensor, message: str) -> None:
    """Assert inside a compiled graph that a tensor of one boolean is true.

    Private by its name only: the public `torch._check` does not take values of tensors.
    """
    torch._assert_async(condition, message)
