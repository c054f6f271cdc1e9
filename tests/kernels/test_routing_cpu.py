"""The C++ routing kernels against the references, from the same float32 logits."""

import itertools

import pytest
import torch

from moeify.kernels import gate as gate_op
from moeify.kernels.assign import assign_reference
from moeify.kernels.combine import combine_backward_reference, combine_reference
from moeify.kernels.combine_weights import (
    COMBINES,
    combine_weights_backward_reference,
    combine_weights_reference,
)
from moeify.kernels.cpu import gate
from moeify.kernels.cpu import rows as rows_cpu
from moeify.kernels.cpu.compile import library
from moeify.kernels.dispatch import dispatch_reference
from moeify.kernels.gate import BALANCES, SCORES, gate_backward_reference, gate_reference

pytestmark = pytest.mark.skipif(library("rows") is None, reason="no C++ compiler")

NOISES = [("none", False), ("rsample", True), ("gumbel", True)]
SIZES = [(t, e, k) for t in (0, 1, 7, 64, 1000) for e in (1, 2, 8, 64, 512) for k in (1, 2, 8)
         if k <= e]  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread():
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(
        a.double(), b.double(), rtol=tolerance, atol=tolerance, equal_nan=True
    )


def same(got, expected):
    for actual, desired in zip(got, expected, strict=True):
        assert actual.dtype == desired.dtype
        assert torch.equal(actual, desired)


def reference_of_logits(logits, *options):
    """The reference given logits: as tokens of width E, with the identity as router."""
    return gate_reference(logits, torch.eye(logits.shape[1], dtype=logits.dtype), *options)


def gate_of_logits(logits, bias, added, options):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "_logits", lambda *_: logits)
        eye = torch.eye(logits.shape[1])
        return gate.gate(logits, eye, bias, None, added, *options)


def check_gate(got, bias, added, options):
    """Ids exactly as of the same float32 logits; scores and losses as in float64."""
    scores, ids, logits, counts, *losses = got
    single = choose(logits, bias, added, options)
    assert torch.equal(ids, single.int())
    assert torch.equal(counts, torch.bincount(single.flatten(), minlength=logits.shape[1]).int())
    wide = logits.double()
    probabilities = wide.softmax(1) if options[1] == "softmax" else wide.sigmoid()
    close(scores, probabilities.gather(1, single))
    if torch.equal(choose(wide, bias, added, options), single):
        expected = reference_of_logits(wide, bias, None, added, *options)
        for actual, desired in zip(losses, expected[4:], strict=True):
            close(actual, desired)


def choose(logits, bias, added, options):
    top_k, score, noise = options[:3]
    probabilities = logits.softmax(1) if score == "softmax" else logits.sigmoid()
    return gate_op._choose(logits, probabilities, bias, added, top_k, score, noise)


@pytest.mark.parametrize(("count", "experts", "top_k"), SIZES)
def test_gate_of_every_size(count, experts, top_k):
    tokens, weight = torch.randn(count, 19), torch.randn(experts, 19)
    for score, balance in itertools.product(SCORES, BALANCES):
        options = (top_k, score, "none", balance, False)
        got = gate.gate(tokens, weight, None, None, None, *options)
        close(got[2], tokens.double() @ weight.double().t())
        check_gate(got, None, None, options)


@pytest.mark.parametrize(("noise", "noisy"), NOISES)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("biased", [False, True])
def test_gate_with_noise_and_bias(noise, noisy, score, biased):
    for count, experts, top_k in [(1, 8, 2), (70, 5, 1), (200, 20, 3), (33, 64, 64), (9, 40, 17)]:
        tokens, weight = torch.randn(count, 7), torch.randn(experts, 7)
        bias = torch.randn(experts) if biased else None
        added = torch.randn(count, experts) if noisy else None
        jitter = 1 + 0.1 * torch.rand(count, 7)
        options = (top_k, score, noise, "first", True)
        got = gate.gate(tokens, weight, bias, jitter, added, *options)
        close(got[2], (tokens * jitter).double() @ weight.double().t())
        check_gate(got, bias, added, options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [3, 16, 17, 300])
def test_gate_reads_narrow_dtypes_and_any_strides(dtype, count, monkeypatch):
    monkeypatch.setattr(gate, "BLOCK_BYTES", 4 * 40 * 64)
    tokens = torch.randn(40, count).t().to(dtype)
    for weight in (torch.randn(6, 80)[:, ::2], torch.randn(6, 40).to(dtype)):
        for jitter in (None, torch.rand(count, 40, dtype=dtype)):
            got = gate.gate(tokens, weight, None, jitter, None, 2, "softmax", "none", "all", False)
            wide = tokens.double() * (1 if jitter is None else jitter.double())
            assert got[2].dtype == torch.float32
            close(got[2], wide @ weight.double().t())
            check_gate(got, None, None, (2, "softmax", "none", "all", False))


@pytest.mark.parametrize("experts", [6, 16, 100])
@pytest.mark.parametrize("noise", ["none", "gumbel"])
def test_ties_and_special_values_choose_as_the_reference(experts, noise):
    nan, inf = float("nan"), float("inf")
    logits = torch.randint(-2, 3, (64, experts)).float()
    logits[3] = nan
    logits[5, 2] = nan
    logits[7, 1] = inf
    logits[8, :3] = -inf
    logits[9] = -0.0
    logits[9, 4:] = 0.0
    logits[11] = -inf
    added = torch.randint(-1, 2, (64, experts)).float() if noise == "gumbel" else None
    for top_k in (1, 2, 5):
        for bias in (None, torch.zeros(experts)):
            options = (top_k, "sigmoid", noise, "all", False)
            got = gate_of_logits(logits, bias, added, options)
            assert torch.equal(got[1], choose(logits, bias, added, options).int())


def test_tokens_without_width():
    tokens, weight = torch.empty(40, 0), torch.empty(3, 0)
    for x in (tokens, tokens[:2]):
        got = gate.gate(x, weight, None, None, None, 1, "softmax", "none", "all", False)
        assert torch.equal(got[2], torch.zeros(len(x), 3))
        grads = gate.gate_backward(
            None, got[2], None, None, x, weight, None, got[2], got[1], "softmax", "all", False
        )
        assert [g.shape for g in grads] == [x.shape, weight.shape]


def test_a_nan_token_poisons_only_its_scores():
    tokens, weight = torch.randn(6, 9), torch.randn(5, 9)
    tokens[2] = float("nan")
    for count in (6, 30):
        many = torch.cat([tokens, torch.randn(count - 6, 9)])
        scores, ids, *_ = gate.gate(
            many, weight, None, None, None, 2, "softmax", "none", "all", False
        )
        assert scores.isnan().any(1).nonzero().flatten().tolist() == [2]
        assert ids[2].tolist() == [0, 1]


def cotangents(count, experts, top_k, which):
    grads = (torch.randn(count, top_k), torch.randn(count, experts), torch.randn(()),
             torch.randn(()))  # fmt: skip
    return [grad if use else None for grad, use in zip(grads, which, strict=True)]


@pytest.mark.parametrize("which", list(itertools.product([False, True], repeat=4)))
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("surrogate", [False, True])
def test_gate_backward(which, score, surrogate):
    for (count, experts, top_k), balance in zip(
        [(0, 3, 1), (1, 2, 1), (7, 20, 3), (70, 64, 8)], BALANCES * 2, strict=True
    ):
        tokens, weight = torch.randn(count, 11), torch.randn(experts, 11)
        jitter = torch.rand(count, 11) if count == 7 else None
        logits = (tokens if jitter is None else tokens * jitter) @ weight.t()
        ids = logits.topk(top_k).indices.int()
        args = (tokens, weight, jitter, logits)
        options = (score, balance, surrogate)
        grads = cotangents(count, experts, top_k, which)
        got = gate.gate_backward(*grads, *args, ids, *options)
        wide = [None if x is None else x.double() for x in (*grads, *args)]
        expected = gate_backward_reference(*wide, ids, *options)
        for actual, desired in zip(got, expected, strict=True):
            close(actual, desired)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gate_backward_of_narrow_dtypes(dtype, monkeypatch):
    monkeypatch.setattr(gate, "BLOCK_BYTES", 4 * 40 * 64)
    tokens, weight = torch.randn(300, 40).to(dtype), torch.randn(6, 40).to(dtype)
    logits = tokens.float() @ weight.float().t()
    ids = logits.topk(2).indices.int()
    for jitter in (None, torch.rand(300, 40, dtype=dtype)):
        grads = cotangents(300, 6, 2, [True] * 4)
        args = (*grads, tokens, weight, jitter, logits, ids, "softmax", "all", True)
        with torch.autocast("cpu", torch.bfloat16):
            got = gate.gate_backward(*args)
        for actual, desired in zip(got, gate_backward_reference(*args), strict=True):
            assert actual.dtype == dtype
            close(actual, desired, 1e-2)


def routes(count, experts, top_k):
    return torch.stack([torch.randperm(experts)[:top_k] for _ in range(count)]).int()


@pytest.mark.parametrize(("count", "experts", "top_k"), [(1, 1, 1), (7, 8, 2), (500, 64, 8),
                                                         (900, 512, 2), (300, 3, 3)])  # fmt: skip
def test_assign(count, experts, top_k):
    ids = routes(count, experts, top_k)
    ties = torch.randint(0, 4, (count, top_k)) / 4
    ties.view(-1)[::5] = float("nan")
    ties.view(-1)[1::7] = float("-inf")
    ties.view(-1)[2::7] = float("inf")
    ties.view(-1)[3::7] = -0.0
    priorities = [None, ties, torch.rand(count)[:, None].expand(ids.shape), ties.bfloat16()]
    for priority in priorities:
        for capacity in {0, 1, count * top_k // experts, count // 2 + 1, count, count + 5}:
            args = (ids, priority, experts, capacity)
            same(rows_cpu.assign(*args), assign_reference(*args))


def test_assign_nothing():
    empty = torch.empty(0, 2, dtype=torch.int32)
    slots, order, offsets = rows_cpu.assign(empty, None, 3, 0)
    assert slots.shape == (0, 2)
    assert order.shape == (0,)
    assert offsets.tolist() == [0, 0, 0]


def test_assign_in_parallel():
    torch.set_num_threads(2)
    ids = torch.rand(20_000, 8).topk(7).indices.int()
    for priority, capacity in [(None, 20_000), (None, 15_000), (torch.rand(ids.shape), 15_000)]:
        args = (ids, priority, 8, capacity)
        same(rows_cpu.assign(*args), assign_reference(*args))


def packed(count, experts, top_k, capacity):
    ids = routes(count, experts, top_k) if count else torch.empty(0, top_k, dtype=torch.int32)
    return assign_reference(ids, None, experts, capacity)[:2]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("top_k", [1, 2, 8])
def test_combine_weights(combine, top_k):
    slots, _ = packed(60, 9, top_k, 5 * top_k)
    scores = torch.rand(top_k, 60).t()
    scores[0] = float("nan")
    scores[1] = 0
    args = (scores, slots, combine)
    close(
        rows_cpu.combine_weights(*args),
        combine_weights_reference(scores.double(), slots, combine),
    )
    scores[1] = 0.5
    grad = torch.randn(60, 1).expand(60, top_k)
    expected = combine_weights_backward_reference(grad.double(), scores.double(), slots, combine)
    close(rows_cpu.combine_weights_backward(grad, *args), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 33, 64])
@pytest.mark.parametrize(("count", "top_k", "capacity"), [(0, 2, 0), (1, 1, 1), (90, 2, 20),
                                                          (90, 5, 90)])  # fmt: skip
def test_rows_there_and_back(dtype, width, count, top_k, capacity):
    slots, order = packed(count, 7, top_k, capacity)
    tokens = torch.randn(count, 2 * width).to(dtype)[:, :width]
    rows = rows_cpu.dispatch(tokens, order, slots)
    assert torch.equal(rows, dispatch_reference(tokens, order, slots))
    hidden = torch.randn(count * top_k, width).to(dtype)
    hidden[order < 0] = float("nan")
    weights = torch.rand(count, top_k)
    exact = 1e-5 if dtype == torch.float32 else 8e-3
    for factor in (None, weights):
        got = rows_cpu.combine(hidden, factor, order, slots)
        assert got.dtype == dtype
        wide = None if factor is None else factor.double()
        close(got, combine_reference(hidden.double(), wide, order, slots), exact)
    grad = torch.randn(count, 1).to(dtype).expand(count, width)
    got = rows_cpu.combine_backward(grad, hidden, weights, order, slots)
    expected = combine_backward_reference(
        grad.double(), hidden.double(), weights.double(), order, slots
    )
    assert [x.dtype for x in got] == [dtype, torch.float32]
    close(got[0], expected[0], exact)
    close(got[1], expected[1], 3e-5)


def test_a_nan_row_poisons_only_its_token():
    slots, order = packed(40, 6, 2, 40)
    hidden = torch.randn(80, 20)
    hidden[5] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        out = rows_cpu.combine(hidden.to(dtype), None, order, slots)
        assert out.isnan().any(1).nonzero().flatten().tolist() == [int(order[5]) // 2]


def test_bfloat16_rounds_to_nearest_even():
    hidden = torch.randn(64, 50).bfloat16()
    slots = torch.arange(64, dtype=torch.int32).view(32, 2)
    got = rows_cpu.combine(hidden, None, slots.flatten(), slots)
    expected = hidden.float().view(32, 2, 50).sum(1).bfloat16()
    assert torch.equal(got, expected)


def test_results_do_not_depend_on_the_number_of_threads():
    logits, bias = torch.randn(3000, 96), torch.randn(96)
    options = (2, "sigmoid", "none", "all", False)
    ids = logits.topk(2).indices.int()
    slots, order, _ = assign_reference(ids, None, 96, 50)
    grads = cotangents(3000, 96, 2, [True] * 4)
    hidden, weights = torch.randn(6000, 96), torch.rand(3000, 2)

    def run():
        out = list(gate_of_logits(logits, bias, None, options))
        whole = torch.eye(96)
        back = (logits, whole, None, logits, ids, "softmax", "all", False)
        out.append(gate.gate_backward(*grads, *back)[0])
        out.append(rows_cpu.combine(hidden, weights, order, slots))
        out += rows_cpu.combine_backward(logits, hidden, weights, order, slots)
        few = gate.gate(logits[:16], logits[:512], None, None, None, *options)
        return [*out, few[2]]

    one = run()
    torch.set_num_threads(2)
    two = run()
    same(one, two)


def test_what_is_not_served_goes_to_the_reference():
    x, w = torch.randn(3, 4), torch.randn(5, 4)
    options = (2, "softmax", "none", "all", False)
    assert gate.gate(x.double(), w, None, None, None, *options) is NotImplemented
    assert gate.gate(x, w, None, None, None, 2, "relu", *options[2:]) is NotImplemented
    assert gate.gate(x, w, None, None, torch.randn(5), *options) is NotImplemented
    assert rows_cpu.combine_weights(x.double(), x.int(), "normalized") is NotImplemented
    ids = routes(3, 5, 2)
    assert rows_cpu.assign(ids, torch.rand(3, 2).double(), 5, 1) is NotImplemented
    assert rows_cpu.combine(x.half(), None, ids, ids) is NotImplemented
