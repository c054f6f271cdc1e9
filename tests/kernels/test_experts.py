"""The `experts` op on a CPU: every kernel against float64, in outputs and gradients."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.library import opcheck

from moeify.kernels.elementwise import FUSED
from moeify.kernels.registry import reference_only
from moeify.nn.activations import ACTIVATIONS
from tests.kernels.cases import NAMES, TOLERANCE, Case, check, matrix, problem, truth

KERNELS = ("reference", "cpu", "grouped_mm")
DTYPES = (torch.float32, torch.bfloat16)

# Widths of whole 16 bytes in both dtypes, so that all kernels serve them.
SMALL = Case(tokens=29, d_in=16, d_ff=24, d_out=8, experts=5, up_bias=True, down_bias=True)
EDGES = {
    "all tokens to one expert": replace(SMALL, top_k=1, only=(3,)),
    "most experts empty": replace(SMALL, experts=40, only=(0, 17, 39)),
    "the last experts empty": replace(SMALL, experts=9, only=(0, 1), top_k=2),
    "capacity exactly met": replace(SMALL, tokens=12, experts=2, top_k=2, capacity=12),
    "capacity exactly met by one": replace(SMALL, tokens=12, experts=3, top_k=1, only=(1,),
                                           capacity=12),
    "one over capacity": replace(SMALL, tokens=13, experts=3, top_k=1, only=(1,), capacity=12),
    "capacity of one": replace(SMALL, capacity=1),
    "capacity of none": replace(SMALL, capacity=0),
    "half dropped": replace(SMALL, tokens=300, capacity=60, gated=False, activation="gelu"),
    "long groups": replace(SMALL, tokens=700, experts=2, top_k=1, activation="relu2", gated=False),
    "wide enough for panels": replace(SMALL, tokens=150, d_in=64, d_ff=136, d_out=72, experts=3),
}  # fmt: skip


@pytest.fixture
def deterministic():
    """Same results in every run, and NaN in all memory that was not written yet."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert bool(torch.empty(3).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def threads():
    """One thread: sizes are small, and other tests run beside these."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


# The kernel changes fastest, so that one truth serves all of them.
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", matrix(), ids=lambda c: f"{c.tokens}x{c.experts}")
def test_of_every_size(case, dtype, kernel):
    given, expected = truth(case, dtype)
    check(given.solve(kernel), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EDGES.values(), ids=list(EDGES))
def test_of_every_shape_of_routing(case, dtype, kernel):
    given, expected = truth(case, dtype)
    check(given.solve(kernel), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_every_activation(name, gated, dtype, kernel):
    kink = name == "relu" and dtype == torch.bfloat16  # rounding moves values over it
    case = replace(
        SMALL, activation=name, gated=gated, up_bias=gated and not kink, down_bias=not gated
    )
    given, expected = truth(case, dtype)
    check(given.solve(kernel), expected, TOLERANCE[dtype])


def test_float16_runs_on_the_reference():
    given, expected = truth(SMALL, torch.float16)
    check(given.solve("auto"), expected, TOLERANCE[torch.float16])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", FUSED)
def test_the_reference_is_a_loop_over_tokens(name, gated):
    given = problem(replace(SMALL, tokens=9, activation=name, gated=gated, capacity=3))
    tokens, weights, up, up_bias, down, down_bias = given.floats
    expected = torch.zeros(9, 8, dtype=torch.float64)
    owner = torch.searchsorted(given.offsets, torch.arange(18), right=True)
    for t, j in itertools.product(range(9), range(2)):
        if (row := int(given.slots[t, j])) < 0:
            continue
        e = owner[row]
        h = F.linear(tokens[t], up[e], up_bias[e])
        h = ACTIVATIONS[name](h[:24]) * h[24:] if gated else ACTIVATIONS[name](h)
        expected[t] += weights[t, j] * F.linear(h, down[e], down_bias[e])
    assert (given.slots < 0).any()
    out, _ = given.run("reference")
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("capacity", [None, 2])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("name", FUSED)
@pytest.mark.thin(3)
def test_gradcheck(name, gated, biased, capacity):
    case = Case(
        tokens=5, d_in=3, d_ff=2, d_out=2, experts=3, capacity=capacity, activation=name,
        gated=gated, up_bias=biased, down_bias=biased, weighted=biased or gated,
    )  # fmt: skip
    given = problem(case)
    leaves = [t.requires_grad_() for t in given.floats if t is not None]

    def run(*tensors):
        left = iter(tensors)
        floats = tuple(None if t is None else next(left) for t in given.floats)
        return replace(given, floats=floats).run("reference")[0]

    assert gradcheck(run, leaves)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype, kernel):
    for case in (SMALL, replace(SMALL, weighted=False, up_bias=False, capacity=3)):
        given = problem(case, dtype)
        rest = (given.order, given.slots, given.offsets, "silu", True)
        leaves = [None if t is None else t.clone().requires_grad_() for t in given.floats]
        opcheck(torch.ops.moeify.experts, (*leaves, *rest, True, kernel))
        opcheck(torch.ops.moeify.experts, (*given.floats, *rest, False, kernel))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.thin(3)
def test_opcheck_of_the_backward(kernel, needs):
    case = replace(SMALL, weighted=needs != (False, True, False), down_bias=needs[0], capacity=5)
    given = problem(case, torch.float32)
    tokens, weights, up, _, down, down_bias = given.floats
    arguments = (
        given.grad, tokens, weights, up, down, down_bias, given.run(kernel)[1], given.order,
        given.slots, given.offsets, "silu", True, True, *needs, kernel,
    )  # fmt: skip
    utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    opcheck(torch.ops.moeify.experts_backward, arguments, test_utils=utils)
    got = torch.ops.moeify.experts_backward(*arguments)
    wanted = [needs[0], needs[1] and case.weighted, *[needs[2]] * 4]
    wanted[5] &= case.down_bias
    assert [g.numel() > 0 for g in got] == wanted


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_frozen_inputs_change_no_other_gradient(dtype, kernel):
    given = problem(SMALL, dtype)
    whole = given.solve(kernel)
    names = list(whole)[1:]
    for kept in (["tokens"], ["weights"], ["up", "down"], ["tokens", "down_bias"]):
        leaves = [
            t.detach().requires_grad_(name in kept)
            for name, t in zip(names, given.floats, strict=True)
        ]
        out, _ = replace(given, floats=tuple(leaves)).run(kernel)
        out.backward(given.grad)
        for name, leaf in zip(names, leaves, strict=True):
            if name in kept:
                assert torch.equal(leaf.grad, whole[name]), name
            else:
                assert leaf.grad is None


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_save_nothing_is_kept_and_nothing_changes(dtype, kernel):
    for case in (SMALL, replace(SMALL, tokens=2), replace(SMALL, tokens=0)):
        given = problem(case, dtype)
        kept, hidden = given.run(kernel)
        out, nothing = given.run(kernel, save=False)
        assert hidden.shape == (case.tokens * 2, 48)
        assert nothing.shape == (0, 48)
        check({"out": out}, {"out": kept}, TOLERANCE[dtype])


def test_a_backward_without_save_is_refused():
    given = problem(SMALL, torch.float32)
    given.floats[0].requires_grad_()
    out, _ = given.run("cpu", save=False)
    with pytest.raises(RuntimeError, match="save=True"):
        out.sum().backward()


@pytest.mark.parametrize("name", [*NAMES[1:], "grad"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype, kernel, name):
    given, expected = truth(SMALL, dtype)
    strided = replace(
        given,
        floats=tuple(
            _scattered(t) if n == name else t for n, t in zip(NAMES[1:], given.floats, strict=True)
        ),
        grad=_scattered(given.grad) if name == "grad" else given.grad,
    )
    check(strided.solve(kernel), expected, TOLERANCE[dtype])


def _scattered(tensor):
    """The same numbers, transposed in memory, with NaN between them."""
    wide = tensor.new_full([2 * n for n in reversed(tensor.shape)], float("nan"))
    view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
    view.copy_(tensor.permute(*reversed(range(tensor.dim()))))
    return view.permute(*reversed(range(tensor.dim())))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_expanded_gradient(dtype, kernel):
    given = problem(SMALL, dtype)
    ones = replace(given, grad=torch.ones_like(given.grad))
    expanded = replace(given, grad=torch.ones((), dtype=dtype).expand(given.grad.shape))
    assert expanded.grad.stride() == (0, 0)
    check(expanded.solve(kernel), ones.solve(kernel), 1e-6)


def _matmul_spreads_nan(dtype):
    rows = torch.ones(20, 48, dtype=dtype)
    rows[3] = float("nan")
    product = rows @ torch.ones(48, 16, dtype=dtype)
    return product.isnan().any(1).nonzero().flatten().tolist() != [3]


@pytest.mark.parametrize("what", ["token", "grad"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_where_it_belongs(dtype, kernel, what):
    if _matmul_spreads_nan(dtype):
        pytest.skip("torch's own matmul spreads NaN over rows here, as that of 2.11 in bfloat16")
    case = replace(SMALL, tokens=70, experts=6, capacity=20)
    given = problem(case, dtype)
    (given.floats[0] if what == "token" else given.grad)[11] = float("nan")
    kept = given.slots[11][given.slots[11] >= 0]
    assert len(kept)
    owners = torch.searchsorted(given.offsets, kept, right=True).tolist()
    got = given.solve(kernel)
    for name in ("out", "tokens", "weights"):
        hit = got[name].isnan().any(1).nonzero().flatten().tolist()
        assert hit == ([11] if (name, what) != ("out", "grad") else []), name
    for name in ("up", "up_bias", "down", "down_bias"):
        # the bias of the last projection alone sees the gradient and not the token
        expected = set(owners) if (name, what) != ("down_bias", "token") else set()
        hit = got[name].flatten(1).isnan().any(1).nonzero().flatten().tolist()
        assert set(hit) == expected, name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_expert_poisons_only_its_tokens(dtype, kernel):
    given = problem(replace(SMALL, experts=6), dtype)
    for parameter in given.floats[2:]:
        parameter[4] = float("nan")
    rows = torch.arange(int(given.offsets[3]), int(given.offsets[4]))
    tokens = sorted({int(given.order[r]) // 2 for r in rows})
    assert 0 < len(tokens) < 29
    got = given.solve(kernel)
    assert got["out"].isnan().any(1).nonzero().flatten().tolist() == tokens
    for name in ("up", "up_bias", "down"):
        assert got[name].flatten(1).isnan().any(1).nonzero().flatten().tolist() == [4]


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_two_runs_in_poisoned_memory_give_the_same_bits(dtype, kernel):
    few = replace(SMALL, tokens=3, experts=16)
    for case in (SMALL, few, *EDGES.values(), replace(SMALL, tokens=0)):
        given = problem(case, dtype)
        first, second = given.solve(kernel), given.solve(kernel)
        for name, value in first.items():
            assert bool(value.isfinite().all()), (case, name)
            assert torch.equal(value, second[name]), (case, name)
        assert bool(given.run(kernel)[1].isfinite().all())
        with torch.no_grad():
            assert bool(given.run(kernel, save=False)[0].isfinite().all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_number_of_threads_does_not_matter_in_float32(threads, kernel):
    wide = replace(SMALL, tokens=300, d_in=64, d_ff=128, d_out=48, experts=7)
    for case in (SMALL, wide, replace(wide, tokens=3), replace(wide, capacity=30)):
        given = problem(case, torch.float32)
        results = []
        for count in (1, 2):
            threads(count)
            results.append(given.solve(kernel) | {"few": given.run(kernel, save=False)[0]})
        for name, value in results[0].items():
            other = results[1][name]
            if kernel == "cpu":
                assert torch.equal(value, other), name
            else:  # torch's matmul, which on some processors sums in another order
                torch.testing.assert_close(value, other, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_dropped_tokens_get_exact_zeros(kernel):
    for top_k in (1, 2):
        case = replace(SMALL, tokens=64, experts=2, top_k=top_k, only=(0, 1), capacity=5)
        for dtype in DTYPES:
            given = problem(case, dtype)
            got = given.solve(kernel)
            gone = (given.slots < 0).all(1)
            assert int(gone.sum()) >= 54
            assert bool((got["out"][gone] == 0).all())
            assert bool((got["tokens"][gone] == 0).all())
            assert bool((got["weights"][given.slots < 0] == 0).all())
            assert bool((got["out"][~gone] != 0).any(1).all())


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_around_the_op_changes_nothing(kernel):
    given = problem(SMALL, torch.float32)
    expected = given.solve(kernel)
    with torch.autocast("cpu", torch.bfloat16):
        got = given.solve(kernel)
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_reference_only_forces_the_reference():
    given = problem(replace(SMALL, tokens=200, d_in=128), torch.float32)
    with reference_only():
        expected, got = given.solve("reference"), given.solve("cpu")
    assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_more_than_two_to_the_31_elements_on_meta():
    def empty(*size, dtype=torch.bfloat16):
        return torch.empty(size, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)

    tokens, d, f, experts, k = 2**20, 8192, 16384, 256, 8
    routes = [empty(tokens * k, dtype=torch.int32), empty(tokens, k, dtype=torch.int32)]
    floats = [empty(tokens, d), empty(tokens, k, dtype=torch.float32), empty(experts, 2 * f, d),
              empty(experts, 2 * f), empty(experts, d, f), empty(experts, d)]  # fmt: skip
    out, hidden = torch.ops.moeify.experts(
        *floats, *routes, empty(experts, dtype=torch.int32), "silu", True, True, "auto"
    )
    assert out.shape == (tokens, d)
    assert hidden.shape == (tokens * k, 2 * f)
    for leaf, grad in zip(floats, torch.autograd.grad(out.sum(), floats), strict=True):
        assert grad.shape == leaf.shape
