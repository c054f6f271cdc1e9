"""What Dynamo may see of the ops: their calls, never the code that runs them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from moeify import moeify
from moeify.kernels.cpu import experts, gate, rows

D, T, E, K = 8, 6, 4, 2


class Backend:
    """Runs graphs as they are, and keeps where their nodes come from."""

    def __init__(self) -> None:
        self.traces: list[str] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        self.traces += [node.stack_trace or "" for node in gm.graph.nodes]
        return gm.forward


@pytest.fixture
def backend() -> Iterator[Backend]:
    torch._dynamo.reset()
    yield Backend()
    torch._dynamo.reset()


def test_not_where_dynamo_gave_up_on_the_frame_around(backend: Backend) -> None:
    moe = nn.Sequential(nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)))
    layers = [{"select": "all", "experts": E, "top_k": K}]
    plan = {"layers": layers, "router": {"capacity_factor": None}}
    moeify(moe, plan, example_inputs=torch.ones(T, D))

    @torch.compiler.disable(recursive=False)
    def skipped(x: Tensor) -> Tensor:
        return moe(x)

    x, y = (torch.ones(T, D).requires_grad_() for _ in range(2))
    for _ in range(2):
        out = torch.compile(skipped, backend=backend)(x)
        torch.testing.assert_close(out, moe(y))
        out.square().sum().backward()
        moe(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    inside = [t for t in backend.traces if "kernels/registry.py" in t or "kernels/cpu/" in t]
    assert not inside, inside[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_what_calls_the_native_kernels(backend: Backend, dtype: torch.dtype) -> None:
    tokens, weight = torch.randn(T, D).to(dtype), torch.randn(E, D).to(dtype)
    routed = gate.gate(tokens, weight, None, None, None, K, "softmax", "none", "first", False)
    if routed is NotImplemented:
        pytest.skip("no C++ compiler")
    ids = routed[1]
    slots, order, offsets = rows.assign(ids, None, E, T)
    up, down = torch.randn(E, 2 * D, D).to(dtype), torch.randn(E, D, 2 * D).to(dtype)
    weights = rows.combine_weights(routed[0], slots, "normalized")
    call = (
        tokens,
        weights,
        up,
        None,
        down,
        None,
        order,
        slots,
        offsets,
        "gelu",
        False,
        True,
        "cpu",
    )
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (gate.gate, (tokens, weight, None, None, None, K, "softmax", "none", "first", False)),
        (rows.assign, (ids, None, E, T)),
        (rows.dispatch, (tokens, order, slots)),
        (rows.combine_weights, (routed[0], slots, "normalized")),
        (experts.experts, call),
    ]
    for function, args in calls:
        want = function(*args)
        for _ in range(3):
            run = torch.compile(lambda *args, f=function: f(*args), backend=backend)
            torch.testing.assert_close(run(*args), want)
    assert not backend.traces
