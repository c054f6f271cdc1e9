"""Second derivatives over ranks equal those of one process; forward mode over ranks is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, jvp

import moeify as mf
from moeify.errors import DerivativeError
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import WIDTH, batches, dense, plan


def penalty(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of a loss, and that of its square."""
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    return first.detach(), second


def of_rank(rank: int, made: dict[str, Any], place: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(rank)
    model = mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH)).eval()
    return penalty(model, batches((5, 3))[rank // made["parallel"].get("tensor", 1)])


@pytest.mark.parametrize(
    "changes",
    [
        {"expert": 2},
        {"expert": 2, "all_to_all": "allgather"},
        {"tensor": 2, "experts_in_tp": "slice"},
        {"tensor": 2, "experts_in_tp": "fold", "expert": 2, "coordinated": True},
    ],
    ids=lambda c: " ".join(map(str, c.values())),
)
def test_a_gradient_penalty_equals_one_process(changes):
    single = {k: v for k, v in plan().items() if k != "parallel"}
    model = mf.moeify(dense(), single, example_inputs=torch.ones(4, WIDTH)).eval()
    results = run_ranks(of_rank, 2, plan(**changes), 0)
    for rank, got in enumerate(results):
        want = penalty(model, batches((5, 3))[rank // changes.get("tensor", 1)])
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def _dual(model: nn.Module, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return model(forward_ad.make_dual(x, x))


FORWARD: tuple[Callable[[nn.Module, Tensor], Any], ...] = (
    lambda model, x: jvp(model, (x,), (x,)),
    lambda model, x: grad(lambda y: model(y).sum())(x),
    _dual,
)


def messages(rank: int, made: dict[str, Any]) -> list[str]:
    model = mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH)).eval()
    said = []
    for run in FORWARD:
        with pytest.raises(DerivativeError) as caught:
            run(model, torch.ones(4, WIDTH))
        said.append(str(caught.value))
    return said


@pytest.mark.parametrize("all_to_all", ["flat", "allgather"])
def test_forward_mode_over_ranks_says_what_to_do(all_to_all):
    for said in run_ranks(messages, 2, plan(expert=2, all_to_all=all_to_all)):
        assert len(said) == len(FORWARD)
        for message in said:
            assert message.startswith("a: ")
            assert "use torch.autograd.grad" in message


def partitioned(rank: int, made: dict[str, Any]) -> str:
    model = mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH)).train()
    x = torch.ones(4, WIDTH, requires_grad=True)
    loss = model(x).square().sum()
    with pytest.raises(DerivativeError) as caught:
        loss.backward(create_graph=True)
    return str(caught.value)


def test_partitioned_parameters_say_what_to_do():
    made = plan() | {"zero": {"stage": 3, "engine": "graph"}}
    for message in run_ranks(partitioned, 2, made):
        assert "cannot be differentiated again; use a plan without `zero`" in message
