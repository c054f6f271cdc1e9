"""Average gradients over ranks, in buckets, while the backward pass runs.

    backward:  ... grad of layer 2 | grad of layer 1 | grad of layer 0 | end
    buckets:             fill      send 0        fill      send 1       wait, write back

An incoming gradient is multiplied by a constant; what has accumulated in `.grad` is then averaged
over a group. The average of averages is the same, so accumulation over several backward passes
stays right, and so does torch's DDP around the model.

Every backward pass that reaches a parameter on one rank must reach one on each rank: it sends
every bucket once, in the same order on all ranks. A missing gradient counts as zero. A backward
pass inside another (reentrant checkpoints) leaves the work to the outer one if that has begun, and
does it at its own end if not.

Source:
    Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeify import compat
from moeify.distributed.dtensor import local_of
from moeify.distributed.gradient_buckets import Bucket, Round
from moeify.errors import DispatchError

__all__ = ["GradientReducer", "Reduction"]

BUCKET_BYTES = 25 << 20  # latency does not count any more, and sending starts early


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """Parameters whose gradients are reduced alike.

    Nothing else may use the process group during a backward pass: what is sent first differs
    between ranks where a gradient is missing on some.
    """

    parameters: Sequence[nn.Parameter]  # of a DTensor, the local shard is reduced
    names: Sequence[str]
    group: str
    size: int  # ranks in the group
    factor: float = 1.0  # what incoming gradients are multiplied by, before the average


class GradientReducer:
    """Reduces gradients in every backward pass, by hooks on the parameters.

    The hooks refer to it weakly: keep it as an attribute of the model. Copied by `copy.deepcopy` or
    pickle together with the model, it hooks the copied parameters.

    Args:
        reductions: In the order of the model, each parameter once. Buckets are filled from the
            end; neighbours with equal groups share them.
        bucket_bytes: Size at which a bucket is full.
    """

    def __init__(self, reductions: Sequence[Reduction], bucket_bytes: int = BUCKET_BYTES) -> None:
        self.reductions = tuple(reductions)
        self.bucket_bytes = bucket_bytes
        self._members = [
            _Member(parameter, name, reduction)
            for reduction in self.reductions
            for parameter, name in zip(reduction.parameters, reduction.names, strict=True)
            if parameter.is_floating_point()
        ]
        assert len({id(m.parameter) for m in self._members}) == len(self._members)
        self._buckets: list[Bucket] = []
        self._places: dict[int, tuple[int, int]] = {}  # member: bucket, place in it
        self._round: Callable[[], Round | None] = lambda: None
        self._paused = 0
        self._lock = threading.Lock()  # each device has a thread in a backward pass
        self._handles: list[Any] = []
        reference = weakref.ref(self)
        for index, (parameter, _, reduction) in enumerate(self._members):
            wanted = parameter.requires_grad
            parameter.requires_grad_(True)  # hooks stay, so that it may be frozen and unfrozen
            if reduction.factor != 1.0:
                scale = partial(_scaled, reduction.factor)
                self._handles.append(parameter.register_hook(scale))  # type: ignore[no-untyped-call]
            if reduction.size > 1:
                hook = partial(_arrived, reference, index)
                handle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
                self._handles.append(handle)
            parameter.requires_grad_(wanted)
        self._state = [_state(member.parameter) for member in self._members]
        self._fill()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.reductions, self.bucket_bytes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Accumulate gradients locally; the next backward pass outside reduces all of them."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def remove(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arrived(self, index: int) -> None:
        if self._paused:
            return
        with self._lock, torch.no_grad():
            current = self._round()
            if current is None or current.closed:
                self._follow()
                current = Round(self._buckets)
                compat.at_end_of_backward(current.send_rest)
                self._round = weakref.ref(current)
            current.take(*self._places[index])

    def _follow(self) -> None:
        """Refill buckets and restore hooks if parameters have changed since the last backward pass.

        Raises:
            DispatchError: A gradient was computed without hooks: `model.to()` replaces the data of
                a DTensor and drops its hooks silently.
        """
        state = [_state(member.parameter) for member in self._members]
        if state == self._state:
            return
        former, self._state = self._state, state
        self._fill()
        unhooked = []
        for (parameter, name, reduction), now, then in zip(
            self._members, state, former, strict=True
        ):
            if now[1:] != then[1:] and isinstance(parameter, DTensor):
                compat.restore_hooks(parameter)
                if reduction.factor != 1.0 and parameter.grad is not None:
                    unhooked.append(name)
        if unhooked:
            raise DispatchError(
                f"{unhooked[0]}: it was moved to another dtype or device after the conversion, and "
                "its gradient was computed without its hooks. They are back now: set gradients "
                "to None and run forward and backward again, or move the model first"
            )

    def _fill(self) -> None:
        """Fill buckets with the parameters that require gradients, from the end."""
        filling: dict[tuple[Any, ...], Bucket] = {}
        last: dict[int, int] = {}
        buckets: list[Bucket] = []
        for index in reversed(range(len(self._members))):
            parameter, name, reduction = self._members[index]
            if not parameter.requires_grad or reduction.size == 1:
                continue
            _, dtype, device = self._state[index]
            key = reduction.group, dtype, device
            if key not in filling:
                filling[key] = Bucket(reduction.group, reduction.size, dtype, device)
                buckets.append(filling[key])
            bucket = filling[key]
            bucket.members.append(index)
            bucket.parameters.append(parameter)
            bucket.names.append(name)
            bucket.sizes.append(local_of(parameter).numel())
            last[id(bucket)] = index
            if sum(bucket.sizes) * dtype.itemsize >= self.bucket_bytes:
                del filling[key]
        buckets.sort(key=lambda bucket: -last[id(bucket)])  # by when they are full
        self._buckets = buckets
        self._places = {
            index: (number, place)
            for number, bucket in enumerate(buckets)
            for place, index in enumerate(bucket.members)
        }


class _Member(NamedTuple):
    parameter: nn.Parameter
    name: str
    reduction: Reduction


_State = tuple[bool, torch.dtype, torch.device]


def _state(parameter: nn.Parameter) -> _State:
    """Return what decides a parameter's bucket and may change."""
    return parameter.requires_grad, parameter.grad_dtype or parameter.dtype, parameter.device


def _scaled(factor: float, grad: Tensor) -> Tensor:
    return grad * factor  # not in place: others may see it


def _arrived(
    reference: Callable[[], GradientReducer | None], index: int, parameter: nn.Parameter
) -> None:
    if (reducer := reference()) is not None:
        reducer._arrived(index)
