"""What a conversion over ranks leaves in memory, and what it needs meanwhile."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moeify as mf
from moeify.convert import memory, verify, world
from moeify.distributed.dtensor import local_of
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import WIDTH, dense, plan


def alive() -> dict[int, tuple[int, ...]]:
    """Return the storages of all tensors that Python knows, with the shape of one of each."""
    found: dict[int, tuple[int, ...]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for thing in gc.get_objects():
            if isinstance(thing, Tensor) and not thing.is_meta:
                local = local_of(thing.detach())
                found[local.untyped_storage().data_ptr()] = tuple(local.shape)
    return found


def converted(model: nn.Module, **changes: Any) -> None:
    mf.moeify(model, plan(expert=2, **changes), example_inputs=torch.ones(4, WIDTH))


def what_is_left(rank: int) -> tuple[list[str], list[tuple[int, ...]]]:
    memory._WORTHWHILE = 0
    converted(dense())  # what is made once, at first use
    gc.collect()
    gc.disable()  # chance must not help
    before = alive()
    model = dense()
    replaced = {name: weakref.ref(p) for name, p in model.named_parameters() if "norm" not in name}
    converted(model)
    kept = {local_of(t.detach()).untyped_storage().data_ptr() for t in model.state_dict().values()}
    left = [shape for key, shape in alive().items() if key not in before and key not in kept]
    return [name for name, reference in replaced.items() if reference() is not None], left


def test_nothing_of_the_dense_model_or_the_proof_is_left() -> None:
    for dense_names, left in run_ranks(what_is_left, 2):
        assert dense_names == []
        # Random generators, and sums of statistics: nothing of the size of a weight or gradient.
        assert [shape for shape in left if torch.Size(shape).numel() > WIDTH] == []


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operator makes."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.largest = max(self.largest, leaf.numel() * leaf.element_size())
        return out


def passing_sizes(rank: int) -> tuple[int, int]:
    """Return the largest tensor made when weights are compared, and the largest weight."""
    world._PIECE = 1 << 6  # type: ignore[misc]
    model = dense()
    weights = {name: p.detach() for name, p in model.named_parameters()}
    with Largest() as mode:
        world._weight_digests(model)
        for weight in weights.values():
            verify.sketch(weight)
    return mode.largest, max(w.numel() * w.element_size() for w in weights.values())


def test_weights_are_compared_in_parts() -> None:
    ((made, weight),) = run_ranks(passing_sizes, 1)
    assert made <= weight
