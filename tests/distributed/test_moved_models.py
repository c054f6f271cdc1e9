"""Gradients over ranks equal one process's after every way to move, cast, copy or wrap a model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import moeify as mf
from moeify.distributed.dtensor import is_sharded, local_of, whole
from moeify.distributed.gradient_reducer import GradientReducer, Reduction
from moeify.errors import DispatchError
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import (
    WIDTH,
    alone,
    batches,
    dense,
    mean_square,
    plan,
)

Way = Callable[[nn.Module], nn.Module]


def emptied(model: nn.Module) -> nn.Module:
    """Go through meta, as models that are built there do; the values come back by hand."""
    kept = {name: local_of(p.detach()).clone() for name, p in model.named_parameters()}
    model.to("meta")
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            local_of(parameter).copy_(kept[name])
    return model


def swapped(model: nn.Module) -> nn.Module:
    """Let torch swap plain parameters too."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.to("cpu")
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def overwritten(model: nn.Module) -> nn.Module:
    """Let torch put new parameters into the modules."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return model.to("cpu")
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def assigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    return model


def pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded: nn.Module = torch.load(buffer, weights_only=False)
    return loaded


def new_data(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if not is_sharded(parameter):
            parameter.data = parameter.data.clone()
    return model


def parts_moved(model: nn.Module) -> nn.Module:
    for module in model.children():
        module.to("cpu")
    return model


def within_another(model: nn.Module) -> nn.Module:
    return nn.Sequential(model).cpu()[0]


WAYS: dict[str, Way] = {
    "untouched": lambda m: m,
    "to": lambda m: m.to("cpu"),
    "float": lambda m: m.float(),
    "cpu": lambda m: m.cpu(),
    "double and back": lambda m: m.double().float(),
    "to_empty": emptied,
    "swap": swapped,
    "overwrite": overwritten,
    "assign": assigned,
    "load": lambda m: (m.load_state_dict(m.state_dict()), m)[1],
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "moved, then copied": lambda m: copy.deepcopy(m.to("cpu")),
    "copied, then moved": lambda m: copy.deepcopy(m).to("cpu"),
    "data": new_data,
    "in parts": parts_moved,
    "within another": within_another,
    "twice": lambda m: m.to("cpu").to("cpu"),
}
MOVES = ["untouched", "to", "float", "cpu", "within another", "twice"]
WRAPPED: dict[str, Way] = {
    "ddp": lambda m: DistributedDataParallel(m.to("cpu")),
    "compile": lambda m: torch.compile(m.to("cpu"), backend="aot_eager", fullgraph=True),
}


def wrong_gradients(model: nn.Module, expected: dict[str, Tensor], scale: float = 1.0) -> list[str]:
    found = []
    for name, parameter in model.named_parameters():
        name = name.removeprefix("module.").removeprefix("_orig_mod.")
        if parameter.grad is None:
            found.append(f"{name}: none")
            continue
        got, want = whole(parameter.grad).double(), scale * expected[name].double()
        if got.shape != want.shape or not torch.allclose(got, want, rtol=1e-4, atol=1e-6):
            found.append(f"{name}: times {float((got * want).sum() / want.square().sum()):.4f}")
    return found


def step(model: nn.Module, inner: nn.Module, rank: int, counts: tuple[int, ...]) -> None:
    loss = mean_square(model(batches(counts)[rank]))
    (loss + mf.aux_loss(inner)).backward()


def converted(made: dict[str, Any]) -> nn.Module:
    example = torch.ones(4, WIDTH)
    return mf.moeify(dense(), made, example_inputs=example, verify=False).train()


def each_way_alone(
    rank: int, made: dict[str, Any], counts: tuple[int, ...], expected: dict[str, Tensor]
) -> dict[str, list[str]]:
    """Return what differs, by way."""
    wrong: dict[str, list[str]] = {}
    for name in ("to", "to_empty", "assign", "overwrite", "pickle"):
        model = WAYS[name](converted(made))
        for accumulated in (1, 2):
            step(model, model, rank, counts)
            wrong[f"{name}, {accumulated}"] = wrong_gradients(model, expected, accumulated)
    return {name: found for name, found in wrong.items() if found}


def one_way_after_the_other(
    rank: int,
    made: dict[str, Any],
    ways: list[str],
    counts: tuple[int, ...],
    expected: dict[str, Tensor],
) -> dict[str, list[str]]:
    wrong: dict[str, list[str]] = {}
    share = rank // made["parallel"].get("tensor", 1)
    model = converted(made)
    for name in ways:
        model = WAYS.get(name, lambda m: m)(model)
        outer = WRAPPED[name](model) if name in WRAPPED else model
        model.zero_grad()
        step(outer, model, share, counts)
        wrong[name] = wrong_gradients(model, expected)
    return {name: found for name, found in wrong.items() if found}


class Small(nn.Module):
    """All of its parameters may be replaced at once."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


def compiled_after_all_were_replaced(rank: int) -> list[str]:
    model = overwritten(reduced(Small()))
    fast = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = []
    for _ in range(2):
        fast(torch.ones(1, 3) + rank).sum().backward()
        single = Small()
        (single(torch.ones(1, 3)).sum() / 2 + single(torch.ones(1, 3) + 1).sum() / 2).backward()
        found += wrong_gradients(model, {n: p.grad for n, p in single.named_parameters()})
        model.zero_grad()
        assigned(model)
    return found


def reduced(model: nn.Module) -> nn.Module:
    names = [name for name, _ in model.named_parameters()]
    whole = Reduction.of(model, names, dist.group.WORLD.group_name, 2)
    model.__dict__["reducer"] = GradientReducer([whole], watched=[model], complete=True)
    return model


def test_compiled_after_all_parameters_were_replaced():
    assert run_ranks(compiled_after_all_were_replaced, 2) == [[], []]


def added_and_replaced(rank: int) -> list[str]:
    later, replaced = reduced(Small()), reduced(Small())
    later.two = nn.Sequential(later.two, nn.Linear(1, 1))
    replaced.two.weight = nn.Parameter(torch.ones(2, 3))
    messages = []
    for model in (later, replaced):
        with pytest.raises(DispatchError) as info:
            model(torch.ones(1, 3))
        messages.append(str(info.value))
    DistributedDataParallel(later)(torch.ones(1, 3)).sum().backward()
    later.two[1].requires_grad_(False)
    later(torch.ones(1, 3)).sum().backward()
    return messages


def test_what_nothing_would_reduce_is_refused():
    for added, replaced in run_ranks(added_and_replaced, 2):
        assert added.startswith("two.1.weight: was added after the conversion, so nothing")
        assert "parallel: {gradients: experts}" in added
        assert replaced.startswith("two.weight: was of shape (1, 3) at the conversion and is of")


def sharded_by_the_user(rank: int) -> list[str]:
    model = reduced(Small())
    fully_shard(model.one, mesh=init_device_mesh("cpu", (2,)))
    found = []
    for _ in range(2):
        model.zero_grad()
        model(torch.ones(1, 3) + rank).sum().backward()
        single = Small()
        (single(torch.ones(1, 3)).sum() / 2 + single(torch.ones(1, 3) + 1).sum() / 2).backward()
        found += wrong_gradients(model, {n: p.grad for n, p in single.named_parameters()})
    return found


def test_what_fsdp_shards_later_is_left_to_it():
    assert run_ranks(sharded_by_the_user, 2) == [[], []]


def test_gradients_after_each_way():
    made, counts = plan(expert=2), (5, 3)
    expected = alone(made, counts, 1)[0]["gradients"]
    assert run_ranks(each_way_alone, 2, made, counts, expected) == [{}, {}]


@pytest.mark.parametrize(
    ("world", "counts", "ways", "changes"),
    [
        (2, (5, 3), [*WAYS, "ddp"], {"expert": 1}),
        (2, (5, 3), [*WAYS, "ddp"], {"expert": 2}),
        (4, (5, 3, 2, 4), [*WAYS, "ddp"], {"expert": 2}),
        (4, (5, 3), [*WAYS], {"expert": 2, "tensor": 2, "experts_in_tp": "slice"}),
        (2, (5, 3), MOVES, {"expert": 2, "zero": {"stage": 2}}),
        (2, (5, 3), [*MOVES, "swap"], {"expert": 2, "zero": {"stage": 3, "engine": "graph"}}),
        pytest.param(2, (5, 3), ["compile"], {"expert": 2}, marks=pytest.mark.slow),
    ],
    ids=["dp2", "ep2", "ep2 dp2", "ep2 tp2", "fsdp2", "zero3", "compiled"],
)
def test_gradients_after_one_way_after_the_other(world, counts, ways, changes):
    made = plan(**{key: value for key, value in changes.items() if key != "zero"})
    expected = alone(made, counts, 1)[0]["gradients"]
    made |= {"zero": changes["zero"]} if "zero" in changes else {}
    assert run_ranks(one_way_after_the_other, world, made, ways, counts, expected) == [{}] * world
