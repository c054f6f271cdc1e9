"""`MoE` against DeepSpeed's gating, written out as loops over tokens."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from moeify.nn.moe import MoE

WIDTH = 6


def expert():
    return nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH))


def deepspeed(moe, x, factor, priority=None, gumbel=None):
    """Return (out, l_aux, exp_counts) as DeepSpeed's top-1, top-2 and top-k gates define them."""
    k, n = moe.k, moe.num_experts
    tokens = x.reshape(-1, WIDTH)
    logits = tokens @ moe.router.weight.t()
    gates = logits.softmax(1)
    count = len(tokens)
    capacity = min(count, max(math.ceil(count / n * factor * k), moe.router.min_capacity))
    choices = []
    for t in range(count):
        picked = [int(gates[t].argmax())]
        for _ in range(k - 1):
            rest = logits[t] + (gumbel[t] if gumbel is not None else 0)
            rest = rest.clone()
            rest[picked] = -math.inf
            picked.append(int(rest.argmax()))
        choices.append(picked)
    kept = []
    for e in range(n):
        picked = [(t, j) for j in range(k) for t in range(count) if choices[t][j] == e]
        if k == 1 and priority is not None:
            picked.sort(key=lambda r: -priority[r[0]])
        if k > 2:
            picked.sort(key=lambda r: -gates[r[0], e].item())
        kept += picked[:capacity]
    out = []
    for t in range(count):
        routes = [choices[t][j] for j in range(k) if (t, j) in kept]
        weights = [gates[t, e] for e in routes]
        if k > 1:
            weights = [w / sum(weights) for w in weights]
        y = torch.zeros(WIDTH, dtype=x.dtype)
        for w, e in zip(weights, routes, strict=True):
            y = y + w * moe.experts.experts[e](tokens[t])
        out.append(y)
    exp_counts = [sum(e in picked for picked in choices) for e in range(n)]
    firsts = torch.tensor([[float(e == picked[0]) for e in range(n)] for picked in choices])
    every = torch.tensor([[float(e in picked) for e in range(n)] for picked in choices])
    me = gates.mean(0)
    if k == 1:
        l_aux = (me * firsts.double().mean(0)).sum() * n
    elif k == 2:
        l_aux = (me * firsts.double().mean(0)).mean() * n * n
    else:
        l_aux = (me * every.double().mean(0)).mean() * n * n / k
    return torch.stack(out).view(x.shape), l_aux, exp_counts


def build(**options):
    moe = MoE(hidden_size=WIDTH, expert=expert(), num_experts=4, min_capacity=1, **options).double()
    for module in moe.experts.experts:
        for p in module.parameters():
            nn.init.normal_(p)
    return moe


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("use_rts", [True, False])
def test_equals_deepspeed(k, factor, training, use_rts, monkeypatch):
    torch.manual_seed(k)
    other = 3.0
    moe = build(
        k=k,
        capacity_factor=factor if training else other,
        eval_capacity_factor=other if training else factor,
        use_rts=use_rts,
    ).train(training)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, requires_grad=True)
    drawn = []
    real = torch.rand

    def rand(*args, **kwargs):
        drawn.append(real(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "rand", rand)
    out, l_aux, exp_counts = moe(x)
    monkeypatch.undo()
    assert len(drawn) == int(training and (k == 2 or (k == 1 and use_rts)))
    priority = drawn[0] if drawn and k == 1 else None
    gumbel = -(-drawn[0].log()).log() if drawn and k == 2 else None
    expected, aux, counts = deepspeed(moe, x, factor, priority, gumbel)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(l_aux, aux)
    assert exp_counts.tolist() == counts
    assert exp_counts.dtype == torch.int64
    wanted = [x, *moe.parameters()]
    actual = torch.autograd.grad(out.square().sum() + l_aux, wanted)
    desired = torch.autograd.grad(expected.square().sum() + aux, wanted, materialize_grads=True)
    for a, b in zip(actual, desired, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_drop_tokens_false_keeps_all(k):
    moe = build(k=k, drop_tokens=False, capacity_factor=0.1).eval()
    x = torch.randn(20, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(moe(x)[0], deepspeed(moe, x, 100.0)[0])


def test_residual_mixes_by_coefficient():
    moe = build(use_residual=True, drop_tokens=False).eval()
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    share = moe.coefficient(x).softmax(-1)
    routed = deepspeed(moe, x, 100.0)[0]
    expected = routed * share[..., :1] + moe.mlp(x) * share[..., 1:]
    torch.testing.assert_close(moe(x)[0], expected)


def test_experts_start_as_equal_copies():
    source = expert()
    moe = MoE(WIDTH, source, num_experts=3, use_residual=True)
    for module in [*moe.experts.experts, moe.mlp]:
        assert module is not source
        for a, b in zip(module.parameters(), source.parameters(), strict=True):
            assert a is not b
            assert torch.equal(a, b)
    assert moe.router.weight.dtype == torch.float32


@pytest.mark.parametrize(("policy", "k"), [("Jitter", 1), ("Jitter", 2), ("RSample", 1), (None, 2)])
def test_noise_only_in_training(policy, k):
    moe = build(k=k, noisy_gate_policy=policy, drop_tokens=False)
    moe.router.jitter_eps = 0.5
    x = torch.randn(40, WIDTH, dtype=torch.float64)
    assert not torch.equal(moe(x)[0], moe(x)[0])
    assert torch.equal(moe.eval()(x)[0], moe(x)[0])


@pytest.mark.parametrize(
    "shape", [(WIDTH,), (0, WIDTH), (1, WIDTH), (2, 0, WIDTH), (2, 3, 4, WIDTH)]
)
def test_any_leading_shape(shape):
    moe = build(k=2, use_residual=True)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    out, l_aux, exp_counts = moe(x)
    assert out.shape == x.shape
    assert int(exp_counts.sum()) == 2 * math.prod(shape[:-1])
    (out.sum() + l_aux).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in moe.parameters())


def test_copies_and_trains():
    moe = MoE(WIDTH, expert(), num_experts=4, k=1)
    x = torch.randn(32, WIDTH)
    target = torch.randn(32, WIDTH)
    optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        out, l_aux, _ = copy.deepcopy(moe)(x)
        out, l_aux, _ = moe(x)
        loss = (out - target).square().mean() + 0.01 * l_aux
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_autocast():
    moe = MoE(WIDTH, expert(), num_experts=4, k=2, use_residual=True).eval()
    x = torch.randn(12, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        out, l_aux, _ = moe(x)
    torch.testing.assert_close(out.float(), moe(x)[0], atol=0.02, rtol=0.05)
    assert torch.equal(l_aux, moe(x)[1])


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_experts": 0}, "num_experts"),
        ({"k": 0}, "k"),
        ({"k": 5}, "k"),
        ({"ep_size": 2}, "ep_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"noisy_gate_policy": "RSample", "k": 2}, "noisy_gate_policy"),
        ({"noisy_gate_policy": "jitter"}, "noisy_gate_policy"),
        ({"capacity_factor": -1.0}, "capacity_factor"),
    ],
)
def test_bad_arguments_are_named(options, name):
    good = {"hidden_size": WIDTH, "expert": expert(), "num_experts": 4}
    with pytest.raises(ValueError, match=f"^{name}:"):
        MoE(**{**good, **options})


def test_a_wrong_width_is_named():
    with pytest.raises(ValueError, match="hidden_size"):
        build()(torch.randn(3, WIDTH + 1, dtype=torch.float64))


@pytest.mark.parametrize(("k", "drop_tokens"), [(2, True), (1, True), (3, True), (1, False)])
@pytest.mark.thin(4)
def test_compiles_in_one_graph_for_any_expert(k, drop_tokens):
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)

        def forward(self, x):
            return self.down(self.norm(self.up(x).relu()))

    layer = MoE(8, Expert(), 4, k=k, use_rts=False, drop_tokens=drop_tokens, use_residual=True)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    layer.router.noise = "none"  # both draw nothing
    for count in (8, 24, 40, 17):
        x = torch.randn(count, 8)
        results = []
        for run in (layer, compiled):
            layer.zero_grad()
            out, l_aux, counts = run(x)
            (out.square().sum() + l_aux).backward()
            results.append([out, counts, *(p.grad.clone() for p in layer.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert counter.frame_count <= 2
