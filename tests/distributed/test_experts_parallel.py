"""Experts over ranks: forward, loss, gradients and steps equal one process on the whole batch."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.distributed.dtensor import whole
from moeify.kernels.route import route
from moeify.nn.router import Router
from moeify.sites.record import routers_of
from tests.distributed.ranks import run_ranks

WIDTH = 16


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24)
        self.down = nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Net(nn.Module):
    """Two residual MLPs, the second one gated."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.b = Gated()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.a(x)
        return x + self.b(self.norm(x))


def plan(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "layers": [
            {"select": "all", "experts": 8, "top_k": changes.pop("top_k", 2)},
        ],
        "router": {"drop": "position", "capacity_factor": None, "z_loss": 0.01},
        "init": {"experts": "noise", "noise_std": 0.5, "router_std": 0.3},
    }
    if "node" in changes:
        made["node"] = changes.pop("node")
    made["layers"] += changes.pop("more", [])
    made["router"] |= changes.pop("router", {})
    made["parallel"] = {"all_to_all": "flat"} | changes
    return made


def dense() -> Net:
    torch.manual_seed(3)
    return Net()


def batches(counts: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(count, WIDTH, generator=generator) for count in counts]


def alone(made: dict[str, Any], counts: tuple[int, ...], steps: int) -> list[dict[str, Any]]:
    """One process on the global batch: the mean of the ranks' losses, router losses over all.

    A capacity is per rank, so the ranks' batches go through one by one; the router losses are then
    those of all tokens that a router has seen, together.
    """
    single = {k: v for k, v in made.items() if k not in ("parallel", "node")}
    model = mf.moeify(dense(), single, example_inputs=torch.randn(4, WIDTH)).train()
    seen: dict[Router, list[torch.Tensor]] = {router: [] for _, router in routers_of(model)}
    for router, tokens in seen.items():
        router.register_forward_pre_hook(lambda _, args, kept=tokens: kept.append(args[0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    history: list[dict[str, Any]] = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs = [model(x) for x in batches(counts)]
        aux = torch.zeros(())
        for router, tokens in seen.items():
            together = torch.cat(tokens)
            tokens.clear()
            routing = route(
                together,
                router.weight,
                top_k=router.top_k,
                capacity=len(together),
                score=router.score,
                balance=router.balance,
            )
            aux = aux + router.aux_loss * routing.aux_loss + router.z_loss * routing.z_loss
        loss = sum(mean_square(y) for y in outputs) / len(counts)
        (loss + aux).backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
        outputs = [y.detach() for y in outputs]
        history.append({"outputs": outputs, "aux": aux.detach(), "gradients": gradients})
        optimizer.step()
    history.append({n: p.detach().clone() for n, p in model.named_parameters()})
    return history


def mean_square(y: torch.Tensor) -> torch.Tensor:
    return 3 * y.square().sum() / max(y.numel(), 1)


def trained(
    rank: int, made: dict[str, Any], counts: tuple[int, ...], want: list[dict[str, Any]]
) -> list[str]:
    """Train on this rank's tokens and compare with one process; return what differs."""
    torch.manual_seed(rank)  # the global generator must not matter
    made = copy.deepcopy(made)
    if (node := made.pop("node", None)) is not None:
        os.environ["LOCAL_WORLD_SIZE"] = str(node)
    place = rank // made["parallel"].get("tensor", 1)
    model = mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH)).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    wrong = []

    def check(what: str, got: torch.Tensor, expected: torch.Tensor) -> None:
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        gap = float((got - expected).abs().max()) if expected.numel() else 0.0
        if got.shape != expected.shape or not gap <= 1e-5 * max(1.0, largest):
            wrong.append(f"{what}: {gap:.1e}")

    for number, step in enumerate(want[:-1]):
        optimizer.zero_grad()
        y = model(batches(counts)[place])
        check(f"step {number} output", y.detach(), step["outputs"][place])
        aux = mf.aux_loss(model)
        check(f"step {number} router losses", aux.detach(), step["aux"])
        (mean_square(y) + aux).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            check(f"step {number} {name}", whole(parameter.grad), step["gradients"][name])
        optimizer.step()
    for name, parameter in model.named_parameters():
        check(name, whole(parameter).detach(), want[-1][name])
    return wrong


def check_equal(world: int, counts: tuple[int, ...], *, steps: int = 3, **changes: Any) -> None:
    assert len(counts) * changes.get("tensor", 1) == world
    made = plan(**changes)
    assert run_ranks(trained, world, made, counts, alone(made, counts, steps)) == [[]] * world


CAPACITY = {"capacity_factor": 1.0, "min_capacity": 1}
PYRAMID = [{"select": {"last": 1}, "experts": 2}]
RESIDUAL = [{"select": {"first": 1}, "residual": "coefficient"}]


@pytest.mark.parametrize(
    "changes",
    [  # of three rows, the first runs without --slow
        {},
        {"top_k": 1},
        {"router": CAPACITY},
        {"router": CAPACITY, "splits": "uneven"},
        {"router": {**CAPACITY, "drop": "score"}, "top_k": 1},
        {"more": RESIDUAL},
        {"all_to_all": "allgather", "router": CAPACITY, "more": RESIDUAL},
        {"all_to_all": "allgather"},
        {"router": {"score": "sigmoid", "balance": "first"}},
    ],
)
@pytest.mark.thin(3)
def test_experts_over_all_ranks(changes):
    check_equal(2, (6, 6), expert=2, **changes)


@pytest.mark.parametrize("expert", [2, 4])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": CAPACITY},
        {"more": PYRAMID, "top_k": 1},
        {"all_to_all": "allgather"},
    ],
)
@pytest.mark.thin(3)  # both sizes; a pyramid with one choice is among the eight ranks below
def test_experts_over_some_ranks(changes, expert):
    check_equal(4, (5, 5, 5, 5), expert=expert, **changes)


@pytest.mark.parametrize("counts", [(3, 0, 7, 1), (0, 4)], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": CAPACITY, "splits": "uneven"},
        {"all_to_all": "allgather"},
        {"all_to_all": "allgather", "router": CAPACITY, "splits": "uneven"},
    ],
)
@pytest.mark.thin(3)  # both worlds, and both ways to exchange
def test_unequal_tokens_and_none(changes, counts):
    check_equal(len(counts), counts, expert=2, **changes)


def test_capacity_below_the_number_of_routes():
    made = {"router": {"capacity_factor": 0.25, "min_capacity": 0}}
    check_equal(2, (64, 64), expert=2, **made)
    check_equal(2, (64, 64), expert=2, overlap_chunks=2, **made)


def test_data_parallel_alone():
    check_equal(2, (3, 5))


def test_eight_ranks():
    check_equal(8, (4, 0, 3, 5, 4, 4, 1, 2), expert=4, more=PYRAMID, top_k=1, steps=2)


@pytest.mark.parametrize("experts_in_tp", ["replicate", "fold", "slice"])
@pytest.mark.parametrize(
    ("changes", "coordinated"),
    [
        ({}, True),
        ({}, False),
        ({"router": CAPACITY, "top_k": 1}, True),
        ({"more": PYRAMID, "top_k": 1}, True),
        ({"more": PYRAMID, "top_k": 1}, False),
    ],
)
@pytest.mark.thin(7)
def test_tensor_groups(changes, experts_in_tp, coordinated):
    tensor = {"tensor": 2, "experts_in_tp": experts_in_tp, "coordinated": coordinated}
    check_equal(4, (5, 5), expert=2, **tensor, **changes)
    if experts_in_tp == "fold":
        check_equal(4, (5, 5), expert=4, **tensor, **changes)


def test_tensor_groups_of_unequal_batches():
    check_equal(8, (5, 0, 3, 6), expert=2, tensor=2)
    check_equal(4, (0,), expert=1, tensor=4, experts_in_tp="slice")
    check_equal(4, (7,), expert=4, tensor=4, experts_in_tp="fold", top_k=1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": CAPACITY, "top_k": 1},
        {"router": CAPACITY, "splits": "uneven"},
        {"more": PYRAMID, "top_k": 1},
        {"more": RESIDUAL},
    ],
)
@pytest.mark.thin(3)
def test_two_stages(changes):
    check_equal(4, (5, 5, 5, 5), expert=4, node=2, all_to_all="hierarchical", **changes)


@pytest.mark.parametrize(
    ("counts", "changes"),
    [
        ((5, 3, 3, 0), {"expert": 4, "tensor": 2, "node": 4, "steps": 2}),
        ((5, 0, 3, 1, 2, 4, 4, 6), {"expert": 8, "node": 2, "steps": 1}),
    ],
    ids=["two nodes of four", "four nodes of two"],
)
@pytest.mark.thin(2)
def test_two_stages_among_eight_ranks(counts, changes):
    check_equal(8, counts, all_to_all="hierarchical", **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"router": CAPACITY, "top_k": 1},
        {"tensor": 2},
        {"tensor": 2, "experts_in_tp": "slice", "router": CAPACITY},
        {"node": 2, "all_to_all": "hierarchical", "expert": 4},
    ],
)
@pytest.mark.thin(3)
def test_overlapped_chunks_give_the_same_numbers(changes):
    expert = changes.pop("expert", 2)
    counts = (
        (5, 3)
        if "tensor" in changes and "router" not in changes
        else (5,) * (4 // changes.get("tensor", 1))
    )
    check_equal(4, counts, expert=expert, overlap_chunks=3, **changes)
