"""What only the C++ experts do: panels and their tails, few rows, no compiler, narrow vectors."""

import logging
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from moeify.errors import DispatchError
from moeify.kernels.cpu import compile
from moeify.kernels.cpu import experts as experts_cpu
from moeify.kernels.elementwise import FUSED
from tests.kernels.cases import NAMES, TOLERANCE, Case, check, problem, truth

pytestmark = pytest.mark.skipif(compile.library("experts") is None, reason="no C++ compiler")

DTYPES = (torch.float32, torch.bfloat16)
SMOOTH = [name for name in FUSED if name != "relu"]
PLAIN = Case(tokens=40, d_in=19, d_ff=21, d_out=23, experts=6, up_bias=True, down_bias=True)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def forgotten():
    """Forget the compiled libraries now, and again at the end."""

    def forget():
        for cache in (compile.library, compile.function):
            cache.cache_clear()

    forget()
    yield forget
    forget()


def check_all(case, dtype, seed=0):
    """Outputs and gradients, and the forward that keeps nothing, against float64."""
    exact = problem(case, dtype, seed)
    expected = exact.to(torch.float64).solve("reference")
    check(exact.solve("cpu"), expected, TOLERANCE[dtype])
    out, hidden = exact.run("cpu", save=False)
    assert hidden.numel() == 0
    check({"out": out}, {"out": expected["out"]}, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tail_of_a_panel(dtype):
    for rows in (*range(1, 51), 63, 64, 65, 97, 191, 193, 257):
        check_all(replace(PLAIN, tokens=rows, experts=1, top_k=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_width(dtype):
    for width in range(1, 51):
        case = Case(
            tokens=7, d_in=width, d_ff=51 - width, d_out=1 + 7 * width % 50, experts=2, top_k=1,
            activation=SMOOTH[width % len(SMOOTH)], gated=width % 2 == 0, up_bias=width % 3 == 0,
            down_bias=width % 3 == 1,
        )  # fmt: skip
        check_all(case, dtype)


@st.composite
def cases(draw):
    width, experts = st.integers(1, 50), draw(st.integers(1, 9))
    tokens = draw(st.integers(0, 60))
    return Case(
        tokens=tokens,
        d_in=draw(width),
        d_ff=draw(width),
        d_out=draw(width),
        experts=experts,
        top_k=draw(st.integers(1, experts)),
        capacity=draw(st.none() | st.integers(0, tokens)),
        activation=draw(st.sampled_from(SMOOTH)),
        gated=draw(st.booleans()),
        up_bias=draw(st.booleans()),
        down_bias=draw(st.booleans()),
        weighted=draw(st.booleans()),
    )


@settings(max_examples=80)
@given(case=cases(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 9))
def test_anything_equals_the_reference(case, dtype, seed):
    check_all(case, dtype, seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("gated", [True, False])
def test_few_rows_per_expert(rows, gated, dtype):
    for width in (1, 15, 16, 17, 100):
        case = replace(PLAIN, tokens=rows, d_in=width, d_ff=2 * width, d_out=width + 1, gated=gated,
                       top_k=1, only=(4,))  # fmt: skip
        check_all(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_without_weights_every_route_counts_as_one(dtype, top_k):
    case = replace(PLAIN, top_k=top_k, weighted=False)
    bare = problem(case, dtype)
    ones = replace(bare, floats=(bare.floats[0], torch.ones(40, top_k), *bare.floats[2:]))
    got, expected = bare.solve("cpu"), ones.solve("cpu")
    expected.pop("weights")
    check(got, expected, 1e-6 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("save", [True, False])
def test_dropped_tokens_are_zero_with_one_choice(dtype, save):
    for capacity in (0, 1, 7):
        exact = problem(replace(PLAIN, tokens=90, top_k=1, capacity=capacity), dtype)
        out, _ = exact.run("cpu", save)
        gone = exact.slots[:, 0] < 0
        assert int(gone.sum()) == 90 - int(exact.offsets[-1])
        assert bool((out[gone] == 0).all())
        assert not bool(out[gone].signbit().any())
        assert bool((out[~gone] != 0).any(1).all())


def test_gradients_of_no_rows_are_zero():
    for dtype in DTYPES:
        for case in (replace(PLAIN, tokens=0), replace(PLAIN, capacity=0)):
            got = problem(case, dtype).solve("cpu")
            assert list(got) == list(NAMES)
            assert all(bool((value == 0).all()) for value in got.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUSED)
def test_activations_at_extreme_values(name, dtype):
    """Where exp overflows or underflows, the activation and its slope still equal the reference."""
    values = torch.tensor([-1e4, -200.0, -89.0, -88.0, -20.0, -1e-8, -0.0, 1e-30, 3.0, 88.0, 90.0,
                           1e4])  # fmt: skip
    count = len(values)
    base = problem(Case(tokens=count, d_in=1, d_ff=3, experts=1, top_k=1, activation=name,
                        gated=False), dtype)  # fmt: skip
    ones = [torch.ones_like(t) for t in (base.floats[2], base.floats[4])]
    floats = (values[:, None].to(dtype), torch.ones(count, 1), ones[0], None, ones[1], None)
    extreme = replace(base, floats=floats, grad=torch.ones_like(base.grad))
    got, expected = extreme.solve("cpu"), extreme.to(torch.float64).solve("reference")
    for key in ("out", "tokens"):
        close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2}
        torch.testing.assert_close(got[key].double(), expected[key], **{"atol": 2e-2, **close})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_rows_with_strided_biases(dtype):
    exact = problem(replace(PLAIN, tokens=3), dtype)
    expected, _ = exact.run("cpu", save=False)
    turned = [t.t().contiguous().t() if t.dim() == 2 else t for t in exact.floats[2:]]
    out, _ = replace(exact, floats=(*exact.floats[:2], *turned)).run("cpu", save=False)
    assert torch.equal(out, expected)


def test_weights_past_two_to_the_31_elements():
    """The memory before the last expert is never touched, so it costs none."""
    experts, d, f = 2**17 + 1, 128, 128
    try:
        up = torch.empty(experts, f, d, dtype=torch.bfloat16)
        down = torch.empty(experts, 8, f, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("not so much address space")
    assert up.numel() > 2**31
    up[-1].normal_(std=d**-0.5)
    down[-1].normal_(std=f**-0.5)
    tokens = torch.randn(3, d).bfloat16()
    order = torch.arange(3, dtype=torch.int32)
    offsets = torch.zeros(experts, dtype=torch.int32)
    offsets[-1] = 3
    out, _ = torch.ops.moeify.experts(
        tokens, None, up, None, down, None, order, order[:, None], offsets, "silu", False, False,
        "cpu",
    )  # fmt: skip
    hidden = F.silu(tokens.double() @ up[-1].double().t())
    expected = {"out": hidden @ down[-1].double().t()}
    check({"out": out}, expected, TOLERANCE[torch.bfloat16])


def test_what_is_not_served_goes_to_the_reference():
    for dtype in (torch.float16, torch.float64):
        exact = problem(PLAIN, dtype)
        rest = (exact.order, exact.slots, exact.offsets, "silu", True, True)
        assert experts_cpu.experts(*exact.floats, *rest, "cpu") is NotImplemented
    single = problem(PLAIN, torch.float32)
    mixed = (single.floats[0].bfloat16(), *single.floats[1:])
    assert experts_cpu.experts(*mixed, *rest, "cpu") is NotImplemented
    assert experts_cpu.experts(*single.floats, *rest, "reference") is NotImplemented


SCRIPT = """
import logging, sys, torch
from moeify.kernels.cpu import compile
from tests.kernels.test_experts_cpu import PLAIN
from tests.kernels.cases import problem

def refuse(source):
    raise AssertionError("asked for a compiler")

compile.compile_cpp = refuse
logging.basicConfig(level="INFO")
torch.save([problem(PLAIN, d).solve("cpu") for d in (torch.float32, torch.bfloat16)], sys.argv[1])
"""


def test_native_code_can_be_switched_off(repo, tmp_path):
    env = {**os.environ, "MOEIFY_NATIVE": "0", "PYTHONPATH": str(repo)}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "got")]
    done = subprocess.run(command, cwd=repo, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "moeify" not in done.stderr
    for got, dtype in zip(torch.load(tmp_path / "got"), DTYPES, strict=True):
        check(got, truth(PLAIN, dtype)[1], TOLERANCE[dtype])


def test_a_source_that_does_not_compile_is_logged_once(forgotten, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="moeify")
    source = compile.source
    broken = {"experts": "int broken( {"}
    monkeypatch.setattr(compile, "source", lambda name: broken.get(name) or source(name))
    expected = problem(PLAIN, torch.float32).solve("reference")
    for _ in range(2):
        got = problem(PLAIN, torch.float32).solve("cpu")
        assert all(torch.equal(got[name], value) for name, value in expected.items())
    assert compile.library("experts") is None
    assert compile.function("experts", "experts_float", "p") is None
    ours = [r for r in caplog.records if r.name == "moeify"]
    assert [r.levelname for r in ours] == ["WARNING"]
    assert ours[0].getMessage().startswith("experts.cpp does not compile here")


def test_vectors_of_eight(forgotten, monkeypatch):
    """The code that processors without AVX-512 run."""
    source = compile.source
    monkeypatch.setattr(compile, "source", lambda name: "#undef __AVX512F__\n" + source(name))
    for dtype in DTYPES:
        for tokens in (1, 3, 30, 75, 300):
            for gated in (True, False):
                check_all(replace(PLAIN, tokens=tokens, gated=gated, capacity=100), dtype)


@pytest.mark.parametrize("tokens", [2, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_table_that_points_nowhere_is_an_error(dtype, tokens):
    x, up, down = torch.ones(tokens, 4), torch.ones(2, 8, 4), torch.ones(2, 4, 8)
    x, up, down = x.to(dtype), up.to(dtype), down.to(dtype)
    order = torch.arange(tokens, dtype=torch.int32)
    slots, ends = order[:, None].contiguous(), torch.tensor([1, tokens], dtype=torch.int32)

    def run(order, slots, ends):
        options = ("relu", False, False, "cpu")
        return torch.ops.moeify.experts(x, None, up, None, down, None, order, slots, ends, *options)

    assert torch.equal(run(order, slots, ends)[0], torch.full((tokens, 4), 32.0, dtype=dtype))
    with pytest.raises(DispatchError, match="offsets"):
        run(order, slots, ends + 1)
    with pytest.raises(DispatchError, match="offsets"):
        run(order, slots, ends.flip(0))
