"""The Triton backward of the fused experts against the float64 reference."""

import os

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton

from moeify.kernels.assign import assign_reference
from moeify.kernels.elementwise import FUSED
from moeify.kernels.experts import experts_backward_reference, experts_reference
from moeify.kernels.triton.experts_backward import experts_backward

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1"
    and triton.__version__.startswith("3.6.")
    and np.lib.NumpyVersion(np.__version__) >= "2.4.0",
    reason="Triton 3.6 interprets no loop to a loaded bound with NumPy 2.4",
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("tokens", "weights", "up", "up_bias", "down", "down_bias")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def case(
    t=37, d=33, f=21, o=19, e=5, k=2, *, activation="silu", gated=True, biased=True,
    weighted=True, capacity=None, empty=(), dtype=torch.float32,
):  # fmt: skip
    """The reference's arguments in float64, made of values that `dtype` holds exactly."""
    g = torch.Generator().manual_seed(t * 31 + k)

    def draw(*shape, scale=1.0):
        value = torch.randn(shape, generator=g, dtype=torch.float64) * scale
        return value.to(dtype).double().to(DEVICE)

    h = 2 * f if gated else f
    chance = torch.ones(t, e)
    chance[:, list(empty)] = 0
    ids = torch.multinomial(chance, k, generator=g) if t else torch.zeros(0, k)
    slots, order, offsets = assign_reference(ids.int().to(DEVICE), None, e, capacity or t)
    tokens, up, down = draw(t, d), draw(e, h, d, scale=d**-0.5), draw(e, o, f, scale=f**-0.5)
    up_bias, down_bias = (draw(e, h), draw(e, o)) if biased else (None, None)
    weights = draw(t, k).float().double() if weighted else None
    _, hidden = experts_reference(
        tokens, weights, up, up_bias, down, down_bias, order, slots, offsets,
        activation, gated, True, "auto",
    )  # fmt: skip
    hidden = hidden.to(dtype).double()
    return [
        draw(t, o), tokens, weights, up, down, down_bias, hidden, order, slots, offsets,
        activation, gated, biased, True, True, True, "auto",
    ]  # fmt: skip


def cast(args, dtype):
    """The same arguments in `dtype`, with combine weights in float32."""
    floats = [torch.is_tensor(a) and a.is_floating_point() for a in args]
    out = [a.to(dtype) if f else a for a, f in zip(args, floats, strict=True)]
    out[2] = None if args[2] is None else args[2].float()
    return out


def check(args, dtype=torch.float32):
    expected = experts_backward_reference(*args)
    got = experts_backward(*cast(args, dtype))
    for name, actual, truth in zip(NAMES, got, expected, strict=True):
        assert actual.shape == truth.shape, name
        assert actual.dtype == (torch.float32 if name == "weights" else dtype), name
        if truth.numel():
            scale = float(truth.abs().max())
            error = float((actual.double() - truth).abs().max())
            assert error <= TOLERANCE[dtype] * max(scale, 1.0), (name, error, scale)
    return got


@pytest.mark.parametrize("activation", FUSED)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.thin(2)  # an odd number of activations: each of them once, gated or not
def test_activations(activation, gated):
    check(case(t=9, activation=activation, gated=gated))


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("capacity", [None, 4])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.thin(2)
def test_routes(k, capacity, biased):
    args = case(k=k, capacity=capacity, biased=biased)
    got = check(args)
    slots = args[8]
    assert bool((slots < 0).any()) == (capacity is not None)
    assert not got[1][slots < 0].any()
    assert not got[0][(slots < 0).all(1)].any()


@pytest.mark.parametrize(
    "shape", [(1, 5, 3, 7), (6, 42, 123, 31), (80, 64, 64, 64), (300, 40, 48, 24)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.thin(3)
def test_sizes(shape, dtype):
    t, d, f, o = shape
    check(case(t, d, f, o, e=3, dtype=dtype), dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 2])
def test_bfloat16(k):
    check(case(300, 256, 384, 256, e=7, k=k, dtype=torch.bfloat16), torch.bfloat16)


def test_empty_experts_get_zeros():
    grads = check(case(k=2, empty=(0, 2, 4)))
    for grad in grads[2:]:
        assert not grad[[0, 2, 4]].any()
        assert grad[[1, 3]].any()


@pytest.mark.parametrize("k", [1, 2])
def test_no_tokens(k):
    grads = check(case(t=0, k=k))
    assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("k", [1, 2])
def test_without_weights(k):
    grads = check(case(t=9, k=k, weighted=False))
    assert grads[1].shape == (0,)


@pytest.mark.parametrize("needed", range(8), ids=lambda n: f"{n:03b}")
@pytest.mark.thin(3)  # 000, 011 and 110: each of three independent gradients with and without
def test_only_what_is_needed(needed):
    args = case(t=7)
    full = experts_backward(*cast(args, torch.float32))
    needs = [bool(needed & bit) for bit in (4, 2, 1)]
    args[13:16] = needs
    part = check(args)
    wanted = [needs[0], needs[1], *[needs[2]] * 4]
    for actual, whole, want in zip(part, full, wanted, strict=True):
        assert torch.equal(actual, whole) if want else actual.shape == (0,)


def test_any_strides():
    args = cast(case(t=9), torch.float32)
    expected = experts_backward(*args)
    args[3] = args[3].transpose(1, 2).contiguous().transpose(1, 2)
    args[4] = torch.stack([args[4], args[4]], dim=3)[..., 0]
    for actual, truth in zip(experts_backward(*args), expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=0, atol=0)
    args[0] = args[0][:, :1].expand_as(args[0])
    check([a.double() if torch.is_tensor(a) and a.is_floating_point() else a for a in args])


@pytest.fixture
def poisoned():
    """`torch.empty` gives NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("k", [1, 3])
def test_two_runs_are_equal_and_read_no_fresh_memory(k):
    assert torch.ones(1).new_empty(3).isnan().all()
    args = cast(case(k=k, capacity=5, dtype=torch.float16), torch.float16)
    for first, second in zip(experts_backward(*args), experts_backward(*args), strict=True):
        assert first.isfinite().all()
        assert torch.equal(first, second)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("source", ["grad", "tokens", "hidden", "unused"])
def test_nan_stays_where_it_is(k, source):
    args = cast(case(t=23, e=3, k=k, capacity=6), torch.float32)
    order, slots, offsets = args[7:10]
    row = 1
    token = int(order[row]) // k
    if source == "grad":
        args[0][token] = float("nan")
    elif source == "tokens":
        args[1][token] = float("nan")
    elif source == "hidden":
        args[6][row] = float("nan")
    else:
        args[6][int(offsets[-1]) :] = float("nan")
    grads = experts_backward(*args)
    rows = [row] if source == "hidden" else [int(s) for s in slots[token] if s >= 0]
    rows = [] if source == "unused" else rows
    experts = {int((offsets <= r).sum()) for r in rows}
    bad_weights = set() if source == "tokens" else {int(order[r]) for r in rows}
    bad_tokens = set() if source == "tokens" else {token} if rows else set()
    assert set(grads[0].isnan().any(1).nonzero().flatten().tolist()) == bad_tokens
    assert set(grads[1].flatten().isnan().nonzero().flatten().tolist()) == bad_weights
    assert set(grads[2].flatten(1).isnan().any(1).nonzero().flatten().tolist()) == experts
    for grad in grads[3:]:
        assert set(grad.flatten(1).isnan().any(1).nonzero().flatten().tolist()) <= experts


def test_what_is_not_served():
    args = case(t=5)
    assert experts_backward(*args) is NotImplemented
    args = cast(args, torch.float32)
    assert experts_backward(*args[:10], "mish", *args[11:]) is NotImplemented
    assert experts_backward(*args[:-1], "reference") is NotImplemented
    args[2] = args[2].double()
    assert experts_backward(*args) is NotImplemented
