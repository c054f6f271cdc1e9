"""Gradients of all ranks become one: averaged in buckets while the backward pass runs.

    backward:  ... grad of layer 2 | grad of layer 1 | grad of layer 0 | end
    buckets:             fill      send 0        fill      send 1       wait, write back

A parameter's own gradient is multiplied by a constant as it comes in; what has accumulated in
`.grad` is then averaged over a group. Averaging twice is averaging once, so gradients that
accumulate over several backward passes stay right, and so does torch's DDP around the model.

Every backward pass that reaches a parameter on one rank must reach one on each rank: it sends
every bucket once, in one order, the same on all ranks. Gradients that are missing on a rank count
as zero. A backward pass inside another (reentrant checkpoints) leaves the work to the outer one
where that has begun, and else does it at its own end.

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
from moeify.distributed.gradient_buckets import Bucket, Round, local_of
from moeify.errors import DispatchError

__all__ = ["GradientReducer", "Reduction"]

BUCKET_BYTES = 25 << 20
"""Large enough that latency does not count, small enough that sending starts early."""


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """Parameters whose gradients are reduced alike.

    Attributes:
        parameters: Of any shape and dtype; of a DTensor, the local shard is reduced.
        names: One name for each, for messages.
        group: Name of the process group. Nothing else may use this group during a backward pass:
            what is sent first differs between ranks where a gradient is missing on some.
        size: Number of ranks in it.
        factor: Constant by which incoming gradients are multiplied, before they are averaged.
    """

    parameters: Sequence[nn.Parameter]
    names: Sequence[str]
    group: str
    size: int
    factor: float = 1.0


class GradientReducer:
    """Reduces gradients in every backward pass, by hooks on the parameters.

    The hooks hold it weakly: keep it where the model is, for instance as an attribute. A copy by
    `copy.deepcopy` or pickle, together with the model, has hooks on the copied parameters.

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
        itself = weakref.ref(self)
        for index, (parameter, _, reduction) in enumerate(self._members):
            wanted = parameter.requires_grad
            parameter.requires_grad_(True)  # hooks stay, so that it may be frozen and unfrozen
            if reduction.factor != 1.0:
                scale = partial(_scaled, reduction.factor)
                self._handles.append(parameter.register_hook(scale))  # type: ignore[no-untyped-call]
            if reduction.size > 1:
                hook = partial(_arrived, itself, index)
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
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _arrived(self, index: int) -> None:
        """Take a parameter's accumulated gradient."""
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
        """Follow what happened to the parameters since the last backward pass.

        Raises:
            DispatchError: A gradient was computed without hooks. `model.to()` exchanges the
                insides of a DTensor, and its hooks are gone without a word.
        """
        state = [_state(member.parameter) for member in self._members]
        if state == self._state:
            return
        former, self._state = self._state, state
        self._fill()
        late = []
        for (parameter, name, reduction), now, then in zip(
            self._members, state, former, strict=True
        ):
            if now[1:] != then[1:] and isinstance(parameter, DTensor):
                compat.restore_hooks(parameter)
                if reduction.factor != 1.0 and parameter.grad is not None:
                    late.append(name)
        if late:
            raise DispatchError(
                f"{late[0]}: it was moved to another dtype or device after the conversion, and "
                "its gradient was computed without its hooks. They are back now: set gradients "
                "to None and run forward and backward again, or move the model first"
            )

    def _fill(self) -> None:
        """Spread the parameters that want gradients over buckets, from the end."""
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
    """Return what decides about a parameter's bucket, and may change."""
    return parameter.requires_grad, parameter.grad_dtype or parameter.dtype, parameter.device


def _scaled(factor: float, grad: Tensor) -> Tensor:
    return grad * factor  # not in place: others may see it


def _arrived(
    itself: Callable[[], GradientReducer | None], index: int, parameter: nn.Parameter
) -> None:
    if (reducer := itself()) is not None:
        reducer._arrived(index)
