"""Count the collectives that some code issues, in a simulated world.

The `fake` process group provides every group of a world of any size on one machine; its collectives
do nothing. A dispatch mode sees each of them below autograd, forward and backward, whoever issued
it: functional collectives in a graph, `torch.distributed`, or a DTensor.

A collective counts as if each rank sent its part to each other rank of the group, and an
all-reduce as a reduce-scatter and an all-gather. Rings and trees send the same bytes in other
steps.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import nn

from moeify import compat
from moeify.capture.torch_calls import tensors_in
from moeify.errors import MoeifyError

__all__ = ["Call", "Counter", "count", "fake_world"]

_KINDS = {
    "all_to_all": "all_to_all_single alltoall_base_ alltoall_ shard_dim_alltoall",
    "all_gather": "all_gather_into_tensor all_gather_into_tensor_out "
    "all_gather_into_tensor_coalesced _allgather_base_ allgather_ allgather_coalesced_ "
    "allgather_into_tensor_coalesced_",
    "reduce_scatter": "reduce_scatter_tensor reduce_scatter_tensor_out "
    "reduce_scatter_tensor_coalesced _reduce_scatter_base_ reduce_scatter_ "
    "reduce_scatter_tensor_coalesced_",
    "all_reduce": "all_reduce all_reduce_ all_reduce_coalesced all_reduce_coalesced_ "
    "allreduce_ allreduce_coalesced_",
    "broadcast": "broadcast broadcast_",
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_SPACES = ("_c10d_functional", "c10d", "_dtensor")
_INPUTS = "input inputs input_tensor input_tensors input_list tensors".split()
_GROUPS = "group_name process_group".split()


@dataclass(frozen=True, slots=True)
class Call:
    """One collective, as rank 0 issued it."""

    kind: str  # a key of `_KINDS`
    ranks: tuple[int, ...]  # the group
    payload: int  # bytes of the input tensors
    per_peer: float  # bytes sent to each other rank
    phase: str = "forward"  # or "backward", "gradients"
    layer: str = ""  # path of the module that issued it

    @property
    def hops(self) -> int:
        """Point-to-point steps of one rank."""
        peers = len(self.ranks) - 1
        return 2 * peers if self.kind == "all_reduce" else peers

    def sent(self, node: int) -> tuple[int, int]:
        """Return the bytes sent within the node and to other nodes, `node` ranks each."""
        near = sum(rank // node == 0 for rank in self.ranks) - 1
        far = len(self.ranks) - 1 - near
        return round(self.per_peer * near), round(self.per_peer * far)


@dataclass(slots=True)
class Counter:
    """Collects the calls made while it is watching, in order."""

    # Layer of each module; a call belongs to the innermost module that is running.
    labels: Mapping[nn.Module, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    _stack: list[tuple[str, int]] = field(default_factory=list)
    _spans: list[tuple[int, int, str]] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Count what runs inside."""
        with ExitStack() as stack:
            for module, label in self.labels.items():
                before = module.register_forward_pre_hook(self._enter(label))
                after = module.register_forward_hook(self._leave, always_call=True)
                stack.callback(before.remove)
                stack.callback(after.remove)
            stack.enter_context(compat.before_each_operator(self._record))
            yield

    def _enter(self, label: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self._stack.append((label, compat.next_node_number()))

        return enter

    def _leave(self, *_: Any) -> None:
        label, start = self._stack.pop()
        self._spans.append((start, compat.next_node_number(), label))

    def _record(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        space, name = compat.base_name(func)
        kind = _KIND.get(name)
        if space not in _SPACES or kind is None:
            return
        given = compat.named_arguments(func, args, kwargs)
        ranks = compat.group_ranks(next(given[n] for n in _GROUPS if n in given))
        tensors = tensors_in(next(given[n] for n in _INPUTS if n in given))
        payload = sum(t.numel() * t.element_size() for t in tensors)
        per_peer = _per_peer(kind, len(ranks), payload, given.get("input_split_sizes"))
        self.calls.append(Call(kind, ranks, payload, per_peer, *self._where()))

    def _where(self) -> tuple[str, str]:
        """Return phase and layer; in a backward pass, the layer of the forward pass."""
        number = compat.node_number()
        phase = "forward" if number is None else "backward"
        if self._stack:  # a forward, maybe one that is recomputed
            return phase, self._stack[-1][0]
        if number is None:
            return phase, ""
        around = [span for span in self._spans if span[0] <= number < span[1]]
        if not around:  # reduction of parameters' gradients
            return "gradients", ""
        return phase, min(around, key=lambda span: span[1] - span[0])[2]


def count(run: Callable[[], Any]) -> list[Call]:
    """Run something and return the collectives that it issued, backward passes included."""
    counter = Counter()
    with counter.watching():
        run()
    return counter.calls


@contextmanager
def fake_world(world: int, node: int | None = None) -> Iterator[None]:
    """Act as rank 0 of a simulated world with `node` ranks per node (None: all of them).

    Raises:
        MoeifyError: A process group is running already.
    """
    if not dist.is_available():
        raise MoeifyError("this torch was built without torch.distributed")
    if dist.is_initialized():
        raise MoeifyError(
            f"a process group of {dist.get_world_size()} ranks is running: simulate in a process "
            "without one, not under torchrun"
        )
    name = "LOCAL_WORLD_SIZE"
    former = os.environ.get(name)
    store = compat.fake_store()
    dist.init_process_group("fake", store=store, rank=0, world_size=world)
    try:
        os.environ[name] = str(node or world)
        yield
    finally:
        os.environ.pop(name)
        if former is not None:
            os.environ[name] = former
        if dist.is_initialized():
            dist.destroy_process_group()


def _per_peer(kind: str, size: int, payload: int, splits: Any) -> float:
    if size == 1:
        return 0.0
    if kind == "all_to_all" and splits:
        rows = sum(splits)  # rank 0 is the first of its group and keeps its own part
        return payload * (rows - splits[0]) / rows / (size - 1) if rows else 0.0
    parts = {"all_to_all": 1 / size, "reduce_scatter": 1 / size, "all_reduce": 2 / size}
    return payload * parts.get(kind, 1.0)
