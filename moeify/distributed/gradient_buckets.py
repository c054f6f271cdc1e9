"""Buckets of gradients, and their reduction in one backward pass.

A `Bucket` lists the parameters that are reduced together, a `Round` is one backward pass over all
buckets: it sends each of them once, in their order, and writes the averages back at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeify import compat
from moeify.distributed.dtensor import local_of
from moeify.errors import DispatchError

__all__ = ["Bucket", "Round"]


@dataclass(slots=True, eq=False)
class Bucket:
    """Parameters whose gradients are reduced together."""

    group: str
    size: int
    dtype: torch.dtype
    device: torch.device
    members: list[int] = field(default_factory=list)
    parameters: list[nn.Parameter] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    @property
    def title(self) -> str:
        more = len(self.names) - 3
        return ", ".join(self.names[:3]) + (f" and {more} more" if more > 0 else "")

    @property
    def divisors(self) -> tuple[float, float]:
        """What to divide by before the sum and after it."""
        # Sums of float16 overflow where their mean does not, and divided by everything first they
        # underflow: half goes before. Sums of bfloat16 have the range of float32.
        before = 2 ** ((self.size.bit_length() - 1) // 2) if self.dtype == torch.float16 else 1
        return before, self.size / before

    def resolve(self) -> Any:
        """Return the process group; raise a DispatchError if it is gone or another one."""
        try:
            group = compat.process_group(self.group)
            if group.size() == self.size:
                return group
            problem = f"has {group.size()} ranks instead of {self.size}"
        except LookupError:
            problem = f"of {self.size} ranks does not exist"
        raise DispatchError(
            f"gradient reduction of {self.title}: process group {self.group!r} {problem}; start "
            "torch.distributed with the layout of the conversion, convert the dense model again, "
            "or call `remove()` on its GradientReducer to train without"
        )


class Round:
    """One backward pass; owned by the autograd engine, so one that raises half-way discards it."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        self.task = compat.graph_task()
        self.parcels = [_Parcel(bucket) for bucket in buckets]
        self.next = 0
        self.closed = False

    def take(self, number: int, place: int) -> None:
        """Pack one gradient and send the buckets that are complete."""
        with self._closing_on_error():
            # A nested backward pass may reach its parameters again: they wait for the end.
            self.parcels[number].pack(place, final=compat.graph_task() == self.task)
            self._send(incomplete=False)

    def send_rest(self) -> None:
        """Send incomplete buckets; finish after others (DDP), which may own the gradients."""
        with self._closing_on_error(), torch.no_grad():
            self._send(incomplete=True)
            compat.at_end_of_backward(self.finish)

    def finish(self) -> None:
        """Wait and write the averages back."""
        with self._closing_on_error(), torch.no_grad():
            for parcel in self.parcels:
                parcel.unpack()
        self.closed = True

    def _send(self, *, incomplete: bool) -> None:
        while self.next < len(self.parcels):
            if self.parcels[self.next].waiting and not incomplete:
                return
            self.parcels[self.next].send()
            self.next += 1

    @contextmanager
    def _closing_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.closed = True  # a traceback may keep it alive
            raise


class _Parcel:
    """The flat buffer of a bucket: its gradients, then a flag for each, 1 if there is one."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket
        self.group = bucket.resolve()
        self.ends = list(accumulate(bucket.sizes, initial=0))
        self.packed: set[int] = set()
        self.waiting = len(bucket.parameters)
        self.flat: Tensor | None = None
        self.work: Any = None

    def pack(self, place: int, *, final: bool) -> None:
        """Copy a gradient into the buffer, `final` if no nested backward pass may add to it."""
        # Copied now: DDP may keep it in a buffer that it is about to send.
        grad, name = self.bucket.parameters[place].grad, self.bucket.names[place]
        if self.work is not None:
            raise DispatchError(
                f"{name}: a nested backward pass reached it after its gradient was sent; use "
                "checkpoint(..., use_reentrant=False)"
            )
        assert grad is not None
        if grad.layout != torch.strided:
            raise DispatchError(
                f"{name}: gradients of layout {grad.layout} cannot be reduced; use sparse=False"
            )
        local = local_of(grad)
        self._slot(place).view_as(local).copy_(local)
        self.packed.add(place)
        self.waiting -= final

    def send(self) -> None:
        places = range(len(self.bucket.parameters))
        for place in places:
            if place in self.packed:
                continue
            if self.bucket.parameters[place].grad is None:
                self._slot(place).zero_()
            else:  # from an earlier backward pass
                self.pack(place, final=True)
        flat, flags = self._buffer(), [float(place in self.packed) for place in places]
        if all(flags):
            flat[self.ends[-1] :].fill_(1.0)
        else:
            flat[self.ends[-1] :].copy_(torch.tensor(flags))
        before, _ = self.bucket.divisors
        if before != 1:
            flat.div_(before)
        with self._explained():
            self.work = dist.all_reduce(flat, group=self.group, async_op=True)

    def unpack(self) -> None:
        """Wait and write the averages into the gradients, also into those that are None here."""
        with self._explained():
            self.work.wait()
        flat = self._buffer()
        flat.div_(self.bucket.divisors[1])
        complete = len(self.packed) == len(self.bucket.parameters)
        flags = None if complete else flat[self.ends[-1] :].tolist()  # waits for the device
        for place, parameter in enumerate(self.bucket.parameters):
            if flags is not None and flags[place] == 0:
                continue
            value = self._slot(place)
            if parameter.grad is None:
                parameter.grad = _like(parameter, value)
            else:
                local = local_of(parameter.grad)
                local.copy_(value.view_as(local))

    def _slot(self, place: int) -> Tensor:
        return self._buffer()[self.ends[place] : self.ends[place + 1]]

    def _buffer(self) -> Tensor:
        if self.flat is None:
            length = self.ends[-1] + len(self.bucket.parameters)
            self.flat = torch.empty(length, dtype=self.bucket.dtype, device=self.bucket.device)
        return self.flat

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise DispatchError(
                f"rank {dist.get_rank()}: gradient reduction of {self.bucket.title} over "
                f"{self.bucket.size} ranks failed. Did a rank stop, or run another number of "
                f"backward passes? {error}"
            ) from error


def _like(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """Return a gradient for a parameter that had none."""
    # A clone: a view would keep the buffer alive.
    local = value.view(local_of(parameter).shape).clone()
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
