"""Torch's default dtype and device belong to the user and change no number."""

from contextlib import contextmanager

import pytest
import torch

import moeify.nn.experts  # noqa: F401  registers the ops
from moeify.kernels import route
from moeify.nn.router import Router


@contextmanager
def default_dtype(dtype):
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


DEFAULTS = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "top_k"), [(2, 2), (100, 1), (100, 2)])
def test_defaults_of_torch_change_nothing(tokens, top_k, dtype, default):
    given = [
        torch.randn(tokens, 24).to(dtype),
        torch.randn(4, 24),
        torch.randn(4, 64, 24).to(dtype),
        torch.randn(4, 24, 32).to(dtype),
        torch.randn(tokens, 24).to(dtype),
    ]

    def run():
        x, router, up, down = (t.clone().requires_grad_() for t in given[:4])
        found = route.route(x, router, top_k=top_k, capacity=tokens // 2, combine="normalized")
        table = (found.order, found.slots, found.offsets)
        options = ("silu", True, True, "auto")
        out, _ = torch.ops.moeify.experts(
            x, found.weights, up, None, down, None, *table, *options
        )  # fmt: skip
        grads = [given[4], torch.ones_like(found.aux_loss)]
        torch.autograd.backward([out, found.aux_loss], grads)
        return [out.detach(), *found[:-1], x.grad, router.grad, up.grad, down.grad]

    want = run()
    with DEFAULTS[default]():
        got = run()
    for ours, desired in zip(got, want, strict=True):
        assert ours.dtype == desired.dtype
        assert torch.equal(ours, desired)


def test_random_drop_draws_float32_whatever_the_default():
    router = Router(8, experts=2, capacity_factor=0.5, min_capacity=1, drop="random")
    x = torch.randn(5000, 8)
    torch.manual_seed(1)
    want = router(x).slots
    torch.manual_seed(1)
    with default_dtype(torch.bfloat16):
        got = router(x).slots
    assert torch.equal(got, want)
