"""grouped_linear against one F.linear per expert, in outputs and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.library import opcheck

from moeify.errors import DispatchError
from moeify.kernels.grouped_linear import grouped_linear, grouped_linear_backward


def case(counts, unused=0, k=5, n=3, dtype=torch.float64, bias=True):
    g = torch.Generator().manual_seed(len(counts))
    total = sum(counts) + unused
    rows = torch.randn(total, k, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(len(counts), n, k, generator=g, dtype=torch.float64).to(dtype)
    vector = torch.randn(len(counts), n, generator=g, dtype=torch.float64).to(dtype)
    offsets = torch.tensor(counts).cumsum(0).int()
    return rows, weight.requires_grad_(), vector.requires_grad_() if bias else None, offsets


def slow(rows, weight, bias, offsets):
    out, start = [], 0
    for e, end in enumerate(offsets.tolist()):
        out.append(F.linear(rows[start:end], weight[e], None if bias is None else bias[e]))
        start = end
    return torch.cat([*out, rows.new_zeros(rows.shape[0] - start, weight.shape[1])])


CASES = [[3, 0, 4], [0, 0, 7], [7, 0, 0], [5], [0], [0, 0], [1, 1, 1, 1], [0, 64, 1]]


@pytest.mark.parametrize("counts", CASES, ids=str)
@pytest.mark.parametrize("unused", [0, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_one_linear_per_expert(counts, unused, bias):
    rows, weight, vector, offsets = case(counts, unused, k=7, n=9, bias=bias)
    got, expected = (f(rows, weight, vector, offsets) for f in (grouped_linear, slow))
    torch.testing.assert_close(got, expected)
    wanted = [rows, weight] + ([vector] if bias else [])
    actual = torch.autograd.grad(got.square().sum(), wanted)
    desired = torch.autograd.grad(expected.square().sum(), wanted)
    for a, b in zip(actual, desired, strict=True):
        torch.testing.assert_close(a, b)
    # an expanded (stride 0) gradient
    for a, b in zip(
        torch.autograd.grad(grouped_linear(rows, weight, vector, offsets).sum(), wanted),
        torch.autograd.grad(slow(rows, weight, vector, offsets).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    rows, weight, bias, offsets = case([3, 0, 2], unused=2)
    assert gradcheck(lambda r, w, b: grouped_linear(r, w, b, offsets), (rows, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    rows, weight, bias, offsets = case([3, 0, 4], unused=1, dtype=dtype)
    opcheck(torch.ops.moeify.grouped_linear, (rows, weight, bias, offsets))
    opcheck(torch.ops.moeify.grouped_linear, (rows, weight, None, offsets))
    for with_bias in (True, False):
        args = (torch.randn(8, 3, dtype=dtype), rows.detach(), offsets, with_bias)
        opcheck(torch.ops.moeify.grouped_linear_backward, args)


def test_weights_of_any_strides():
    rows, weight, bias, offsets = case([3, 4], k=6, n=4)
    turned = weight.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not turned.is_contiguous()
    got = grouped_linear(rows, turned, bias, offsets)
    torch.testing.assert_close(got, slow(rows, weight, bias, offsets))
    (grad,) = torch.autograd.grad(got.sum(), turned)
    assert grad.shape == turned.shape


def test_frozen_parameters_cost_no_gradient():
    rows, weight, _, offsets = case([3, 4])
    out = grouped_linear(rows, weight.detach(), None, offsets)
    assert out.grad_fn.saved_tensors[0] is None
    (grad,) = torch.autograd.grad(out.sum(), rows)
    assert grad.shape == rows.shape
    only_weight = grouped_linear(rows.detach(), weight, None, offsets)
    assert only_weight.grad_fn.saved_tensors[1] is None
    torch.autograd.grad(only_weight.sum(), weight)


def test_nan_row_poisons_only_itself():
    rows, weight, bias, offsets = case([3, 0, 4], unused=2)
    rows = rows.detach()
    rows[1], rows[7:] = float("nan"), float("nan")
    out = grouped_linear(rows, weight, bias, offsets)
    assert out.isnan().any(1).tolist() == [r == 1 for r in range(9)]
    grad = torch.full((9, 3), 1.0, dtype=torch.float64)
    grad[7:] = float("nan")
    d_weight, d_bias = grouped_linear_backward(grad, rows, offsets, True)
    assert d_weight.isnan().flatten(1).any(1).tolist() == [True, False, False]
    assert bool(d_bias.isfinite().all())


@pytest.mark.parametrize("ends", [[3, 2], [1, 9], [-1, 2], [4], [1, 2, 3]])
def test_bad_offsets_are_refused(ends):
    with pytest.raises(DispatchError, match="offsets"):
        grouped_linear(torch.rand(4, 2), torch.rand(2, 2, 2), None, torch.tensor(ends).int())


def test_a_wrong_dtype_is_refused():
    rows, weight, _, offsets = case([3, 4])
    with pytest.raises(RuntimeError):
        grouped_linear(rows.float(), weight, None, offsets)
