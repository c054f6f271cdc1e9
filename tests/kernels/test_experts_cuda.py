"""Which code the CUDA side of `experts` takes, run by Triton's interpreter."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import torch

from moeify.kernels import experts_cuda
from moeify.kernels.experts import experts_backward_reference, experts_reference

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the real thing")


def arguments(dtype=torch.float32):
    torch.manual_seed(0)
    x, up, down = torch.randn(5, 16), torch.randn(3, 32, 16), torch.randn(3, 16, 16)
    order = torch.tensor([0, 3, 1, 4, 2], dtype=torch.int32)
    slots = order.argsort().to(torch.int32)[:, None]
    offsets = torch.tensor([2, 4, 5], dtype=torch.int32)
    floats = [t.to(dtype) for t in (x, up, down)]
    weights = torch.rand(5, 1)
    return floats, weights, (order, slots, offsets)


@pytest.mark.parametrize("kernel", ["auto", "cpu", "triton", "grouped_mm"])
def test_every_choice_computes_the_same(kernel):
    (x, up, down), weights, table = arguments()
    options = ("silu", True, True)
    want, hidden = experts_reference(x, weights, up, None, down, None, *table, *options, "auto")
    got, saved = experts_cuda.experts(x, weights, up, None, down, None, *table, *options, kernel)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(saved, hidden, rtol=1e-4, atol=1e-4)
    grad = torch.randn_like(want)
    rest = (x, weights, up, down, None, hidden, *table, "silu", True, False, True, True, True)
    desired = experts_backward_reference(grad, *rest, "auto")
    ours = experts_cuda.experts_backward(grad, *rest, kernel)
    for a, b in zip(ours, desired, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "kernel"), [(torch.float64, "auto"), (torch.float32, "reference")]
)
def test_what_is_left_to_the_reference(dtype, kernel):
    (x, up, down), weights, table = arguments(dtype)
    options = ("silu", True, True, kernel)
    result = experts_cuda.experts(x, weights, up, None, down, None, *table, *options)
    assert result is NotImplemented
