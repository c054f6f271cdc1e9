"""A converted model compiles in one graph, at most twice, for any number of tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import moeify as mf

TOKENS = (1, 2, 3, 8, 64, 100, 1000, 4096)
PLANS: dict[str, dict[str, Any]] = {
    "dropless": {"layers": [{"select": "all", "experts": 4, "top_k": 2}]},
    "capacity": {
        "layers": [{"select": "all", "experts": 4}],
        "router": {"capacity_factor": 1.25, "eval_capacity_factor": 1.25, "aux_loss": 0.01},
    },
    "residual": {
        "layers": [{"select": "all", "experts": 3, "top_k": 2, "residual": "coefficient"}],
        "router": {"bias_update": 0.01, "score": "sigmoid"},
    },
}
KERNELS = ("reference", "grouped_mm", "triton")


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(16, 24), nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def converted(plan: str, kernel: str) -> nn.Module:
    chosen = {**PLANS[plan], "layers": [{**PLANS[plan]["layers"][0], "kernel": kernel}]}
    return mf.moeify(nn.Sequential(Mlp()), chosen, example_inputs=torch.randn(9, 16))


def compiled(model: nn.Module) -> tuple[nn.Module, CompileCounterWithBackend]:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


@pytest.mark.parametrize("plan", PLANS)
def test_inference(plan: str) -> None:
    model = converted(plan, "auto").eval()
    run, counter = compiled(model)
    for count in TOKENS:
        x = torch.randn(count, 16)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x))
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("plan", "kernel"),
    [*((plan, "auto") for plan in PLANS), *(("dropless", kernel) for kernel in KERNELS)],
)
@pytest.mark.thin(2)
def test_training(plan: str, kernel: str) -> None:
    model = converted(plan, kernel).train()
    run, counter = compiled(model)
    for count in TOKENS:
        x = torch.randn(count, 16, requires_grad=True)
        (run(x).square().sum() + mf.aux_loss(model)).backward()
        assert x.grad is not None
        assert bool(x.grad.isfinite().all())
    assert counter.frame_count <= 2


def test_batches_of_sequences() -> None:
    model = converted("capacity", "auto").train()
    run, counter = compiled(model)
    for batch, length in ((2, 3), (4, 16), (7, 5), (1, 100), (64, 64)):
        run(torch.randn(batch, length, 16)).sum().backward()
    assert counter.frame_count <= 3  # two, and one for the batch of one


def test_no_tokens() -> None:
    model = converted("dropless", "auto").train()
    run, _ = compiled(model)
    x = torch.randn(0, 16, requires_grad=True)
    run(x).sum().backward()
    assert all(bool((p.grad == 0).all()) for p in model.parameters())


@pytest.mark.parametrize("count", [1, 64])
def test_compiled_training_equals_eager(count: int) -> None:
    model = converted("dropless", "auto").train()
    run, _ = compiled(model)
    x = torch.randn(count, 16)
    results = []
    for forward in (model, run):
        model.zero_grad()
        out = forward(x)
        (out.square().sum() + mf.aux_loss(model)).backward()
        results.append([out.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, other in zip(*results, strict=True):
        assert torch.equal(eager, other)
