from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from moeify.kernels.gate import BALANCES, SCORES, gate_backward_reference, gate_reference
from moeify.kernels.triton import arithmetic, gate, gate_backward

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def framed(tensor):
    """The same values with NaN in memory before and after them."""
    frame = torch.full((tensor.numel() + 256,), torch.nan, dtype=tensor.dtype, device=DEVICE)
    inner = frame[128 : 128 + tensor.numel()].view(tensor.shape)
    return inner.copy_(tensor)


def inputs(
    rows, width, experts, dtype=F32, weight_dtype=None, jitter=False, noisy=False, bias=False
):
    weight = torch.randn(experts, width) / width**0.5
    return (
        framed(torch.randn(rows, width).to(dtype)),
        framed(weight.to(weight_dtype or dtype)),
        framed(torch.randn(experts) * 0.2) if bias else None,
        framed((1 + 0.1 * torch.rand(rows, width)).to(dtype)) if jitter else None,
        framed(torch.randn(rows, experts)) if noisy else None,
    )


def double(args):
    return [a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args]


def check(got, expected, **tolerance):
    for actual, desired in zip(got, expected, strict=True):
        assert actual.shape == desired.shape
        torch.testing.assert_close(actual.double(), desired.double(), **tolerance)


@pytest.mark.parametrize(
    ("shape", "dtypes", "score", "noise", "balance", "extras"),
    [
        ((37, 50, 8, 2), (F32, F32), "softmax", "none", "all", ()),
        ((70, 64, 7, 3), (F32, F32), "softmax", "gumbel", "first", ("bias", "jitter")),
        ((70, 33, 200, 3), (F32, BF16), "softmax", "rsample", "all", ("jitter",)),
        ((5, 300, 60, 60), (F16, F16), "sigmoid", "none", "first", ("bias",)),
        ((33, 40, 9, 2), (BF16, BF16), "sigmoid", "gumbel", "all", ()),
        ((20, 40, 9, 1), (BF16, F32), "sigmoid", "rsample", "all", ("bias", "jitter")),
        ((17, 24, 500, 4), (F16, F32), "softmax", "none", "all", ()),
        ((3, 5, 1, 1), (F32, F32), "softmax", "none", "all", ()),
        ((0, 5, 4, 2), (F32, F32), "softmax", "none", "all", ()),
    ],
)
def test_gate_equals_the_reference(shape, dtypes, score, noise, balance, extras):
    rows, width, experts, top_k = shape
    options = dict.fromkeys(extras, True)
    given = inputs(rows, width, experts, *dtypes, noisy=noise != "none", **options)
    tail = (top_k, score, noise, balance, False)
    got = gate.gate(*given, *tail)
    expected = gate_reference(*double(given), *tail)
    assert [t.dtype for t in got] == [t.dtype for t in gate_reference(*given, *tail)]
    assert torch.equal(got[1], expected[1])
    assert torch.equal(got[3], expected[3])
    check(got, expected, atol=3e-6, rtol=3e-6)
    again = gate.gate(*given, *tail)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("noise", ["none", "gumbel"])
def test_ties_nan_and_infinity_choose_as_the_reference(noise):
    tokens = torch.randn(40, 8, device=DEVICE)
    tokens[:4] = 0
    tokens[5] = torch.nan
    tokens[9, 0] = torch.inf
    weight = torch.randn(12, 8, device=DEVICE)
    weight[3] = weight[7]
    logit_noise = torch.randn(40, 12, device=DEVICE).round()
    logit_noise[1, 2:5] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    tail = (5, "softmax", noise, "all", False)
    got = gate.gate(tokens, weight, None, None, logit_noise, *tail)
    expected = gate_reference(tokens, weight, None, None, logit_noise, *tail)
    usual = torch.arange(40, device=DEVICE) != 9  # sums of infinities differ by order
    assert torch.equal(got[1][usual], expected[1][usual])
    assert all(len(set(row)) == 5 and min(row) >= 0 and max(row) < 12 for row in got[1].tolist())
    poisoned = got[0].isnan().any(1)
    assert poisoned.tolist() == expected[0].isnan().any(1).tolist()
    assert not poisoned[usual][6:].any()


@pytest.mark.parametrize(
    ("shape", "dtypes", "score", "balance", "surrogate", "jitter", "which"),
    [
        ((37, 50, 8, 2), (F32, F32), "softmax", "all", False, False, "slaz"),
        ((5, 300, 60, 60), (F32, F32), "sigmoid", "first", True, False, "sz"),
        ((70, 64, 200, 3), (F32, F32), "sigmoid", "all", False, True, "a"),
        ((2100, 20, 9, 3), (F32, F32), "softmax", "first", True, True, "slaz"),
        ((33, 20, 9, 3), (F16, F16), "softmax", "all", False, False, "sa"),
        ((33, 20, 40, 3), (BF16, F32), "sigmoid", "all", True, False, "sa"),
        ((33, 20, 9, 3), (F32, BF16), "softmax", "all", False, True, ""),
        ((0, 20, 9, 3), (F32, F32), "softmax", "all", False, True, "slaz"),
    ],
)
def test_gate_backward_equals_the_reference(
    shape, dtypes, score, balance, surrogate, jitter, which
):
    rows, width, experts, top_k = shape
    tokens, weight, _, noise, _ = inputs(rows, width, experts, *dtypes, jitter=jitter)
    forward = (tokens, weight, None, noise, None, top_k, score, "none", balance, surrogate)
    _, ids, logits, *_ = gate_reference(*forward)
    grads = {
        "s": framed(torch.randn(rows, top_k)),
        "l": torch.randn(experts, rows, device=DEVICE).t(),
        "a": torch.tensor(3.0, device=DEVICE),
        "z": torch.tensor(2.0, device=DEVICE),
    }
    given = [grads[name] if name in which else None for name in "slaz"]
    given += [tokens, weight, noise, framed(logits), ids, score, balance, surrogate]
    got = gate_backward.gate_backward(*given)
    expected = gate_backward_reference(*double(given))
    assert [g.dtype for g in got] == list(dtypes)
    for actual, desired in zip(got, expected, strict=True):
        loose = {F32: 1e-5, F16: 2e-3, BF16: 1e-2}[actual.dtype]
        check([actual], [desired], atol=loose, rtol=loose)
    again = gate_backward.gate_backward(*given)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def test_a_nan_token_poisons_its_own_gradient_alone():
    tokens, weight, *_ = inputs(40, 8, 4)
    tokens[7] = torch.nan
    tail = (2, "softmax", "none", "all", False)
    _, ids, logits, *_ = gate_reference(tokens, weight, None, None, None, *tail)
    grad = torch.randn(40, 2, device=DEVICE)
    given = (grad, None, None, None, tokens, weight, None, logits, ids, "softmax", "all", False)
    to_tokens, _ = gate_backward.gate_backward(*given)
    assert to_tokens.isnan().any(1).nonzero().flatten().tolist() == [7]


@triton.jit
def split_kernel(x, out, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    high, middle, low = arithmetic.split(tl.load(x + index))
    tl.store(out + index, high.to(tl.float32))
    tl.store(out + BLOCK + index, middle.to(tl.float32))
    tl.store(out + 2 * BLOCK + index, low.to(tl.float32))


def test_three_bfloat16_numbers_are_a_float32_number():
    x = torch.randn(1024, device=DEVICE) * 10.0 ** torch.randint(-20, 20, (1024,), device=DEVICE)
    out = torch.empty(3, 1024, device=DEVICE)
    split_kernel[(1,)](x, out, 1024)
    assert torch.equal(out, out.bfloat16().float())
    assert torch.equal(out.double().sum(0), x.double())


@pytest.mark.parametrize(
    "change",
    [{"dtype": torch.float64}, {"experts": 513}, {"score": "relu"}, {"balance": "second"}],
)
def test_what_is_not_served_is_left_to_the_reference(change):
    options = {"dtype": F32, "experts": 4, "score": SCORES[0], "balance": BALANCES[0]} | change
    given = inputs(3, 8, options["experts"], options["dtype"])
    tail = (1, options["score"], "none", options["balance"], False)
    assert gate.gate(*given, *tail) is NotImplemented
    ids = torch.zeros(3, 1, dtype=torch.int32)
    logits = torch.zeros(3, options["experts"])
    back = (None, None, None, None, *given[:2], None, logits, ids, *tail[1::2], False)
    assert gate_backward.gate_backward(*back) is NotImplemented
