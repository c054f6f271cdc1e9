from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from moeify.kernels.all_to_all_layout import send_layout_reference
from moeify.kernels.assign import assign_reference
from moeify.kernels.combine import combine_backward_reference, combine_reference
from moeify.kernels.combine_weights import (
    COMBINES,
    combine_weights_backward_reference,
    combine_weights_reference,
)
from moeify.kernels.dispatch import dispatch_reference
from moeify.kernels.triton import rows as rows_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
TOLERANCE = {F32: 3e-6, F16: 1e-3, BF16: 1e-2}

shapes = pytest.mark.parametrize(
    ("tokens", "width", "experts", "top_k", "capacity", "dtype"),
    [
        (37, 50, 8, 2, 5, F32),
        (5, 1300, 6, 6, 2, F16),
        (130, 64, 9, 1, 20, BF16),
        (7, 7, 9, 3, 7, F32),
        (6, 3, 4, 2, 0, F32),
        (0, 16, 9, 3, 1, F32),
    ],
)


def layout(tokens, experts, top_k, capacity):
    ids = torch.rand(tokens, experts).topk(top_k).indices.int().to(DEVICE)
    slots, order, _ = assign_reference(ids, None, experts, capacity)
    return slots, order


def rows_of(order, width, dtype):
    """Random rows, NaN where unused."""
    hidden = torch.randn(order.shape[0], width, device=DEVICE).to(dtype)
    return hidden.masked_fill((order < 0)[:, None], torch.nan)


def check(got, expected, dtype):
    assert got.dtype == dtype
    assert got.shape == expected.shape
    loose = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), expected.double(), atol=loose, rtol=loose)


@shapes
def test_dispatch(tokens, width, experts, top_k, capacity, dtype):
    slots, order = layout(tokens, experts, top_k, capacity)
    x = torch.randn(tokens, width, device=DEVICE).to(dtype)
    got = rows_triton.dispatch(x, order, slots)
    assert torch.equal(got, dispatch_reference(x, order, slots))


@shapes
@pytest.mark.parametrize("weighted", [False, True])
def test_combine(tokens, width, experts, top_k, capacity, dtype, weighted):
    slots, order = layout(tokens, experts, top_k, capacity)
    hidden, grad = rows_of(order, width, dtype), torch.randn(tokens, width).to(DEVICE, dtype)
    weights = torch.rand(tokens, top_k, device=DEVICE)
    given = weights if weighted else None
    got = rows_triton.combine(hidden, given, order, slots)
    wide = None if given is None else given.double()
    check(got, combine_reference(hidden.double(), wide, order, slots), dtype)
    ones = weights if weighted else grad.new_ones(slots.shape)
    got = rows_triton.combine_backward(grad, hidden, ones, order, slots)
    expected = combine_backward_reference(
        grad.double(), hidden.double(), ones.double(), order, slots
    )
    check(got[0], expected[0], dtype)
    scale = max(1.0, width**0.5)
    check(got[1] / scale, expected[1] / scale, ones.dtype)
    again = rows_triton.combine_backward(grad, hidden, ones, order, slots)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize(("tokens", "top_k"), [(0, 2), (1100, 1), (700, 3), (5, 60)])
def test_combine_weights(combine, tokens, top_k):
    slots, _ = layout(tokens, max(top_k, 4), top_k, tokens // 2)
    scores = torch.rand(tokens, top_k, device=DEVICE).masked_fill(slots < 0, torch.nan)
    grad = torch.randn(tokens, top_k, device=DEVICE)
    got = rows_triton.combine_weights(scores, slots, combine)
    check(got, combine_weights_reference(scores.double(), slots, combine), F32)
    got = rows_triton.combine_weights_backward(grad, scores, slots, combine)
    expected = combine_weights_backward_reference(grad.double(), scores.double(), slots, combine)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-4)


def test_nan_poisons_its_own_tokens_alone():
    slots, order = layout(40, 5, 2, 40)
    hidden = torch.randn(80, 8, device=DEVICE)
    weights = torch.rand(40, 2, device=DEVICE)
    hidden[11], weights[3, 1] = torch.nan, torch.nan
    out = rows_triton.combine(hidden, weights, order, slots)
    hit = {3, int(order[11]) // 2}
    assert set(out.isnan().any(1).nonzero().flatten().tolist()) == hit
    grad = torch.randn(40, 8, device=DEVICE)
    grad[20] = torch.nan
    to_rows, to_weights = rows_triton.combine_backward(grad, hidden, weights, order, slots)
    bad = {int(slots[3, 1]), *slots[20].tolist()}
    assert set(to_rows.isnan().any(1).nonzero().flatten().tolist()) == bad
    assert set(to_weights.isnan().any(1).nonzero().flatten().tolist()) == {20, int(order[11]) // 2}
    scores = torch.tensor([[torch.nan], [0.0], [0.5]], device=DEVICE)
    kept = torch.tensor([[0], [1], [-1]], dtype=torch.int32, device=DEVICE)
    one = rows_triton.combine_weights(scores, kept, "straight_through").flatten()
    assert one.isnan().tolist() == [True, False, False]
    assert one[1:].tolist() == [1.0, 0.0]


def test_what_is_not_served_is_left_to_the_reference():
    slots, order = layout(4, 3, 2, 4)
    x, rows, scores = torch.rand(4, 6).double(), torch.rand(8, 6).double(), torch.rand(4, 2)
    assert rows_triton.dispatch(x, order, slots) is NotImplemented
    assert rows_triton.combine(rows, scores, order, slots) is NotImplemented
    assert rows_triton.combine_backward(x, rows, scores, order, slots) is NotImplemented
    assert rows_triton.combine_weights(scores.double(), slots, "normalized") is NotImplemented
    assert rows_triton.combine_weights(scores, slots, "total") is NotImplemented
    assert (
        rows_triton.combine_weights_backward(scores, scores.double(), slots, "total")
        is NotImplemented
    )


@pytest.mark.parametrize(("capacity", "parts"), [(2, 1), (9, 1), (40, 2), (-1, 3)])
def test_rows_laid_out_for_sending(capacity, parts):
    ids = torch.rand(21, 4).topk(2).indices.int()
    packed, _, ends = assign_reference(ids, None, 4, 21 if capacity < 0 else capacity)
    order, slots, _ = send_layout_reference(packed, ends, capacity, parts)
    order, slots = order.to(DEVICE), slots.to(DEVICE)
    hidden, weights = rows_of(order, 5, F32), torch.rand(21, 2, device=DEVICE)
    grad = torch.randn(21, 5, device=DEVICE)
    got = rows_triton.combine_backward(grad, hidden, weights, order, slots)
    expected = combine_backward_reference(grad, hidden, weights, order, slots)
    check(got[0], expected[0], F32)
    check(got[1], expected[1], F32)
    check(
        rows_triton.combine(hidden, weights, order, slots),
        combine_reference(hidden, weights, order, slots),
        F32,
    )
    x = torch.randn(21, 5, device=DEVICE)
    assert torch.equal(rows_triton.dispatch(x, order, slots), dispatch_reference(x, order, slots))
