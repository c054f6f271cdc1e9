"""gate, assign, combine_weights and route against a loop over tokens, in outputs and gradients."""

import math

import pytest
import torch
from torch.autograd import gradcheck
from torch.library import opcheck

from moeify.kernels.route import BALANCES, COMBINES, DROPS, SCORES, Routing, route


def slow_route(
    tokens, weight, *, top_k, capacity, bias=None, jitter=None, gumbel=None, priority=None,
    score="softmax", combine="probability", noise="none", drop="position", balance="all",
):  # fmt: skip
    """Loop over tokens and experts; differentiable, independent of the ops."""
    count, experts = tokens.shape[0], weight.shape[0]
    p, shares, chosen, squares = [], [], [], []
    for t in range(count):
        x = tokens[t] * (1 if jitter is None else jitter[t])
        logits = torch.stack([(x * weight[e]).sum() for e in range(experts)])
        if score == "softmax":
            p.append(torch.exp(logits) / torch.exp(logits).sum())
        else:
            p.append(1 / (1 + torch.exp(-logits)))
        shares.append(p[t] / p[t].sum())
        squares.append(torch.log(torch.exp(logits).sum()) ** 2)
        picked = []
        for j in range(top_k):
            noisy = gumbel is not None and (noise == "rsample" or (noise == "gumbel" and j > 0))
            values = logits + gumbel[t] if noisy else logits
            if bias is not None:
                q = torch.softmax(values, 0) if score == "softmax" else torch.sigmoid(values)
                values = q + bias
            best = -1
            for e in range(experts):
                if e not in picked and (best < 0 or values[e] > values[best]):
                    best = e
            picked.append(best)
        chosen.append(picked)
    kept = set()
    for e in range(experts):
        routes = [(j, t) for j in range(top_k) for t in range(count) if chosen[t][j] == e]
        if drop == "random":
            routes.sort(key=lambda r: -priority[r[1]].item())
        if drop == "score":
            routes.sort(key=lambda r: -p[r[1]][e].item())
        kept |= {(t, j) for j, t in routes[:capacity]}
    rows = sorted(kept, key=lambda r: (chosen[r[0]][r[1]], r[0]))
    order = [t * top_k + j for t, j in rows] + [-1] * (count * top_k - len(rows))
    slots = [
        [rows.index((t, j)) if (t, j) in kept else -1 for j in range(top_k)] for t in range(count)
    ]
    weights = []
    for t in range(count):
        source = p[t]
        if combine in ("straight_through", "sum"):  # the surrogate gradient stops before the tokens
            x = tokens[t].detach() * (1 if jitter is None else jitter[t])
            logits = torch.stack([(x * weight[e]).sum() for e in range(experts)])
            source = logits.softmax(0) if score == "softmax" else logits.sigmoid()
        raw = [source[chosen[t][j]] * ((t, j) in kept) for j in range(top_k)]
        total = sum(raw)
        for j in range(top_k):
            norm = raw[j] / total if (t, j) in kept else raw[j]
            weights.append(
                {
                    "probability": raw[j],
                    "normalized": norm,
                    "straight_through": norm.detach() + raw[j] - raw[j].detach(),
                    "sum": ((t, j) in kept) + raw[j] - raw[j].detach(),
                }[combine]
            )
    flat = [e for picked in chosen for e in picked]
    counts = [flat.count(e) for e in range(experts)]
    aux = z = tokens.new_zeros(())
    if count:
        mean = torch.stack(shares).mean(0)
        firsts = [sum(picked[0] == e for picked in chosen) for e in range(experts)]
        load = [(c / count / top_k) for c in counts] if balance == "all" else None
        load = load or [f / count for f in firsts]
        aux = experts * sum(mean[e] * load[e] for e in range(experts))
        z = sum(squares) / count
    ends = [sum(chosen[t][j] <= e for t, j in kept) for e in range(experts)]
    return chosen, weights, slots, order, ends, counts, aux, z


def inputs(count, experts, width=5, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, width, generator=g, dtype=dtype).requires_grad_()
    w = torch.randn(experts, width, generator=g, dtype=dtype).requires_grad_()
    return x, w, g


@pytest.mark.parametrize("count", [0, 1, 7, 64])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("combine", "balance"), list(zip(COMBINES, 2 * BALANCES, strict=True)))
@pytest.mark.parametrize(("drop", "top_k"), [("random", 1), ("position", 2), ("score", 3)])
def test_equals_a_loop_over_tokens(count, score, combine, balance, drop, top_k):
    experts, noise = 5, {1: "rsample", 2: "gumbel", 3: "none"}[top_k]
    x, w, g = inputs(count, experts, seed=count + top_k)
    capacity = min(count, max(1, math.ceil(0.7 * top_k * count / experts)))
    bias = torch.randn(experts, generator=g) * 0.2 if score == "sigmoid" else None
    jitter = 1 + 0.1 * torch.rand(count, 5, generator=g, dtype=x.dtype)
    gumbel = torch.randn(count, experts, generator=g, dtype=x.dtype)
    priority = torch.rand(count, generator=g)
    got = route(
        x, w, top_k=top_k, capacity=capacity, selection_bias=bias, input_noise=jitter,
        logit_noise=gumbel, random_priority=priority, score=score, combine=combine, noise=noise,
        drop=drop, balance=balance,
    )  # fmt: skip
    ids, weights, slots, order, ends, counts, aux, z = slow_route(
        x, w, top_k=top_k, capacity=capacity, bias=bias, jitter=jitter, gumbel=gumbel,
        priority=priority, score=score, combine=combine, noise=noise, drop=drop, balance=balance,
    )  # fmt: skip
    assert got.ids.tolist() == ids
    assert got.slots.tolist() == slots
    assert got.order.tolist() == order
    assert got.offsets.tolist() == ends
    assert got.counts.tolist() == counts
    assert int(got.dropped) == count * top_k - len([r for r in order if r >= 0])
    expected = torch.stack(weights) if weights else x.new_zeros(0)
    torch.testing.assert_close(got.weights.flatten(), expected)
    torch.testing.assert_close(got.aux_loss, aux)
    torch.testing.assert_close(got.z_loss, z)
    cotangent = torch.randn(got.weights.shape, generator=g, dtype=x.dtype)
    loss = (got.weights * cotangent).sum() + 0.3 * got.aux_loss + 0.2 * got.z_loss
    theirs = (expected * cotangent.flatten()).sum() + 0.3 * aux + 0.2 * z
    grads = torch.autograd.grad(loss, [x, w])
    if count:
        for a, b in zip(grads, torch.autograd.grad(theirs, [x, w]), strict=True):
            torch.testing.assert_close(a, b)
    else:
        assert all(bool((a == 0).all()) for a in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("score", SCORES)
def test_gate_opcheck(dtype, score):
    x, w, _ = inputs(7, 4, dtype=dtype)
    noise = (torch.randn(4), torch.rand(7, 5), torch.randn(7, 4))
    args = (x, w, *noise, 2, score, "gumbel", "all", True)
    opcheck(torch.ops.moeify.gate, args)
    opcheck(torch.ops.moeify.gate, (x, w, None, None, None, 1, score, "none", "first", False))


@pytest.mark.parametrize("combine", COMBINES)
def test_assign_and_combine_weights_opcheck(combine):
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(9)]).int()
    for priority in (None, torch.rand(9, 2)):
        opcheck(torch.ops.moeify.assign, (ids, priority, 4, 3))
        opcheck(torch.ops.moeify.assign, (ids, priority, 4, 9))
    slots, _, _ = torch.ops.moeify.assign(ids, None, 4, 3)
    scores = torch.rand(9, 2, requires_grad=True)
    opcheck(torch.ops.moeify.combine_weights, (scores, slots, combine))
    opcheck(
        torch.ops.moeify.combine_weights_backward,
        (torch.rand(9, 2), scores.detach(), slots, combine),
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("balance", BALANCES)
def test_gradcheck(score, balance):
    x, w, g = inputs(6, 4)
    jitter = torch.rand(6, 5, generator=g, dtype=torch.float64)

    def run(x, w):
        r = route(
            x, w, top_k=2, capacity=2, input_noise=jitter, score=score, combine="normalized",
            balance=balance, drop="score",
        )  # fmt: skip
        return r.weights, r.aux_loss, r.z_loss, r.logits

    assert gradcheck(run, (x, w))


def test_ties_go_to_the_lowest_expert():
    got = route(torch.ones(3, 4), torch.ones(6, 4), top_k=3, capacity=3)
    assert got.ids.tolist() == [[0, 1, 2]] * 3


def test_all_to_one_expert_over_capacity():
    x = torch.rand(7, 4)
    w = torch.cat([torch.zeros(2, 4), 9 * torch.ones(1, 4), torch.zeros(2, 4)])
    got = route(x, w, top_k=1, capacity=3, combine="straight_through")
    assert got.offsets.tolist() == [0, 0, 3, 3, 3]
    assert got.counts.tolist() == [0, 0, 7, 0, 0]
    assert got.weights.flatten().tolist() == [1.0] * 3 + [0.0] * 4
    assert int(got.dropped) == 4


def test_straight_through_is_one_with_the_probability_as_surrogate_for_the_router_alone():
    x, w, _ = inputs(9, 4)
    through = route(x, w, top_k=1, capacity=9, combine="straight_through").weights
    assert bool((through == 1).all())
    plain = route(x, w, top_k=1, capacity=9, combine="probability").weights
    cotangent = torch.randn_like(plain)
    to_tokens, to_weight = torch.autograd.grad(through, [x, w], cotangent)
    assert torch.equal(to_weight, torch.autograd.grad(plain, w, cotangent)[0])
    assert bool((to_tokens == 0).all())


def test_nan_row_poisons_only_itself_and_never_outranks():
    x = torch.randn(6, 4)
    x[2] = float("nan")
    w = torch.randn(3, 4)
    for noise, gumbel in (("none", None), ("gumbel", torch.randn(6, 3))):
        got = route(x, w, top_k=2, capacity=6, logit_noise=gumbel, noise=noise)
        assert sorted(got.ids[2].tolist()) == sorted(set(got.ids[2].tolist()))
        assert got.weights.isnan().any(1).tolist() == [t == 2 for t in range(6)]
    same = torch.ones(6, 4)
    same[0] = float("nan")
    scored = route(same, torch.eye(3, 4), top_k=1, capacity=5, drop="score")
    assert scored.slots[0].item() == -1


def test_float32_whatever_the_model_and_autocast():
    x, w = torch.randn(9, 32, dtype=torch.bfloat16), torch.randn(5, 32, dtype=torch.bfloat16)
    plain = route(x, w, top_k=2, capacity=4)
    with torch.autocast("cpu", torch.bfloat16):
        cast = route(x, w, top_k=2, capacity=4)
    exact = x.double() @ w.double().t()
    assert plain.weights.dtype == plain.logits.dtype == torch.float32
    torch.testing.assert_close(plain.logits.double(), exact, atol=1e-5, rtol=1e-5)
    for a, b in zip(plain[:-1], cast[:-1], strict=True):
        assert torch.equal(a, b)


def test_field_order_is_fixed():
    names = "ids weights slots order offsets counts aux_loss z_loss entropy dropped logits "
    names += "capacity"
    assert Routing._fields == tuple(names.split())
    got = route(torch.rand(3, 4), torch.rand(2, 4), top_k=1, capacity=3)
    assert got[2] is got.slots


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"top_k": 5}, "top_k"),
        ({"drop": "first"}, "drop"),
        ({"drop": "random"}, "random_priority"),
        ({"score": "relu"}, "score"),
        ({"combine": "total"}, "combine"),
        ({"balance": "second"}, "balance"),
        ({"noise": "white"}, "noise"),
        ({"tokens": torch.rand(3, 7)}, "tokens"),
    ],
)
def test_bad_input_is_named(change, name):
    good = {"tokens": torch.rand(3, 4), "weight": torch.rand(4, 4), "top_k": 2, "capacity": 3}
    with pytest.raises(ValueError, match=name):
        route(**{**good, **change})


def test_drops_are_all_known():
    assert set(DROPS) == {"random", "position", "score"}
