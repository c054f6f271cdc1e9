"""Selection biases: once per optimizer step, in float32, whatever runs the model."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import moeify as mf
from moeify.nn.router import Router
from moeify.sites.record import routers_of
from tests.distributed.ranks import run_ranks

STEP = 0.01
PLAN = {
    "layers": [{"select": "all", "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None, "aux_loss": 0.0, "bias_update": STEP},
    "init": {"router_std": 0.5},
}
X = torch.randn(24, 16, generator=torch.Generator().manual_seed(5))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))


def converted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), mlp(), nn.Sequential(nn.LayerNorm(16), mlp()))
    return mf.moeify(model, PLAN, example_inputs=X).train()


def biases(model: nn.Module) -> list[Tensor]:
    return [router.selection_bias.clone() for _, router in routers_of(model)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want) == 2
    for ours, theirs in zip(got, want, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def trained(steps: int = 3) -> list[Tensor]:
    """Return the biases by the definition: against the load of all tokens since the last step."""
    model = converted()
    for _ in range(steps):
        model(X)
        for _, router in routers_of(model):
            load = router.pending_counts.float()
            router.selection_bias += STEP * (load.mean() - load).sign()
            router.pending_counts.zero_()
    assert all(bool(bias.any()) for bias in biases(model))
    return biases(model)


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_once_per_step_however_the_batch_is_cut(parts: int) -> None:
    model = converted()
    step = torch.optim.SGD(model.parameters(), lr=0.0)
    for number in range(3):
        for part in X.chunk(parts):
            before = biases(model)
            model(part).sum().backward()
            model.eval()(part)
            model.train()
            assert_same(biases(model), before)
        step.step()
        assert_same(biases(model), trained(number + 1))
        step.step()  # nothing has run since
        assert_same(biases(model), trained(number + 1))


def frozen(model: nn.Module) -> Any:
    for _, router in routers_of(model):
        router.weight.requires_grad_(False)
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)


def many(model: nn.Module) -> Any:
    """One optimizer per parameter, as for steps in the backward pass."""
    made = [torch.optim.SGD([p], lr=0.0) for p in model.parameters()]

    class All:
        def step(self) -> None:
            for each in made:
                each.step()

    return All()


OPTIMIZERS = {
    "adamw": lambda model: torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0),
    "groups": lambda model: mf.optimizer(model, torch.optim.SGD, lr=0.0),
    "frozen": frozen,
    "many": many,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_any_optimizer(name: str) -> None:
    model = converted()
    step = OPTIMIZERS[name](model)
    for _ in range(3):
        model(X).sum().backward()
        step.step()
    assert_same(biases(model), trained())


def test_when_parts_are_called() -> None:
    model = converted()
    step = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        model[2](model[1](model[0](X))).sum().backward()
        step.step()
    assert_same(biases(model), trained())


def test_copies_move_on_their_own() -> None:
    model = converted()
    other = copy.deepcopy(model)
    step = torch.optim.SGD(other.parameters(), lr=0.0)
    for _ in range(3):
        model(X), other(X)
        step.step()
    assert_same(biases(other), trained())
    assert not any(bool(bias.any()) for bias in biases(model))


@pytest.mark.parametrize("dynamo", [False, True])
def test_recomputation_sees_the_bias_of_its_forward(dynamo: bool) -> None:
    model = converted()
    model.compile(backend="aot_eager") if dynamo else None
    step = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        outs = [checkpoint(model, part, use_reentrant=False) for part in X.chunk(2)]
        for out in outs:  # both forwards before any backward
            out.sum().backward()
        step.step()
    assert_same(biases(model), trained())


def test_a_compiled_model() -> None:
    torch._dynamo.reset()
    model = converted()
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    step = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        run(X).sum().backward()
        step.step()
    assert_same(biases(model), trained())


def test_a_compiled_step_of_the_optimizer() -> None:
    torch._dynamo.reset()
    model = converted()
    step = torch.optim.SGD(model.parameters(), lr=0.0)
    run = torch.compile(step.step, backend="aot_eager")
    for _ in range(3):
        model(X).sum().backward()
        run()
    assert_same(biases(model), trained())


CASTS = {
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half().float(),
    "to dtype": lambda m: m.to(torch.bfloat16),
    "type": lambda m: m.type(torch.bfloat16),
    "double": lambda m: m.double(),
    "part": lambda m: m[1].to(torch.bfloat16) and m,
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_keep_the_bias_in_float32(name: str) -> None:
    model = converted()
    for _, router in routers_of(model):
        router.selection_bias.copy_(torch.tensor([-1.2003, 0.1234, 3.3337, 0.0]))
    before = biases(model)
    assert_same(biases(CASTS[name](model)), before)
    assert all(r.pending_counts.dtype == torch.int64 for _, r in routers_of(model))


def test_the_bias_moves_on_after_a_cast() -> None:
    model = converted().bfloat16()
    step = torch.optim.SGD(model.parameters(), lr=0.0)
    for _, router in routers_of(model):
        router.selection_bias.fill_(4.0)  # where a step is less than half a digit of bfloat16
    model(X.bfloat16()).sum().backward()
    step.step()
    for bias in biases(model):
        assert float((bias - 4.0).abs().max()) == pytest.approx(STEP, rel=1e-3)


def test_a_state_dict_in_bfloat16_does_not_change_the_dtype() -> None:
    model = converted()
    state = {
        name: value.bfloat16() if value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        assert all(bias.dtype == torch.float32 for bias in biases(model))


def test_under_another_default_dtype() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert Router(4, experts=2, bias_update=0.1).selection_bias.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_an_optimizer_of_other_tensors_is_noticed(caplog: Any) -> None:
    model = converted()
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    other = torch.optim.SGD(masters, lr=0.0)
    with caplog.at_level(logging.WARNING, "moeify"):
        for _ in range(6):
            model(X).sum().backward()
            other.step()
    assert [r.message for r in caplog.records if "bias_update" in r.message] == [
        "bias_update has no effect on this Sequential, because the optimizer that steps (SGD) does "
        "not hold the parameters of the model itself: call moeify.update_router_biases(model) "
        "after each of its steps"
    ]
    model = converted()
    for _ in range(3):
        model(X)
        mf.update_router_biases(model)
        mf.update_router_biases(model)
    assert_same(biases(model), trained())
    with pytest.raises(mf.MoeifyError, match="no MoE layer"):
        mf.update_router_biases(nn.Linear(2, 2))


def _sharded(rank: int) -> list[Tensor]:
    model = converted()
    for part in (model[1], model[2], model):
        fully_shard(part)
    step = torch.optim.SGD(model.parameters(), lr=0.0)
    for _ in range(3):
        model(X[rank * 12 : rank * 12 + 12]).sum().backward()
        step.step()
    return biases(model)


def test_fsdp_ranks_balance_the_load_of_all() -> None:
    for got in run_ranks(_sharded, 2):
        assert_same(got, trained())
