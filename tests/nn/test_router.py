"""Router: capacity, noise, state of the last forward, compilers, checkpoints, copies."""

import copy
import math
import pickle
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moeify.kernels.combine
import moeify.kernels.dispatch  # noqa: F401
from moeify.nn.capacity import expert_capacity
from moeify.nn.experts import Experts
from moeify.nn.router import Router, lifted_capacity


class Block(nn.Module):
    """A routed MLP with a residual connection; `recompute` checkpoints it."""

    def __init__(self, recompute=False, **options):
        super().__init__()
        self.router = Router(16, experts=8, **{"top_k": 2, "aux_loss": 0.1, **options})
        self.experts = Experts(experts=8, d_in=16, d_ff=24, activation="silu", gated=True)
        self.recompute, self.seen = recompute, []

    def body(self, x):
        routing = self.router(x)
        if not torch.compiler.is_compiling():
            self.seen.append(routing.ids.clone())
        rows = torch.ops.moeify.dispatch(x, routing.order, routing.slots)
        hidden = self.experts(rows, routing.offsets)
        return x + torch.ops.moeify.combine(hidden, routing.weights, routing.order, routing.slots)

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)


def step(model, block, x):
    block.zero_grad()
    out = model(x)
    (out.square().mean() + block.router.last_aux_loss).backward()
    return [out.detach(), *(p.grad.clone() for p in block.parameters())]


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 1.25, 2, 1e-5])
@pytest.mark.parametrize("experts", [1, 3, 8])
def test_capacity_is_exact(factor, experts):
    for tokens in (0, 1, 7, 10, 64, 1000):
        fair = math.ceil(Fraction(str(factor)) * 2 * tokens / experts)
        got = expert_capacity(tokens, top_k=2, experts=experts, factor=factor, minimum=4)
        assert got == min(tokens, max(4, fair))
    assert expert_capacity(9, top_k=2, experts=experts, factor=None, minimum=4) == 9


@pytest.mark.parametrize("count", [0, 1, 7, 64])
@pytest.mark.parametrize("noise", ["none", "jitter", "gumbel", "jitter+gumbel"])
def test_trains_with_any_number_of_tokens(count, noise):
    block = Block(capacity_factor=1.0, noise=noise, z_loss=0.01, bias_update=0.1)
    x = torch.randn(count, 16, requires_grad=True)
    out = block(x)
    (out.sum() + block.router.last_aux_loss).backward()
    for p in [x, *block.parameters()]:
        assert p.grad is not None
        assert bool(p.grad.isfinite().all())
    assert count or all(bool((p.grad == 0).all()) for p in block.parameters())
    assert bool(block.router.last_aux_loss.isfinite())


def test_evaluation_is_deterministic_and_draws_nothing():
    router = Router(16, experts=4, top_k=2, noise="jitter+gumbel", drop="random",
                    capacity_factor=0.5, eval_capacity_factor=0.5, min_capacity=1)  # fmt: skip
    x = torch.randn(40, 16)
    state = torch.get_rng_state()
    first, second = router.eval()(x), router(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first[:-1], second[:-1], strict=True))
    assert int(first.dropped) > 0
    router.train()
    assert not torch.equal(router(x).slots, router(x).slots)


def test_random_drop_keeps_every_token_equally_often():
    router = Router(4, experts=1, capacity_factor=0.5, min_capacity=1, drop="random")
    x = torch.randn(8, 4)
    torch.manual_seed(0)
    kept = sum((router(x).slots[:, 0] >= 0).float() for _ in range(800)) / 800
    assert bool((kept - 0.5).abs().max() < 0.1)


def test_dropless_without_factors():
    router = Router(16, experts=8, top_k=3)
    assert int(router(torch.randn(50, 16)).dropped) == 0


def test_rsample_weights_by_the_clean_softmax():
    router = Router(16, experts=4, noise="rsample")
    x = torch.randn(200, 16)
    routing = router(x)
    clean = (x @ router.weight.t()).softmax(1)
    torch.testing.assert_close(routing.weights, clean.gather(1, routing.ids.long()))
    assert not torch.equal(routing.ids[:, 0].long(), clean.argmax(1))


def test_losses_and_stats_of_the_last_forward():
    router = Router(16, experts=4, top_k=2, aux_loss=0.5, z_loss=0.25, capacity_factor=0.5,
                    min_capacity=1)  # fmt: skip
    routing = router(torch.randn(40, 16))
    expected = 0.5 * routing.aux_loss + 0.25 * routing.z_loss
    assert torch.equal(router.last_aux_loss, expected)
    assert router.last_aux_loss.requires_grad
    stats = router.last_stats
    assert torch.equal(stats["counts"], routing.counts)
    assert stats["tokens"] == 40
    assert stats["dropped"].item() == pytest.approx(int(routing.dropped) / 80)
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in stats.values())


def test_calls_on_their_own_replace_each_other():
    router = Router(16, experts=4, aux_loss=1.0)
    router(torch.randn(10, 16))
    routing = router(torch.randn(20, 16))
    assert torch.equal(router.last_aux_loss, routing.aux_loss)
    assert router.last_stats["tokens"] == 20


def test_bias_moves_against_the_load_of_training_forwards():
    router = Router(16, experts=4, bias_update=0.5)
    x = torch.randn(33, 16)
    counts = router(x).counts
    router.eval()(-x)
    assert bool((router.selection_bias == 0).all())
    router.update_bias()
    expected = 0.5 * (counts.float().mean() - counts).sign()
    assert torch.equal(router.selection_bias, expected)
    router.update_bias()
    assert torch.equal(router.selection_bias, expected)
    assert set(router.state_dict()) == {"weight", "selection_bias", "pending_counts"}
    assert set(Router(4, experts=2).state_dict()) == {"weight"}


def test_bias_balances_the_load():
    torch.manual_seed(0)
    router, x = Router(8, experts=4, bias_update=0.02), torch.randn(256, 8) + 1
    spread = []
    for _ in range(150):
        spread.append(router(x).counts.float().std().item())
        router.update_bias()
    assert spread[-1] < 0.3 * spread[0]


@pytest.mark.parametrize("noise", ["none", "jitter+gumbel"])
def test_recomputation_routes_alike_and_counts_once(noise):
    options = {"noise": noise, "capacity_factor": 0.75, "min_capacity": 1, "bias_update": 0.05}
    plain, saved = Block(**options), Block(recompute=True, **options)
    saved.load_state_dict(plain.state_dict())
    for seed in range(3):
        x = torch.randn(32, 16)
        plain.router.update_bias(), saved.router.update_bias()
        torch.manual_seed(seed)
        expected = step(plain, plain, x)
        torch.manual_seed(seed)
        saved.seen.clear()
        got = step(saved, saved, x)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
        assert len(saved.seen) == 2
        assert torch.equal(*saved.seen)
        assert int(saved.router.pending_counts.sum()) == 64
        assert torch.equal(saved.router.selection_bias, plain.router.selection_bias)
        assert torch.equal(saved.router.last_aux_loss, plain.router.last_aux_loss)


def test_lifted_capacity_drops_nothing_and_has_no_side_effects():
    block = Block(noise="gumbel", capacity_factor=0.25, min_capacity=1, bias_update=0.1)
    x = torch.randn(40, 16)
    with lifted_capacity(block):
        first, second = block(x), block(x)
        assert torch.equal(first, second)
        assert int(block.router(x).dropped) == 0
        assert block.router.last_aux_loss is None
        assert int(block.router.pending_counts.sum()) == 0
    with pytest.raises(IndexError), lifted_capacity(block):
        block(torch.empty(()))
    assert not block.router.lift_capacity
    assert int(block.router(x).dropped) > 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_after_a_training_forward(duplicate):
    block = Block(capacity_factor=1.0, bias_update=0.1)
    block(torch.randn(8, 16))
    block.seen.clear()
    copied = duplicate(block)
    assert copied.router.last_aux_loss is None
    assert block.router.last_aux_loss is not None
    x = torch.randn(8, 16)
    assert torch.equal(copied.eval()(x), block.eval()(x))


OPTIONS = [
    {"drop": "random"},
    {"noise": "jitter+gumbel", "drop": "score", "bias_update": 0.1},
    {"score": "sigmoid", "combine": "normalized"},
    {"top_k": 1, "combine": "straight_through", "eval_capacity_factor": 1.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_in_one_graph_with_changing_token_counts(options):
    torch._dynamo.reset()
    block = Block(capacity_factor=1.25, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=counter)
    for count in (8, 16, 24, 40):
        step(compiled, block, torch.randn(count, 16))
        assert block.router.last_stats["tokens"] == count
    assert counter.frame_count <= 2
    assert int(block.router.last_stats["counts"].sum()) == 40 * block.router.top_k


def test_compiled_equals_eager():
    torch._dynamo.reset()
    block = Block(capacity_factor=0.75, min_capacity=1, drop="score", z_loss=0.1)
    x = torch.randn(24, 16)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for a, b in zip(step(compiled, block, x), step(block, block, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("training", [True, False])
def test_exports_with_dynamic_tokens(training):
    block = Block(capacity_factor=1.25, eval_capacity_factor=1.25, drop="position", bias_update=0.1)
    block.train(training)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(block, (torch.randn(24, 16),), dynamic_shapes=dynamic)
    assert block.router.last_aux_loss is None
    graph = program.module()
    for count in (2, 9, 100):
        x = torch.randn(count, 16)
        expected = copy.deepcopy(block)(x)
        torch.testing.assert_close(copy.deepcopy(graph)(x), expected)


def test_runs_on_meta():
    block = Block(capacity_factor=1.0, noise="jitter+gumbel").to("meta")
    assert block(torch.empty(12, 16, device="meta")).shape == (12, 16)


def test_autocast_leaves_routing_alone():
    block = Block(capacity_factor=1.0, drop="position", noise="none")
    x = torch.randn(32, 16)
    plain = block.router(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast, out = block.router(x), block(x)
    assert all(torch.equal(a, b) for a, b in zip(plain[:-1], cast[:-1], strict=True))
    torch.testing.assert_close(out, block(x), atol=0.02, rtol=0.02)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"experts": 0}, "experts"),
        ({"top_k": 5}, "top_k"),
        ({"top_k": 0}, "top_k"),
        ({"score": "x"}, "score"),
        ({"combine": "x"}, "combine"),
        ({"noise": "x"}, "noise"),
        ({"noise": "rsample", "top_k": 2}, "noise"),
        ({"noise": "gumbel", "top_k": 1}, "noise"),
        ({"drop": "x"}, "drop"),
        ({"balance": "x"}, "balance"),
        ({"capacity_factor": 0}, "capacity_factor"),
        ({"eval_capacity_factor": math.inf}, "eval_capacity_factor"),
        ({"capacity_factor": math.nan}, "capacity_factor"),
        ({"jitter_eps": 1.0}, "jitter_eps"),
        ({"min_capacity": -1}, "min_capacity"),
        ({"aux_loss": -0.1}, "aux_loss"),
        ({"z_loss": math.nan}, "z_loss"),
        ({"bias_update": -1}, "bias_update"),
    ],
)
def test_bad_options_are_named(options, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        Router(8, **{"experts": 4, **options})
