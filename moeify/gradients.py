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
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moeify import compat
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
        self._buckets: list[_Bucket] = []
        self._places: dict[int, tuple[int, int]] = {}  # member: bucket, place in it
        self._round: Callable[[], _Round | None] = lambda: None
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
                current = _Round(self._buckets)
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
        filling: dict[tuple[Any, ...], _Bucket] = {}
        last: dict[int, int] = {}
        buckets: list[_Bucket] = []
        for index in reversed(range(len(self._members))):
            parameter, name, reduction = self._members[index]
            if not parameter.requires_grad or reduction.size == 1:
                continue
            _, dtype, device = self._state[index]
            key = reduction.group, dtype, device
            if key not in filling:
                filling[key] = _Bucket(reduction.group, reduction.size, dtype, device)
                buckets.append(filling[key])
            bucket = filling[key]
            bucket.members.append(index)
            bucket.parameters.append(parameter)
            bucket.names.append(name)
            bucket.sizes.append(_local(parameter).numel())
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


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@dataclass(slots=True, eq=False)
class _Bucket:
    """Parameters whose gradients travel together."""

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
        """What to divide by before the sum and after it.

        Sums of bfloat16 have the range of float32. Those of float16 overflow where their mean
        does not, and what is divided by everything first underflows: half goes before.
        """
        before = 2 ** ((self.size.bit_length() - 1) // 2) if self.dtype == torch.float16 else 1
        return before, self.size / before

    def resolve(self) -> Any:
        """Return the process group.

        Raises:
            DispatchError: There is none, or it is another one.
        """
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


class _Round:
    """One backward pass. The engine owns it: one that raises half-way takes it along."""

    def __init__(self, buckets: Sequence[_Bucket]) -> None:
        self.task = compat.graph_task()
        self.parcels = [_Parcel(bucket) for bucket in buckets]
        self.next = 0
        self.closed = False

    def take(self, number: int, place: int) -> None:
        """Take one gradient, and send what is complete."""
        with self._closing_on_error():
            # A nested backward pass may reach its parameters again: they wait for the end.
            self.parcels[number].pack(place, final=compat.graph_task() == self.task)
            self._send(incomplete=False)

    def send_rest(self) -> None:
        """Send what is incomplete; then let others (DDP) finish, which may own the gradients."""
        with self._closing_on_error(), torch.no_grad():
            self._send(incomplete=True)
            compat.at_end_of_backward(self.finish)

    def finish(self) -> None:
        """Wait, and write the averages back."""
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
    """A bucket's gradients, one after another, then a flag for each: is there any?"""

    def __init__(self, bucket: _Bucket) -> None:
        self.bucket = bucket
        self.group = bucket.resolve()
        self.ends = list(accumulate(bucket.sizes, initial=0))
        self.packed: set[int] = set()
        self.waiting = len(bucket.parameters)
        self.flat: Tensor | None = None
        self.work: Any = None

    def pack(self, place: int, *, final: bool) -> None:
        """Copy a gradient, now: DDP may keep it in a buffer that it is about to send."""
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
        local = _local(grad)
        self._slot(place).view_as(local).copy_(local)
        self.packed.add(place)
        self.waiting -= final

    def send(self) -> None:
        """Start the sum over all ranks."""
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
        """Wait, and write the averages into the gradients; make those that only others have."""
        with self._explained():
            self.work.wait()
        flat = self._buffer()
        flat.div_(self.bucket.divisors[1])
        ours = len(self.packed) == len(self.bucket.parameters)
        flags = None if ours else flat[self.ends[-1] :].tolist()  # waits for the device
        for place, parameter in enumerate(self.bucket.parameters):
            if flags is not None and flags[place] == 0:
                continue
            value = self._slot(place)
            if parameter.grad is None:
                parameter.grad = _like(parameter, value)
            else:
                local = _local(parameter.grad)
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
    local = value.view(_local(parameter).shape).clone()  # not a view, which keeps the buffer alive
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
