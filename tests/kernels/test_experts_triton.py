"""The Triton experts and grouped products against their references in float64."""

import json

import pytest
import torch

pytest.importorskip("triton")

import triton

from moeify.kernels.assign import assign_reference
from moeify.kernels.elementwise import FUSED
from moeify.kernels.experts import experts_reference
from moeify.kernels.grouped_linear import (
    grouped_linear_backward_reference,
    grouped_linear_reference,
)
from moeify.kernels.triton import tile_config
from moeify.kernels.triton.experts import experts
from moeify.kernels.triton.grouped_linear import grouped_linear, grouped_linear_backward
from moeify.kernels.triton.tile_config import TileConfig, bucket, choose, parse_table

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

pytestmark = pytest.mark.skipif(
    not CUDA and not triton.knobs.runtime.interpret, reason="needs CUDA or TRITON_INTERPRET=1"
)


def make(tokens, experts, k, d, f, o=None, *, gated=True, bias=True, capacity=None, dead=()):
    """Return float64 arguments of `experts` up to the offsets; no route goes to `dead` experts."""
    g = torch.Generator().manual_seed(tokens + experts)

    def normal(*size, scale=1.0):
        return torch.randn(size, generator=g, dtype=torch.float64) * scale

    o, h = o or d, 2 * f if gated else f
    logits = torch.rand(tokens, experts, generator=g)
    logits[:, list(dead)] = -1
    ids = logits.topk(k, dim=1).indices.int()
    slots, order, offsets = assign_reference(
        ids, None, experts, tokens if capacity is None else capacity
    )
    return [
        normal(tokens, d),
        torch.rand(tokens, k, generator=g),
        normal(experts, h, d, scale=d**-0.5),
        normal(experts, h) if bias else None,
        normal(experts, o, f, scale=f**-0.5),
        normal(experts, o) if bias else None,
        order,
        slots,
        offsets,
    ]


def cast(arguments, dtype):
    def one(x):
        x = x.to(dtype) if x is not None and x.dtype == torch.float64 else x
        return x if x is None else x.to(DEVICE)

    return [one(x) for x in arguments]


def check(arguments, dtype, activation="silu", gated=True, save=True, function=experts):
    """Compare with the reference in float64 of the rounded arguments."""
    given = cast(arguments, dtype)
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in given]
    expected = experts_reference(*wide, activation, gated, save, "auto")
    got = function(*given, activation, gated, save, "auto")
    assert got is not NotImplemented
    for actual, desired in zip(got, expected, strict=True):
        assert actual.dtype == dtype
        error = TOLERANCE[dtype] * max(1.0, desired.abs().max().item()) if desired.numel() else 0
        torch.testing.assert_close(actual.double(), desired, rtol=0, atol=error)
    return got


SHAPES = {
    "odd": {"tokens": 37, "experts": 5, "k": 2, "d": 33, "f": 65, "o": 17},
    "top-1": {"tokens": 50, "experts": 4, "k": 1, "d": 48, "f": 32},
    "empty experts": {"tokens": 40, "experts": 7, "k": 3, "d": 32, "f": 16, "dead": (0, 3, 6)},
    "dropped": {"tokens": 60, "experts": 4, "k": 2, "d": 20, "f": 24, "capacity": 9},
    "dropped top-1": {"tokens": 60, "experts": 4, "k": 1, "d": 20, "f": 24, "capacity": 9},
    "one expert": {"tokens": 150, "experts": 1, "k": 1, "d": 40, "f": 130},
    "no bias": {"tokens": 30, "experts": 3, "k": 2, "d": 32, "f": 32, "bias": False},
}


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.thin(2)
def test_equals_the_reference(name, dtype, gated):
    check(make(**SHAPES[name], gated=gated), dtype, gated=gated)


@pytest.mark.gpu
@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16(name):
    check(make(**SHAPES[name]), torch.bfloat16)


@pytest.mark.parametrize("activation", FUSED)
def test_every_activation(activation):
    check(make(20, 3, 2, 16, 32), torch.float32, activation)


def test_without_saving_and_without_weights():
    arguments = make(40, 3, 2, 32, 16)
    arguments[1] = None
    out, hidden = check(arguments, torch.float32, save=False)
    assert hidden.shape == (0, 32)
    saved, _ = check(arguments, torch.float32, save=True)
    assert torch.equal(out, saved)


def test_weights_of_any_strides():
    arguments = make(40, 3, 2, 32, 16)
    expected, _ = experts(*cast(arguments, torch.float32), "silu", True, True, "auto")
    for place in (2, 4):
        arguments[place] = arguments[place].transpose(1, 2).contiguous().transpose(1, 2)
    out, _ = check(arguments, torch.float32)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("tokens", [0, 1])
def test_very_few_tokens(tokens):
    for save in (True, False):
        out, _ = check(make(tokens, 3, 2, 16, 8), torch.float32, save=save)
        assert out.shape == (tokens, 16)


def test_all_dropped():
    arguments = make(6, 3, 1, 16, 8)
    arguments[6:] = [torch.full((6,), -1), torch.full((6, 1), -1), torch.zeros(3)]
    arguments[6:] = [x.int() for x in arguments[6:]]
    out, hidden = check(arguments, torch.float32)
    assert not out.any()
    assert not hidden.any()


@pytest.mark.parametrize("k", [1, 2])
def test_nan_stays_in_its_token(k):
    arguments = cast(make(40, 4, k, 32, 16, capacity=9), torch.float32)
    clean, _ = experts(*arguments, "gelu", True, True, "auto")
    arguments[0] = arguments[0].clone()
    arguments[0][7] = torch.nan
    out, hidden = experts(*arguments, "gelu", True, True, "auto")
    others = torch.arange(40) != 7
    assert torch.equal(out[others], clean[others])
    kept = (arguments[7][7] >= 0).sum()
    assert hidden.isnan().any(1).sum() == kept
    assert out[7].isnan().all() == bool(kept)


@pytest.mark.parametrize("k", [1, 2])
def test_uninitialised_memory_is_never_read(k):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills it with NaN
    try:
        assert torch.empty(1).isnan()
        check(make(60, 4, k, 20, 24, capacity=9), torch.float32)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_are_equal():
    arguments = cast(make(64, 5, 3, 32, 48), torch.float16)
    first, second = (experts(*arguments, "gelu", True, True, "auto") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_float64_is_not_served():
    arguments = make(4, 2, 1, 8, 8)
    assert experts(*arguments, "silu", True, True, "auto") is NotImplemented
    rows, weight, offsets = torch.randn(4, 3).double(), torch.randn(2, 5, 3).double(), arguments[8]
    assert grouped_linear(rows, weight, None, offsets) is NotImplemented
    assert grouped_linear_backward(rows, rows, offsets, False) is NotImplemented


COUNTS = [[3, 0, 4], [0, 0, 7], [40], [0], [0, 0], [1, 1, 1], [0, 64, 1]]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("unused", [0, 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grouped_linear(counts, unused, dtype):
    rows = torch.randn(sum(counts) + unused, 33).to(DEVICE, dtype)
    weight = torch.randn(len(counts), 33, 17).to(DEVICE, dtype).transpose(1, 2)
    bias = torch.randn(len(counts), 17).to(DEVICE, dtype)
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    error = {"rtol": TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    for vector in (bias, None):
        wide = None if vector is None else vector.double()
        expected = grouped_linear_reference(rows.double(), weight.double(), wide, offsets)
        got = grouped_linear(rows, weight, vector, offsets)
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), expected, **error)
        assert not got[sum(counts) :].any()


@pytest.mark.skipif(
    not CUDA and triton.__version__ < "3.7", reason="this interpreter needs loops of known length"
)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_grouped_linear_backward(counts, dtype):
    rows = torch.randn(sum(counts) + 19, 33).to(DEVICE, dtype)
    offsets = torch.tensor(counts, device=DEVICE).cumsum(0).int()
    error = {"rtol": TOLERANCE[dtype], "atol": 10 * TOLERANCE[dtype]}
    grad = torch.randn(17, rows.shape[0]).to(DEVICE, dtype).t()
    rows[sum(counts) :] = torch.nan  # unused rows are in nobody's gradient
    for with_bias in (True, False):
        wanted = grouped_linear_backward_reference(grad.double(), rows.double(), offsets, with_bias)
        actual = grouped_linear_backward(grad, rows, offsets, with_bias)
        for a, b in zip(actual, wanted, strict=True):
            assert a.dtype == dtype
            torch.testing.assert_close(a.double(), b, **error)


def test_tile_sizes_do_not_follow_the_token_count():
    cpu = torch.device("cpu")
    configs = {choose(rows, 8, 4096, 1024, torch.bfloat16, cpu) for rows in range(1, 20000, 7)}
    assert {config.bm for config in configs} == {16, 32, 64, 128}
    assert len(configs) <= 5
    assert bucket(0, 4) == bucket(16, 1) == 16
    assert bucket(17, 1) == 32
    assert bucket(10**9, 1) == 1024


@pytest.mark.parametrize("kib", [48, 100, 164, 228])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_fit_the_shared_memory(kib, dtype, monkeypatch):
    monkeypatch.setattr(tile_config, "shared_memory", lambda _: kib * 1024)
    for rows in (1, 100, 1000, 100000):
        config = choose(rows, 8, 4096, 4096, dtype, torch.device("cpu"))
        step = (config.bm + config.bn) * config.bk * dtype.itemsize
        assert config.stages * step <= kib * 1024
        assert config.programs(dtype.itemsize, kib * 1024) >= 1


ENTRY = {
    "device": "NVIDIA H200",
    "dtype": "bfloat16",
    "bucket": 64,
    "n": 4096,
    "k": 1024,
    "bm": 64,
    "bn": 128,
    "bk": 64,
    "warps": 4,
    "stages": 4,
    "group": 8,
}


def test_measured_table():
    table = parse_table(json.dumps({"entries": [ENTRY]}))
    config = table["NVIDIA H200", "bfloat16", 64, 4096, 1024]
    assert config == TileConfig(bm=64, bn=128, bk=64, warps=4, stages=4, group=8)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([{**ENTRY, "bm": 48}], "entry 0: bm: 48 is not a power of two"),
        ([{**ENTRY, "bn": 8}], "each must be at least 16"),
        ([{**ENTRY, "stages": 0}], "stages: 0 is not a positive integer"),
        ([{**ENTRY, "bucket": 63}], "63 is not a bucket"),
        ([{**ENTRY, "dtype": "float64"}], "'float64' is not one of"),
        ([{**ENTRY, "n": "4096"}], "not of type int"),
        ([{"device": "NVIDIA H200"}], "the keys must be device"),
        ([ENTRY, ENTRY], "entry 1: .* appears twice"),
        ({}, 'a list "entries"'),
    ],
)
def test_an_error_in_the_table_names_its_entry(entries, message):
    with pytest.raises(ValueError, match=message):
        parse_table(json.dumps({"entries": entries}))
