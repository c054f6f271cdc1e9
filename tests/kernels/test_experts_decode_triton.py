"""The experts' decode path against the reference in float64."""

import pytest
import torch

pytest.importorskip("triton")

import triton

from moeify.kernels.elementwise import FUSED
from moeify.kernels.experts import experts_reference
from moeify.kernels.triton import experts as experts_triton
from moeify.kernels.triton.experts_decode import MOST_ROUTES, experts_decode

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.skipif(
    not CUDA and not triton.knobs.runtime.interpret, reason="needs CUDA or TRITON_INTERPRET=1"
)


def make(tokens, experts, k, d, f, o, *, gated=True, bias=True, dtype=torch.float32, drop=()):
    """Return arguments of `experts` up to the offsets; `drop` names flat routes without a row."""
    ids = torch.rand(tokens, experts).topk(k, dim=1).indices.flatten()
    ids[list(drop)] = experts
    experts_of_rows, order = ids.sort(stable=True)
    kept = int((ids < experts).sum())
    slots = torch.full((tokens * k,), -1)
    slots[order[:kept]] = torch.arange(kept)
    order[kept:] = -1
    offsets = torch.searchsorted(experts_of_rows, torch.arange(experts), right=True)
    h = 2 * f if gated else f
    values = [
        torch.randn(tokens, d),
        torch.rand(tokens, k),
        torch.randn(experts, h, d) * d**-0.5,
        torch.randn(experts, h) if bias else None,
        torch.randn(experts, o, f) * f**-0.5,
        torch.randn(experts, o) if bias else None,
    ]
    cast = [x if x is None else x.to(DEVICE, dtype) for x in values]
    cast[1] = values[1].to(DEVICE)
    return [*cast, *(x.int().to(DEVICE) for x in (order, slots.view(tokens, k), offsets))]


def check(arguments, activation="silu", gated=True):
    dtype = arguments[0].dtype
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in arguments]
    expected, _ = experts_reference(*wide, activation, gated, False, "auto")
    out, hidden = experts_decode(*arguments, activation, gated, False, "auto")
    assert out.dtype == dtype
    assert hidden.shape == (0, arguments[2].shape[1])
    error = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=error, atol=error)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(
    ("tokens", "experts", "k"), [(1, 8, 2), (1, 1, 1), (3, 5, 5), (5, 33, 4), (2, 4, 1)]
)
def test_equals_the_reference(tokens, experts, k, gated, dtype):
    check(make(tokens, experts, k, 33, 65, 17, gated=gated, dtype=dtype), gated=gated)


@pytest.mark.gpu
def test_bfloat16():
    check(make(4, 16, 4, 512, 768, 512, dtype=torch.bfloat16))


@pytest.mark.parametrize("activation", FUSED)
def test_every_activation(activation):
    check(make(2, 4, 2, 16, 24, 16), activation)


def test_rows_longer_than_a_block():
    check(make(1, 2, 2, 1100, 600, 20, bias=False))


def test_strides_and_no_weights():
    arguments = make(2, 3, 2, 32, 16, 32)
    expected = check(arguments)
    for place in (2, 4):
        arguments[place] = arguments[place].transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(check(arguments), expected)
    arguments[1] = None
    check(arguments)


def test_dropped_routes_add_zero():
    arguments = make(4, 3, 2, 16, 8, 16, drop=(0, 1, 4))
    out = check(arguments)
    assert not out[0].any()
    arguments[0] = arguments[0].clone()
    arguments[0][0] = torch.nan  # its routes are all dropped
    assert torch.equal(experts_decode(*arguments, "silu", True, False, "auto")[0], out)
    arguments[0][2] = torch.nan
    poisoned, _ = experts_decode(*arguments, "silu", True, False, "auto")
    assert poisoned[2].isnan().all()
    assert torch.equal(poisoned[[0, 1, 3]], out[[0, 1, 3]])


def test_no_tokens():
    assert check(make(0, 3, 2, 16, 8, 5)).shape == (0, 5)


def test_what_it_does_not_serve():
    few, many = make(2, 3, 2, 16, 8, 16), make(MOST_ROUTES + 1, 3, 1, 16, 8, 16)
    assert experts_decode(*few, "silu", True, True, "auto") is NotImplemented
    assert experts_decode(*many, "silu", True, False, "auto") is NotImplemented
    double = make(2, 3, 2, 16, 8, 16, dtype=torch.float64)
    assert experts_decode(*double, "silu", True, False, "auto") is NotImplemented


def test_experts_choose_it_for_few_routes(monkeypatch):
    calls = []

    def decode(*arguments):
        calls.append(arguments[0].shape[0])
        return experts_decode(*arguments)

    monkeypatch.setattr(experts_triton, "experts_decode", decode)
    for tokens, save in ((2, False), (2, True), (9, False)):
        arguments = make(tokens, 8, 2, 16, 8, 16)
        out, _ = experts_triton.experts(*arguments, "silu", True, save, "auto")
        expected, _ = experts_reference(*arguments, "silu", True, save, "auto")
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    assert calls == [2]
