"""Experts and ModuleExperts against one dense MLP per expert."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moeify.nn.activations import ACTIVATIONS, activation
from moeify.nn.experts import Experts, ModuleExperts

OFFSETS = torch.tensor([3, 3, 8], dtype=torch.int32)  # expert 1 is empty


def slow(experts, rows, offsets):
    """Run one dense MLP per expert on its rows."""
    act, out, start = ACTIVATIONS[experts.activation], [], 0
    first = "gate_up" if experts.gated else "up"
    w1, b1 = getattr(experts, f"{first}_proj"), getattr(experts, f"{first}_bias")
    for e, end in enumerate(offsets.tolist()):
        h = F.linear(rows[start:end], w1[e], None if b1 is None else b1[e])
        h = act(h[:, : experts.d_ff]) * h[:, experts.d_ff :] if experts.gated else act(h)
        b2 = experts.down_bias
        out.append(F.linear(h, experts.down_proj[e], None if b2 is None else b2[e]))
        start = end
    return torch.cat([*out, rows.new_zeros(rows.shape[0] - start, experts.d_out)])


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_dense_mlps(name, gated, bias):
    experts = Experts(experts=3, d_in=5, d_ff=7, d_out=6, activation=name, gated=gated, bias=bias,
                      dtype=torch.float64)  # fmt: skip
    rows = torch.randn(10, 5, dtype=torch.float64, requires_grad=True)
    got, expected = experts(rows, OFFSETS), slow(experts, rows, OFFSETS)
    torch.testing.assert_close(got, expected)
    wanted = [rows, *experts.parameters()]
    cotangent = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, wanted, cotangent),
        torch.autograd.grad(expected, wanted, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_names_and_shapes():
    gated = Experts(experts=3, d_in=5, d_ff=7, gated=True, bias=False, down_bias=True)
    assert {n: tuple(p.shape) for n, p in gated.named_parameters()} == {
        "gate_up_proj": (3, 14, 5),
        "down_proj": (3, 5, 7),
        "down_bias": (3, 5),
    }
    plain = Experts(experts=3, d_in=5, d_ff=7, d_out=4, dtype=torch.bfloat16)
    assert {n: tuple(p.shape) for n, p in plain.named_parameters()} == {
        "up_proj": (3, 7, 5),
        "up_bias": (3, 7),
        "down_proj": (3, 4, 7),
        "down_bias": (3, 4),
    }
    assert plain.up_proj.dtype == torch.bfloat16


class InnerNorm(nn.Module):
    def forward(self, hidden, gain, shift):
        hidden = F.relu(hidden)
        scale = hidden.square().mean(1, keepdim=True).sqrt()  # no epsilon: 0 / 0 in unused rows
        return gain * hidden / scale + shift


def test_inner_module_reads_its_expert_s_parameters():
    experts = Experts(
        experts=3, d_in=5, d_ff=7, inner=InnerNorm(), inner_params=("inner_0", "inner_1")
    )
    nn.init.normal_(experts.inner_0)
    nn.init.normal_(experts.inner_1)
    rows = torch.randn(10, 5, requires_grad=True)
    got = experts(rows, OFFSETS)
    expected, start = [], 0
    for e, end in enumerate(OFFSETS.tolist()):
        h = F.linear(rows[start:end], experts.up_proj[e], experts.up_bias[e])
        h = experts.inner(h, experts.inner_0[e], experts.inner_1[e])
        expected.append(F.linear(h, experts.down_proj[e], experts.down_bias[e]))
        start = end
    expected = torch.cat([*expected, torch.zeros(2, 5)])
    torch.testing.assert_close(got, expected)
    wanted = [rows, *experts.parameters()]
    for a, b in zip(
        torch.autograd.grad(got.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_dropout_only_in_training():
    experts = Experts(experts=3, d_in=5, d_ff=7, dropout=0.5)
    rows = torch.randn(8, 5)
    assert not torch.equal(experts(rows, OFFSETS), experts(rows, OFFSETS))
    experts.eval()
    torch.testing.assert_close(experts(rows, OFFSETS), slow(experts, rows, OFFSETS))


@pytest.mark.parametrize("gated", [True, False])
def test_autocast_computes_in_bfloat16(gated):
    experts = Experts(experts=3, d_in=8, d_ff=16, gated=gated)
    rows = torch.randn(8, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = experts(rows, OFFSETS)
        expected = slow(experts, rows, OFFSETS)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, atol=1e-2, rtol=2e-2)
    out.float().sum().backward()
    assert rows.grad.dtype == experts.down_proj.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert experts.double()(rows.double(), OFFSETS).dtype == torch.float64


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("whole", [True, False])
def test_last_projection_in_another_dtype(gated, whole):
    """T5's is kept in float32, with the rest in float16: it gets what is cast to its dtype."""
    experts = Experts(experts=3, d_in=8, d_ff=16, gated=gated, dtype=torch.bfloat16)
    for name in ("down_proj", "down_bias"):
        setattr(experts, name, nn.Parameter(getattr(experts, name).float() * 1e6))
    rows = torch.randn(8, 8, dtype=torch.bfloat16, requires_grad=True)
    order = torch.arange(8, dtype=torch.int32)
    got = experts(rows, OFFSETS, None, order, order[:, None]) if whole else experts(rows, OFFSETS)
    act, first, start, expected = (
        ACTIVATIONS[experts.activation],
        "gate_up" if gated else "up",
        0,
        [],
    )
    w1, b1 = getattr(experts, f"{first}_proj"), getattr(experts, f"{first}_bias")
    for e, end in enumerate(OFFSETS.tolist()):
        h = F.linear(rows[start:end], w1[e], b1[e])
        h = act(h[:, :16]) * h[:, 16:] if gated else act(h)
        expected.append(F.linear(h.float(), experts.down_proj[e], experts.down_bias[e]))
        start = end
    want = torch.cat(expected)
    assert got.dtype == want.dtype == torch.float32
    torch.testing.assert_close(got, want)
    wanted, cotangent = [rows, *experts.parameters()], torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, wanted, cotangent),
        torch.autograd.grad(want, wanted, cotangent),
        strict=True,
    ):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


def test_no_rows():
    experts = Experts(experts=2, d_in=5, d_ff=7, gated=True)
    rows = torch.randn(0, 5, requires_grad=True)
    experts(rows, torch.zeros(2, dtype=torch.int32)).sum().backward()
    assert all(bool((p.grad == 0).all()) for p in experts.parameters())
    assert rows.grad is not None


def test_runs_on_meta():
    experts = Experts(experts=2, d_in=5, d_ff=7, device="meta")
    rows, offsets = torch.empty(4, 5, device="meta"), torch.empty(2, device="meta").int()
    assert experts(rows, offsets).shape == (4, 5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"activation": "swish"}, "activation"),
        ({"experts": 0}, "experts"),
        ({"dropout": 1.5}, "dropout"),
        ({"inner_params": ("scale",)}, "inner_params"),
        ({"inner_params": "scale", "inner": nn.Identity()}, "inner_params"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=name):
        Experts(**{"experts": 2, "d_in": 3, "d_ff": 4, **options})


def test_activation_formulas():
    x = torch.linspace(-4, 4, 9)
    torch.testing.assert_close(activation("quick_gelu")(x), x * torch.sigmoid(1.702 * x))
    torch.testing.assert_close(activation("relu2")(x), x.clamp_min(0) ** 2)
    torch.testing.assert_close(activation("gelu_tanh")(x), F.gelu(x, approximate="tanh"))
    assert activation("identity")(x) is x


class WithBias(nn.Linear):
    def forward(self, x):
        return super().forward(x), self.bias


@pytest.mark.parametrize("kind", [nn.Linear, WithBias])
def test_module_experts(kind):
    experts = ModuleExperts(kind(5, 4) for _ in range(3))
    rows = torch.randn(10, 5)
    out = experts(rows, OFFSETS)
    owner = [0, 0, 0, 2, 2, 2, 2, 2]
    for r, e in enumerate(owner):
        expected = F.linear(rows[r], experts.experts[e].weight, experts.experts[e].bias)
        torch.testing.assert_close(out[r], expected)
    assert bool((out[8:] == 0).all())
    out.sum().backward()
    assert bool((experts.experts[1].weight.grad == 0).all())


def test_module_experts_beside_compiled_code():
    torch._dynamo.reset()
    experts = ModuleExperts(nn.Linear(5, 5) for _ in range(3))
    compiled = torch.compile(lambda rows: experts(rows * 2, OFFSETS) + 1, backend="aot_eager")
    rows = torch.randn(10, 5)
    torch.testing.assert_close(compiled(rows), experts(rows * 2, OFFSETS) + 1)


def test_module_experts_need_a_module():
    with pytest.raises(ValueError, match="experts"):
        ModuleExperts([])
