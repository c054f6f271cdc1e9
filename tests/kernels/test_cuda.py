"""The Triton kernels on a real GPU: numbers, gradients, one graph, CUDA graphs, determinism."""

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.kernels import route

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 5e-3}


class Gated(nn.Module):
    def __init__(self, width=128, hidden=192):
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def block(dtype, experts=8, top_k=2, **rule):
    torch.manual_seed(0)
    layer = {"select": "all", "experts": experts, "top_k": top_k, **rule}
    plan = {"layers": [layer], "init": {"experts": "noise", "noise_std": 1.0}}
    model = nn.Sequential(Gated()).to("cuda", dtype)
    x = torch.randn(4, 128, device="cuda", dtype=dtype)
    return mf.moeify(model, plan, example_inputs=x).eval()


def run(model, x, grad):
    x = x.clone().requires_grad_()
    model.zero_grad()
    out = model(x)
    out.backward(grad)
    return [out.detach(), x.grad, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kernel", ["auto", "triton", "grouped_mm"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 64, 1000])
def test_against_float64_on_the_cpu(tokens, dtype, kernel):
    model = block(dtype, kernel=kernel)
    x = torch.randn(tokens, 128, device="cuda", dtype=dtype)
    grad = torch.randn_like(x)
    got = run(model, x, grad)
    want = run(model.to("cpu", torch.float64), x.cpu().double(), grad.cpu().double())
    for ours, desired in zip(got, want, strict=True):
        gap = (ours.cpu().double() - desired).norm()
        assert gap <= TOLERANCE[dtype] * desired.norm().clamp_min(1e-6)


@pytest.mark.parametrize("top_k", [1, 2])
def test_routing_equals_the_reference(top_k):
    tokens = torch.randn(1000, 64, device="cuda")
    weight = torch.randn(32, 64, device="cuda")
    for capacity in (1000, 20):
        here = route.route(tokens, weight, top_k=top_k, capacity=capacity)
        there = route.route(tokens.cpu().double(), weight.cpu().double(), top_k=top_k,
                            capacity=capacity)  # fmt: skip
        for name in ("ids", "slots", "order", "offsets", "counts"):
            assert torch.equal(getattr(here, name).cpu(), getattr(there, name)), name
        torch.testing.assert_close(here.weights.cpu().double(), there.weights, rtol=1e-5, atol=1e-6)


def test_two_runs_are_equal_bit_for_bit():
    model = block(torch.bfloat16)
    x = torch.randn(777, 128, device="cuda", dtype=torch.bfloat16)
    first, second = run(model, x, torch.ones_like(x)), run(model, x, torch.ones_like(x))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_one_graph_for_any_number_of_tokens():
    model = block(torch.bfloat16)
    compiled = torch.compile(model, fullgraph=True)
    for tokens in (1, 2, 8, 100, 4096):
        x = torch.randn(tokens, 128, device="cuda", dtype=torch.bfloat16)
        torch.testing.assert_close(compiled(x), model(x), rtol=2e-2, atol=2e-2)


def test_decoding_in_a_cuda_graph():
    model = block(torch.bfloat16, experts=64)
    x = torch.randn(1, 128, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compile before the capture
            model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        for seed in range(3):  # other tokens choose other experts
            torch.manual_seed(seed)
            x.normal_()
            graph.replay()
            torch.testing.assert_close(out, model(x))
