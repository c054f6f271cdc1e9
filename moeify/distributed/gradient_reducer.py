"""Average gradients over ranks, in buckets, while the backward pass runs.

    backward:  ... grad of layer 2 | grad of layer 1 | grad of layer 0 | end
    buckets:             fill      send 0        fill      send 1       wait, write back

What has accumulated in `.grad` is averaged over a group. The average of averages is the same, so
accumulation over several backward passes stays right, and so does torch's DDP around the model.
What a gradient is to be multiplied by is in the graph (`moeify.distributed.dtensor.local`).

Every backward pass that reaches a parameter on one rank must reach one on each rank: it sends
every bucket once, in the same order on all ranks. A missing gradient counts as zero. A backward
pass inside another (reentrant checkpoints) leaves the work to the outer one if that has begun, and
does it at its own end if not.

Source:
    Li et al. 2020, "PyTorch Distributed: Experiences on Accelerating Data Parallel Training".
"""

from __future__ import annotations

import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
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
    owners: Sequence[nn.Module]  # the module that holds each, also after it was replaced
    group: str
    size: int  # ranks in the group

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], group: str, size: int) -> Reduction:
        """Return the reduction of these parameters of a model."""
        held = dict(model.named_parameters(remove_duplicate=False))
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        return cls([held[name] for name in names], names, owners, group, size)

    def now(self) -> Reduction:
        """Return the reduction of what is in the places of these parameters now.

        Raises:
            DispatchError: It has another shape or is sharded otherwise.
        """
        places = zip(self.parameters, self.names, self.owners, strict=True)
        return replace(self, parameters=[_current(*place) for place in places])


class GradientReducer:
    """Reduces gradients in every backward pass, by hooks on the parameters.

    Torch drops the hooks of a parameter that it swaps or replaces: `model.to()` does it to
    DTensors, `load_state_dict(assign=True)` to all. They are put back at the next forward pass of a
    module in `watched`, or in the backward pass that the hooks of another parameter notice.

    The hooks refer to it weakly: keep it as an attribute of the model. Copied by `copy.deepcopy` or
    pickle together with the model, it hooks the copied parameters.

    Args:
        reductions: In the order of the model. Buckets are filled from the end; neighbours with
            equal groups share them. A parameter of several names may be listed under each.
        bucket_bytes: Size at which a bucket is full.
        watched: Modules at whose forward passes lost hooks are looked for.
        complete: The reductions list all parameters of `watched`: another that trains is an error.
        link: That of the reducer that this one is a copy of.
    """

    def __init__(
        self,
        reductions: Sequence[Reduction],
        bucket_bytes: int = BUCKET_BYTES,
        watched: Sequence[nn.Module] = (),
        complete: bool = False,
        link: _Link | None = None,
    ) -> None:
        self.reductions = tuple(reductions)
        self.bucket_bytes, self.complete = bucket_bytes, complete
        self._watched = tuple(watched)
        self._known: dict[int, list[_Member]] = {}  # those in a watched module, by its id
        self._listed: list[_Member] = []  # a tied parameter under each of its names
        self._members: list[_Member] = []  # each parameter once
        self._state: list[_State] = []
        self._buckets: list[Bucket] = []
        self._places: dict[int, tuple[int, int]] = {}  # member: bucket, place in it
        self._round: Callable[[], Round | None] = lambda: None
        self._paused = 0
        self._lock = threading.RLock()  # each device has a thread in a backward pass
        self._handles: list[Any] = []
        if link is None:
            link = _Link()
            for module in self._watched:
                module.__dict__[_LINK] = link
                module.register_forward_pre_hook(_before_forward)
                module.register_load_state_dict_post_hook(_after_load)  # type: ignore[no-untyped-call]
        self._link = link
        link.reducer = weakref.ref(self)
        self._hook()

    def __reduce__(self) -> tuple[Any, ...]:
        # When a copy is made the modules may not be whole yet; their hooks are copied with them.
        args = (self.reductions, self.bucket_bytes, self._watched, self.complete, self._link)
        return type(self), args

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Accumulate gradients locally; the next backward pass outside reduces all of them."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1

    def remove(self) -> None:
        """Remove all hooks, and the factors of the gradients."""
        self._unhook()
        self._link.reducer = _none
        for module in self._watched:
            for table in (module._forward_pre_hooks, module._load_state_dict_post_hooks):
                for key, hook in list(table.items()):
                    if hook in (_before_forward, _after_load):
                        del table[key]
            module.__dict__.pop(_LINK, None)
        for reduction in self.reductions:
            for owner in reduction.owners:
                if "gradient_factor" in owner.__dict__:
                    owner.__dict__["gradient_factor"] = 1.0

    def follow(self, module: nn.Module) -> None:
        """Restore what a watched module's parameters have lost, before its forward pass.

        Raises:
            DispatchError: A parameter is sharded otherwise than before, or nothing reduces it.
        """
        with self._lock:
            if id(module) not in self._known:
                self._follow(self._listed)
                self._known[id(module)] = self._within(module)
            self._follow(self._known[id(module)])

    def _arrived(self, index: int) -> None:
        if self._paused:
            return
        with self._lock, torch.no_grad():
            current = self._round()
            if current is None or current.closed:
                self._follow(self._listed)
                current = Round(self._buckets)
                compat.at_end_of_backward(current.send_rest)
                self._round = weakref.ref(current)
            current.take(*self._places[index])

    def _within(self, module: nn.Module) -> list[_Member]:
        """Return the members in a module, after a check that it trains no other parameter."""
        inside = {id(part) for part in module.modules()}
        members = [member for member in self._listed if id(member.owner) in inside]
        held = {id(member.parameter) for member in self._listed}
        complete = self.complete and not compat.inside_ddp()  # which reduces whatever there is
        for name, parameter in module.named_parameters() if complete else ():
            if parameter.requires_grad and id(parameter) not in held:
                raise DispatchError(
                    f"{name}: was added after the conversion, so nothing reduces its gradient over "
                    "the ranks: add it before, or plan `parallel: {gradients: experts}` and wrap "
                    "the model in DistributedDataParallel"
                )
        return members

    def _follow(self, members: Sequence[_Member]) -> None:
        """Hook what is in the places of these members now; refill buckets if that has changed."""
        if any(_held(m.owner, m.name, m.parameter) is not m.parameter for m in members):
            if self._has_fsdp():
                self._leave_to_fsdp()
            self._hook()
            return
        for member in members:
            compat.restore_hooks(member.parameter)
        state = [_state(member.parameter) for member in self._members]
        if state != self._state:
            self._state = state
            self._fill()

    def _leave_to_fsdp(self) -> None:
        """Reduce no longer what `fully_shard` has replaced: FSDP2 averages it over the ranks."""
        kept = []
        for reduction in self.reductions:
            places = zip(reduction.parameters, reduction.names, reduction.owners, strict=True)
            rows = [(p, name, o) for p, name, o in places if _held(o, name, p) is p]
            lost = [p for p in reduction.parameters if all(p is not row[0] for row in rows)]
            if any(isinstance(parameter, DTensor) for parameter in lost):
                raise DispatchError(
                    "`fully_shard` was given experts or slices, which are spread over ranks "
                    "already: pass them as its `ignored_params`, or let the plan shard the model "
                    "(`zero: {stage: 2}` or 3)"
                )
            if rows:
                parameters, names, owners = zip(*rows, strict=True)
                kept.append(replace(reduction, parameters=parameters, names=names, owners=owners))
        self.reductions, self.complete = tuple(kept), False

    def _has_fsdp(self) -> bool:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        modules = (part for module in self._watched for part in module.modules())
        return fsdp is not None and any(isinstance(part, fsdp.FSDPModule) for part in modules)

    def _hook(self) -> None:
        """Hook the parameters that are in the modules now."""
        self._unhook()
        self.reductions = tuple(reduction.now() for reduction in self.reductions)
        self._listed = [
            _Member(*place, reduction)
            for reduction in self.reductions
            for place in zip(reduction.parameters, reduction.names, reduction.owners, strict=True)
            if place[0].is_floating_point()
        ]
        self._members = list({id(m.parameter): m for m in reversed(self._listed)}.values())[::-1]
        self._known.clear()
        reference = weakref.ref(self)
        for index, member in enumerate(self._members):
            if member.reduction.size == 1:
                continue
            parameter: Any = member.parameter
            wanted = parameter.requires_grad
            parameter.requires_grad_(True)  # hooks stay, so that it may be frozen and unfrozen
            hook = partial(_arrived, reference, index)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
            parameter.requires_grad_(wanted)
        self._state = [_state(member.parameter) for member in self._members]
        self._fill()

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _fill(self) -> None:
        """Fill buckets with the parameters that require gradients, from the end."""
        filling: dict[tuple[Any, ...], Bucket] = {}
        last: dict[int, int] = {}
        buckets: list[Bucket] = []
        for index in reversed(range(len(self._members))):
            parameter, name, _, reduction = self._members[index]
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
    owner: nn.Module
    reduction: Reduction


class _Link:
    """Leads from a module to the reducer of its parameters; a copy is set by the copied reducer."""

    def __init__(self) -> None:
        self.reducer: Callable[[], GradientReducer | None] = _none
        self.key = str(next(_numbers))  # a constant in compiled code
        _links[self.key] = self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()


_LINK = "_moeify_reducer"  # attribute of a watched module
_numbers = itertools.count()
_links: weakref.WeakValueDictionary[str, _Link] = weakref.WeakValueDictionary()

_State = tuple[bool, torch.dtype, torch.device]


def _state(parameter: nn.Parameter) -> _State:
    """Return what decides a parameter's bucket and may change."""
    return parameter.requires_grad, parameter.grad_dtype or parameter.dtype, parameter.device


def _none() -> None:
    """Stand for a weak reference that leads nowhere."""


def _held(owner: nn.Module, name: str, former: nn.Parameter) -> nn.Parameter:
    """Return what a module holds now in place of a parameter."""
    # `functional_call` puts other tensors there for a moment; a module that is being copied is
    # still empty.
    found = owner.__dict__.get("_parameters", {}).get(name.rpartition(".")[2])
    return found if isinstance(found, nn.Parameter) else former


def _current(former: nn.Parameter, name: str, owner: nn.Module) -> nn.Parameter:
    found = _held(owner, name, former)
    if found is not former and _layout(found) != _layout(former):
        raise DispatchError(
            f"{name}: was {_layout(former)} at the conversion and is {_layout(found)} now, so "
            "its gradient cannot be reduced as planned: convert the model after that change"
        )
    return found


def _layout(parameter: nn.Parameter) -> str:
    shape = f"of shape {tuple(parameter.shape)}"
    if not isinstance(parameter, DTensor):
        return shape
    names = parameter.device_mesh.mesh_dim_names
    return f"{shape} laid out as {parameter.placements} over {names}"


def _before_forward(module: nn.Module, args: Any) -> None:
    if not torch.is_grad_enabled():
        return
    link: Any = getattr(module, _LINK)
    if torch.compiler.is_compiling():
        _follow_at_compilation(link.key)
    elif (reducer := link.reducer()) is not None:
        reducer.follow(module)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _follow_at_compilation(key: str) -> bool:
    """Follow now, while the compiler traces: the decorator lets it call this."""
    reducer = _links[key].reducer()
    if reducer is not None and reducer._watched:
        reducer.follow(reducer._watched[0])
    return True


def _after_load(module: nn.Module, incompatible: Any) -> None:
    """Follow what was assigned: compiled code does not look again."""
    reducer = getattr(module, _LINK).reducer()
    if reducer is not None:
        reducer.follow(module)


def _arrived(
    reference: Callable[[], GradientReducer | None], index: int, parameter: nn.Parameter
) -> None:
    if (reducer := reference()) is not None:
        reducer._arrived(index)
