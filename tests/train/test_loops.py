"""A converted model on several ranks in the user's own loop: DDP, copies, accumulation, draws."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import moeify as mf
from moeify.distributed.dtensor import whole
from moeify.errors import MoeifyError
from moeify.sites.record import routers_of
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import WIDTH, alone, batches, dense, mean_square, plan

COUNTS = (4, 6)


def converted(made: dict[str, Any], *, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH)).train()


def differ(model: nn.Module, want: dict[str, torch.Tensor]) -> list[str]:
    wrong = []
    for name, parameter in model.named_parameters():
        gap = float((whole(parameter.grad) - want[name]).abs().max())
        if not gap <= 1e-5 * max(1.0, float(want[name].abs().max())):
            wrong.append(f"{name}: {gap:.1e}")
    return wrong


def backward(run: Any, model: nn.Module, part: torch.Tensor) -> None:
    y = run(part)
    (mean_square(y) + mf.aux_loss(model)).backward()


def _ddp(rank: int, made: dict[str, Any], want: dict[str, torch.Tensor]) -> list[str]:
    model = converted(made)
    wrapped = nn.parallel.DistributedDataParallel(model)
    backward(wrapped, model, batches(COUNTS)[rank])
    return differ(model, want)


@pytest.mark.parametrize("gradients", ["all", "experts"])
def test_ddp_around_it(gradients):
    made = plan(expert=2, gradients=gradients)
    want = alone(made, COUNTS, 1)[0]["gradients"]
    assert run_ranks(_ddp, 2, made, want) == [[], []]


def _sliced_ddp(rank: int, made: dict[str, Any], want: dict[str, torch.Tensor]) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH), mesh=mesh).train()
    wrapped = nn.parallel.DistributedDataParallel(model, process_group=mesh.get_group("dp"))
    backward(wrapped, model, batches(COUNTS)[rank // 2])
    return differ(model, want)


@pytest.mark.parametrize("gradients", ["all", "experts"])
def test_ddp_around_slices(gradients):
    made = plan(expert=1, tensor=2, experts_in_tp="slice", gradients=gradients)
    want = alone(made, COUNTS, 1)[0]["gradients"]
    assert run_ranks(_sliced_ddp, 4, made, want) == [[]] * 4


def _none(rank: int, made: dict[str, Any]) -> list[bool]:
    model = converted(made)
    backward(model, model, batches(COUNTS)[rank])
    router = next(router for _, router in routers_of(model))
    return gathered(router.weight.grad)


def gathered(tensor: torch.Tensor) -> list[bool]:
    """Tell for each rank whether its tensor is that of rank 0."""
    found = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tensor.contiguous())
    return [torch.equal(found[0], other) for other in found]


def test_nothing_is_reduced_if_the_plan_says_so():
    assert run_ranks(_none, 2, plan(expert=2, gradients="none")) == [[True, False]] * 2


def _copies(rank: int, made: dict[str, Any], want: dict[str, torch.Tensor]) -> list[str]:
    model = converted(made)
    part = batches(COUNTS)[rank]
    clone = copy.deepcopy(model)
    backward(clone, clone, part)
    wrong = differ(clone, want)
    assert all(p.grad is None for p in model.parameters())
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    again = torch.load(stream, weights_only=False)
    backward(again, again, part)
    wrong += differ(again, want)
    model.load_state_dict(clone.state_dict())
    for _ in range(2):  # two backward passes before a step, half the loss each
        y = model(part)
        ((mean_square(y) + mf.aux_loss(model)) / 2).backward()
    wrong += differ(model, want)
    for refused in (mf.demoeify, lambda m: mf.save(m, "nowhere"), lambda m: mf.export(m, part)):
        with pytest.raises(MoeifyError, match="2 ranks"):
            refused(model)
    return wrong


def test_copies_pickles_and_accumulation():
    made = plan(expert=2)
    want = alone(made, COUNTS, 1)[0]["gradients"]
    assert run_ranks(_copies, 2, made, want) == [[], []]


def _draws(rank: int, made: dict[str, Any]) -> list[bool]:
    model = converted(made, seed=rank)
    torch.manual_seed(rank)  # not even the seeds agree
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))
    same = gathered(model(x).detach())
    (mean_square(model(x)) + mf.aux_loss(model)).backward()
    for _, router in routers_of(model):
        same += gathered(router.weight.grad)
    return same


@pytest.mark.parametrize(
    "router",
    [
        {"drop": "random", "capacity_factor": 0.5, "min_capacity": 1},
        {"noise": "jitter", "capacity_factor": None},
        {"noise": "gumbel", "capacity_factor": 1.0},
    ],
)
def test_a_tensor_group_draws_alike(router):
    made = plan(expert=1, tensor=2, router=router)
    assert run_ranks(_draws, 2, made) == [[True] * 6] * 2


def _biases(rank: int, made: dict[str, Any]) -> list[bool]:
    model = converted(made)
    step = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        backward(model, model, batches((5, 0, 9, 3))[rank])
        step.step()
    same: list[bool] = []
    for _, router in routers_of(model):
        assert router.selection_bias.abs().max() > 0
        same += gathered(router.selection_bias)
        assert int(mf.router_stats(model)["a"]["tokens"]) == 17
    return same


def test_biases_follow_the_load_of_all_ranks():
    made = plan(expert=2, router={"bias_update": 0.01})
    assert run_ranks(_biases, 4, made) == [[True] * 8] * 4


def _zero_biases(rank: int, made: dict[str, Any]) -> list[bool]:
    model = converted(made)
    step = mf.optimizer(model, torch.optim.SGD, lr=0.1)
    same: list[bool] = []
    for _ in range(2):
        backward(model, model, batches((5, 9))[rank])
        step.step()
    for _, router in routers_of(model):
        steps = router.selection_bias.abs().max() / 0.01
        assert 0.9 < float(steps) < 2.1, float(steps)
        assert not bool(router.pending_counts.any())
        same += gathered(router.selection_bias)
    return same


@pytest.mark.parametrize("stage", [1, 3])
def test_biases_move_with_partitioned_optimizers(stage: int) -> None:
    made = plan(expert=1, router={"bias_update": 0.01}) | {"zero": {"stage": stage}}
    assert run_ranks(_zero_biases, 2, made) == [[True] * 4] * 2


def _back(rank: int, made: dict[str, Any]) -> list[Any]:
    x = torch.randn(3, WIDTH)
    model = converted(made)
    mf.demoeify(model)
    mean_square(model(x + rank)).backward()
    return gathered(model.norm.weight.grad)


def test_demoeify_stops_reducing():
    assert run_ranks(_back, 2, plan()) == [[True, False]] * 2


def _state(rank: int, made: dict[str, Any]) -> Any:
    model, single = converted(made), {k: v for k, v in made.items() if k != "parallel"}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    held = sum(p.to_local().numel() for p in model.parameters() if hasattr(p, "to_local"))
    values = {n: whole(p).detach() for n, p in model.named_parameters()}
    return shapes, held, values, single


def test_parameters_are_those_of_one_process():
    made = plan(expert=4, tensor=2, experts_in_tp="fold")
    found = run_ranks(_state, 4, made)
    single = mf.moeify(dense(), found[0][3], example_inputs=torch.ones(4, WIDTH))
    for shapes, held, values, _ in found:
        assert shapes == {n: tuple(p.shape) for n, p in single.named_parameters()}
        experts = sum(p.numel() for n, p in single.named_parameters() if "experts" in n)
        assert held == experts // 4
        for name, parameter in single.named_parameters():
            assert torch.equal(values[name], parameter), name
