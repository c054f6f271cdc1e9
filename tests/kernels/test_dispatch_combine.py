"""dispatch and combine: loops, gradients, dropped routes, round trips."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.library import opcheck

from moeify.kernels.combine import combine, combine_backward
from moeify.kernels.dispatch import dispatch
from moeify.kernels.route import assign


def layout(count, top_k, experts, capacity, seed=0):
    g = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, experts, generator=g).argsort(1)[:, :top_k].int()
    return assign(ids, None, experts, capacity)


@pytest.mark.parametrize("count", [0, 1, 7, 64])
@pytest.mark.parametrize("width", [1, 6, 43])
@pytest.mark.parametrize("dropping", [False, True])
def test_equals_loops(count, width, dropping):
    slots, order, _ = layout(count, 2, 3, count // 3 if dropping else count)
    x = torch.randn(count, width)
    rows = dispatch(x, order, slots)
    for r, flat in enumerate(order.tolist()):
        assert torch.equal(rows[r], x[flat // 2] if flat >= 0 else torch.zeros(width))
    weights, hidden = torch.rand(count, 2), torch.randn(count * 2, width)
    y = combine(hidden, weights, order, slots)
    for t in range(count):
        parts = [weights[t, j] * hidden[slots[t, j]] for j in range(2) if slots[t, j] >= 0]
        torch.testing.assert_close(y[t], sum(parts, torch.zeros(width)))


@pytest.mark.parametrize(("tokens", "rows"), [(5, 0), (0, 8), (5, 3), (5, 16), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_more_or_fewer_rows_than_routes(tokens, rows, dtype):
    slots = torch.full((tokens, 2), -1, dtype=torch.int32)
    order = torch.full((rows,), -1, dtype=torch.int32)
    if tokens and rows:
        slots[3, 1], order[rows - 1] = rows - 1, 7
    x = torch.randn(tokens, 4, dtype=dtype)
    sent = dispatch(x, order, slots)
    hidden = torch.randn(rows, 4, dtype=dtype)
    weights = torch.rand(tokens, 2)
    y = combine(hidden, weights, order, slots)
    grad_hidden, grad_weights = combine_backward(x, hidden, weights, order, slots)
    want = [
        torch.zeros(rows, 4),
        torch.zeros(tokens, 4),
        torch.zeros(rows, 4),
        torch.zeros(tokens, 2),
    ]
    if tokens and rows:
        last, weight = hidden[-1].float(), weights[3, 1]
        want[0][-1], want[1][3], want[2][-1] = x[3].float(), last * weight, x[3].float() * weight
        want[3][3, 1] = last @ x[3].float()
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for got, expected in zip((sent, y, grad_hidden, grad_weights), want, strict=True):
        torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=tolerance)


def test_opcheck():
    slots, order, _ = layout(9, 2, 4, 3)
    x = torch.randn(9, 5, requires_grad=True)
    hidden, weights = (
        torch.randn(18, 5, requires_grad=True),
        torch.rand(9, 2, requires_grad=True),
    )
    opcheck(torch.ops.moeify.dispatch, (x, order, slots))
    opcheck(torch.ops.moeify.combine, (hidden, weights, order, slots))
    opcheck(torch.ops.moeify.combine, (hidden, None, order, slots))
    opcheck(
        torch.ops.moeify.combine_backward,
        (torch.randn(9, 5), hidden.detach(), weights.detach(), order, slots),
    )


@pytest.mark.parametrize("capacity", [2, 7])
def test_gradcheck(capacity):
    slots, order, _ = layout(7, 2, 4, capacity)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(14, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(7, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: dispatch(x, order, slots), (x,))
    assert gradcheck(lambda h, w: combine(h, w, order, slots), (hidden, weights))
    assert gradcheck(lambda h: combine(h, None, order, slots), (hidden,))


def test_garbage_in_unused_rows_changes_nothing():
    slots, order, offsets = layout(8, 2, 3, 2)
    end = int(offsets[-1])
    assert end < 16
    weights = torch.rand(8, 2, requires_grad=True)
    clean = torch.randn(16, 4)
    clean[end:] = 0
    dirty = clean.clone()
    dirty[end:] = float("nan")
    dirty.requires_grad_()
    y = combine(dirty, weights, order, slots)
    assert torch.equal(y, combine(clean, weights, order, slots))
    y.square().sum().backward()
    assert bool(dirty.grad[end:].eq(0).all())
    assert bool(dirty.grad.isfinite().all())
    assert bool(weights.grad.isfinite().all())
    assert bool(weights.grad[slots < 0].eq(0).all())


def test_nan_token_poisons_only_itself():
    slots, order, _ = layout(8, 2, 3, 8)
    x = torch.randn(8, 4)
    x[3] = float("nan")
    y = combine(dispatch(x, order, slots), torch.rand(8, 2), order, slots)
    assert y.isnan().any(1).tolist() == [t == 3 for t in range(8)]


def test_zero_tokens_get_zero_gradients():
    slots, order, _ = layout(0, 2, 3, 0)
    x, weights = torch.randn(0, 4, requires_grad=True), torch.rand(0, 2, requires_grad=True)
    combine(dispatch(x, order, slots), weights, order, slots).sum().backward()
    assert x.grad is not None
    assert weights.grad is not None


def test_low_precision_accumulates_in_float32():
    slots, order, _ = layout(16, 4, 8, 16)
    hidden = torch.randn(64, 8, dtype=torch.bfloat16)
    weights = torch.rand(16, 4)
    y = combine(hidden, weights, order, slots)
    exact = combine(hidden.double(), weights.double(), order, slots)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact.to(torch.bfloat16), atol=0, rtol=2**-8)


def test_deterministic_algorithms():
    slots, order, _ = layout(16, 2, 8, 2)
    x = torch.randn(16, 4, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        combine(dispatch(x, order, slots), torch.rand(16, 2), order, slots).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 40),
    experts=st.integers(1, 9),
    data=st.data(),
    seed=st.integers(0, 2**31),
)
def test_round_trip_gives_the_tokens_back(count, experts, data, seed):
    top_k = data.draw(st.integers(1, experts))
    slots, order, offsets = layout(count, top_k, experts, count, seed)
    x = torch.randn(count, 3, dtype=torch.float64)
    rows = dispatch(x, order, slots)
    y = combine(rows, torch.full((count, top_k), 1 / top_k).double(), order, slots)
    torch.testing.assert_close(y, x, atol=1e-6, rtol=1e-6)
    assert int(offsets[-1]) == count * top_k
    assert sorted(order.tolist()) == list(range(count * top_k))
    assert torch.equal(order.long()[slots.flatten().long()], torch.arange(count * top_k))
