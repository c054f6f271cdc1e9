"""What routing means, on examples small enough to work out by hand; every number is written out.

Tokens are the logarithms of the probabilities that they are to have, and the router's weight is the
identity, so that the softmax gives those probabilities back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moeify.kernels.route import Routing, route
from moeify.nn.block import ResidualMix
from moeify.nn.capacity import expert_capacity
from moeify.nn.moe import MoE
from moeify.nn.router import Router

LN2, LN4 = math.log(2), math.log(4)


def logs(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


def routed(rows: Sequence[Sequence[float]], **options: Any) -> Routing:
    """Route tokens with these probabilities; nothing is dropped unless a capacity says so."""
    eye = torch.eye(len(rows[0]), dtype=torch.float64)
    return route(logs(rows), eye, **{"capacity": len(rows), **options})


def near(got: Tensor, expected: object) -> None:
    torch.testing.assert_close(got, torch.tensor(expected).to(got), rtol=1e-6, atol=1e-6)


# -- scores, choice, weights

TWO = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]]


@pytest.mark.parametrize(
    ("combine", "top_k", "weights"),
    [
        ("probability", 1, [[0.5], [0.7]]),
        ("probability", 2, [[0.5, 0.3], [0.7, 0.2]]),
        ("normalized", 1, [[1.0], [1.0]]),
        ("normalized", 2, [[0.625, 0.375], [0.777778, 0.222222]]),
        ("normalized", 3, [[0.5, 0.3, 0.2], [0.7, 0.2, 0.1]]),
        ("straight_through", 1, [[1.0], [1.0]]),
        ("straight_through", 2, [[0.625, 0.375], [0.777778, 0.222222]]),
        ("sum", 3, [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]),
    ],
)
def test_choices_and_combine_weights(combine, top_k, weights):
    got = routed(TWO, top_k=top_k, combine=combine)
    assert got.ids.tolist() == [[0, 1, 2][:top_k], [2, 1, 0][:top_k]]
    near(got.weights, weights)


@pytest.mark.parametrize(
    ("combine", "weights"),
    [("probability", [[0.8, 0.5]]), ("normalized", [[0.615385, 0.384615]])],
)
def test_sigmoid_scores_are_independent(combine, weights):
    tokens = torch.tensor([[LN4, 0.0, -LN4]])  # sigmoid: 0.8, 0.5, 0.2
    got = route(tokens, torch.eye(3), top_k=2, capacity=1, score="sigmoid", combine=combine)
    assert got.ids.tolist() == [[0, 1]]
    near(got.weights, weights)


def test_a_selection_bias_moves_the_choice_and_not_the_weight():
    bias = torch.tensor([0.0, 0.0, 0.4])  # 0.2 + 0.4 is more than 0.5
    got = routed(TWO[:1], top_k=2, selection_bias=bias)
    assert got.ids.tolist() == [[2, 0]]
    near(got.weights, [[0.2, 0.5]])


# -- noise


def test_rsample_moves_the_only_choice_and_weights_by_the_clean_softmax():
    noise = torch.tensor([[0.0, 0.0, 2.0]])  # ln 0.2 + 2 = 0.39 > ln 0.5
    got = routed(TWO[:1], top_k=1, logit_noise=noise, noise="rsample")
    assert got.ids.tolist() == [[2]]
    near(got.weights, [[0.2]])


def test_gumbel_moves_only_the_second_choice():
    noise = torch.tensor([[-9.0, 0.0, 1.0]])  # ln 0.2 + 1 = -0.61 > ln 0.3 = -1.20
    got = routed(TWO[:1], top_k=2, logit_noise=noise, noise="gumbel")
    assert got.ids.tolist() == [[0, 2]]
    near(got.weights, [[0.5, 0.2]])


def test_jitter_multiplies_the_input_of_the_router():
    tokens, jitter = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 0.5]])
    got = route(tokens, torch.eye(2), top_k=1, capacity=1, input_noise=jitter)
    near(got.logits, [[2.0, 1.5]])
    assert got.ids.tolist() == [[0]]


# -- capacity, and who is dropped


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "factor", "minimum", "capacity"),
    [
        (64, 2, 8, 1.25, 4, 20),
        (100, 1, 8, 1.0, 4, 13),  # 12.5, up
        (10, 1, 8, 1.0, 4, 4),  # 2, but the minimum is 4
        (3, 1, 8, 1.0, 4, 3),  # never more than the tokens
        (10, 1, 1, 1.1, 0, 10),
        (100, 1, 10, 1.1, 0, 11),  # 11.000000000000002 in floating point
        (7, 2, 4, 0.5, 0, 2),  # 1.75, up
        (64, 2, 8, None, 4, 64),
        (0, 2, 8, 1.0, 4, 0),
    ],
)
def test_capacity(tokens, top_k, experts, factor, minimum, capacity):
    options = {"top_k": top_k, "experts": experts, "factor": factor, "minimum": minimum}
    assert expert_capacity(tokens, **options) == capacity


def test_by_position_all_first_choices_come_before_any_second():
    rows = [[0.6, 0.4], [0.6, 0.4], [0.3, 0.7], [0.3, 0.7]]
    got = routed(rows, top_k=2, capacity=3, drop="position", combine="normalized")
    assert got.ids.tolist() == [[0, 1], [0, 1], [1, 0], [1, 0]]
    # expert 0: first choices of 0 and 1, second of 2; expert 1: first of 2 and 3, second of 0
    assert got.slots.tolist() == [[0, 3], [1, -1], [4, 2], [5, -1]]
    assert got.order.tolist() == [0, 2, 5, 1, 4, 6, -1, -1]
    assert got.offsets.tolist() == [3, 6]
    assert got.counts.tolist() == [4, 4]  # before dropping
    assert int(got.dropped) == 2
    near(got.weights, [[0.6, 0.4], [1.0, 0.0], [0.7, 0.3], [1.0, 0.0]])  # over the kept


def test_probability_weights_are_not_normalized_after_a_drop():
    rows = [[0.6, 0.4], [0.6, 0.4]]
    got = routed(rows, top_k=2, capacity=1)
    near(got.weights, [[0.6, 0.4], [0.0, 0.0]])


def test_straight_through_normalizes_over_the_kept_routes():
    got = routed([[0.6, 0.4], [0.7, 0.3]], top_k=2, capacity=1, combine="straight_through")
    near(got.weights, [[0.6, 0.4], [0.0, 0.0]])
    only = routed([[0.6, 0.3, 0.1], [0.7, 0.1, 0.2]], top_k=2, capacity=1,
                  combine="straight_through")  # fmt: skip
    near(only.weights, [[0.666667, 0.333333], [0.0, 1.0]])


def test_sum_gives_every_kept_route_a_weight_of_one():
    got = routed([[0.6, 0.3, 0.1], [0.7, 0.1, 0.2]], top_k=2, capacity=1, combine="sum")
    assert got.weights.tolist() == [[1.0, 1.0], [0.0, 1.0]]


def test_by_random_priority_the_highest_stay_in_token_order():
    rows = [[0.9, 0.1]] * 4
    priority = torch.tensor([0.1, 0.9, 0.5, 0.7])
    got = routed(rows, top_k=1, capacity=2, drop="random", random_priority=priority)
    assert got.slots.tolist() == [[-1], [0], [-1], [1]]
    assert got.order.tolist() == [1, 3, -1, -1]


def test_by_score_the_most_probable_stay():
    rows = [[0.55, 0.45], [0.9, 0.1], [0.6, 0.4], [0.8, 0.2]]
    got = routed(rows, top_k=1, capacity=2, drop="score")
    assert got.slots.tolist() == [[-1], [0], [-1], [1]]


def test_by_score_a_second_choice_can_beat_a_first():
    rows = [[0.4, 0.35, 0.25], [0.45, 0.54, 0.01]]
    by_score = routed(rows, top_k=2, capacity=1, drop="score")
    assert by_score.ids.tolist() == [[0, 1], [1, 0]]
    assert by_score.slots.tolist() == [[-1, -1], [1, 0]]
    by_position = routed(rows, top_k=2, capacity=1, drop="position")
    assert by_position.slots.tolist() == [[0, -1], [1, -1]]


@pytest.mark.parametrize(("capacity", "dropped"), [(4, 0), (3, 1), (5, 0)])
def test_a_capacity_that_is_exactly_met_drops_nothing(capacity, dropped):
    got = routed([[0.9, 0.1]] * 4, top_k=1, capacity=capacity)
    assert int(got.dropped) == dropped


def test_training_and_evaluation_have_their_own_capacity():
    router = Router(2, experts=2, capacity_factor=1.0, min_capacity=1, drop="position")
    nn.init.eye_(router.weight)
    tokens = logs([[0.9, 0.1]] * 4).float()
    assert int(router.train()(tokens).dropped) == 2  # 4 tokens over 2 experts
    assert int(router.eval()(tokens).dropped) == 0  # dropless is the default
    router.eval_capacity_factor = 1.5
    assert int(router(tokens).dropped) == 1


# -- losses

THREE = [[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]]  # mean 0.4, 0.266667, 0.333333


@pytest.mark.parametrize(
    ("top_k", "balance", "loss"),
    [
        (1, "all", 1.133333),  # 3 * (0.4 * 2/3 + 0.333333 * 1/3)
        (1, "first", 1.133333),
        (2, "all", 0.966667),  # 3/2 * (0.4 * 2/3 + 0.266667 * 1 + 0.333333 * 1/3)
        (2, "first", 1.133333),
        (3, "all", 1.0),  # every expert is assigned every token
    ],
)
def test_balance_loss(top_k, balance, loss):
    near(routed(THREE, top_k=top_k, balance=balance).aux_loss, loss)


def test_the_balance_loss_counts_what_is_dropped_too():
    near(routed(THREE, top_k=2, capacity=1).aux_loss, 0.966667)
    assert routed(THREE, top_k=2, capacity=1).counts.tolist() == [2, 3, 1]


def test_an_even_load_has_a_balance_loss_of_one():
    near(routed([[0.9, 0.1], [0.1, 0.9]], top_k=1).aux_loss, 1.0)
    near(routed([[0.9, 0.1], [0.9, 0.1]], top_k=1).aux_loss, 1.8)  # all on one of two


def test_the_z_loss_is_the_mean_square_of_logsumexp():
    doubled = logs(THREE) + torch.tensor([[LN2], [0.0], [LN4]])  # logsumexp: ln 2, 0, ln 4
    got = route(doubled, torch.eye(3).double(), top_k=1, capacity=3)
    near(got.z_loss, 5 * LN2**2 / 3)  # 0.800755


def test_entropy_is_in_nats():
    near(routed([[0.25] * 4, [0.25] * 4], top_k=1).entropy, 1.386294)
    near(routed([[0.5, 0.5], [0.9, 0.1]], top_k=1).entropy, 0.509115)  # of 0.693147 and 0.325083


# -- DeepSpeed's layer: expert e multiplies by e + 1


def layer(rows: Sequence[Sequence[float]], **options: Any) -> tuple[MoE, Tensor]:
    width = len(rows[0])
    moe = MoE(width, nn.Linear(width, width, bias=False), num_experts=width, **options).double()
    with torch.no_grad():
        nn.init.eye_(moe.router.weight)
        for e, expert in enumerate(moe.experts.experts):
            expert.weight.copy_((e + 1) * torch.eye(width))
    return moe, logs(rows)


def factors(moe: MoE, tokens: Tensor) -> tuple[list[float], float, list[int]]:
    """Return what each token is multiplied by, l_aux and exp_counts."""
    out, l_aux, exp_counts = moe(tokens)
    factor = (out / tokens)[:, 0]
    torch.testing.assert_close(out, factor[:, None] * tokens)
    return [round(f, 6) for f in factor.tolist()], round(l_aux.item(), 6), exp_counts.tolist()


FIVE_TO_ONE = [[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.55, 0.45], [0.2, 0.8]]
ONE_AUX = 1.166667  # 2 * (0.625 * 5/6 + 0.375 * 1/6)


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        # capacity ceil(6 / 2 * 1) = 3
        ({"min_capacity": 0, "use_rts": False}, [0.9, 0.8, 0.7, 0.0, 0.0, 1.6]),
        ({"min_capacity": 0}, [0.0, 0.8, 0.0, 0.6, 0.55, 1.6]),
        ({"use_rts": False}, [0.9, 0.8, 0.7, 0.6, 0.0, 1.6]),  # min_capacity is 4
        ({}, [0.0, 0.8, 0.7, 0.6, 0.55, 1.6]),
        ({"min_capacity": 9}, [0.9, 0.8, 0.7, 0.6, 0.55, 1.6]),
        ({"min_capacity": 0, "capacity_factor": 0.5, "use_rts": False},
         [0.9, 0.8, 0.0, 0.0, 0.0, 1.6]),  # ceil(1.5) = 2
        ({"drop_tokens": False, "min_capacity": 0}, [0.9, 0.8, 0.7, 0.6, 0.55, 1.6]),
    ],
)  # fmt: skip
def test_top_1_in_training(options, kept, monkeypatch):
    moe, tokens = layer(FIVE_TO_ONE, k=1, **options)
    priority = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.7, 0.0])
    monkeypatch.setattr(torch, "rand", lambda *size, **_: priority)
    assert factors(moe, tokens) == (kept, ONE_AUX, [5, 1])


def test_top_1_in_evaluation_keeps_the_first_tokens():
    moe, tokens = layer(FIVE_TO_ONE, k=1, min_capacity=0, capacity_factor=9.0)
    kept = [0.9, 0.8, 0.7, 0.0, 0.0, 1.6]
    assert factors(moe.eval(), tokens) == (kept, ONE_AUX, [5, 1])


TOP_2 = [[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1]]
TWO_AUX = 1.275  # 3 * (0.45 * 3/4 + 0.35 * 1/4): first choices alone


@pytest.mark.parametrize("training", [True, False])
def test_top_2_drops_by_position_and_normalizes_over_the_kept_routes(training, monkeypatch):
    options = {"k": 2, "capacity_factor": 0.5, "eval_capacity_factor": 0.5, "min_capacity": 0}
    moe, tokens = layer(TOP_2, **options)
    monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.full(size, 0.5, dtype=kw["dtype"]))
    # capacity ceil(2 * 4 / 3 * 0.5) = 2. Expert 0: first choices of 0 and 1 stay; the first of 2
    # and the second of 3 go. Expert 1: first of 3, second of 0; the second of 1 goes. Expert 2: 2.
    kept = [round(0.625 * 1 + 0.375 * 2, 6), 1.0, 3.0, 2.0]
    assert factors(moe.train(training), tokens) == (kept, TWO_AUX, [4, 3, 1])


def test_top_2_samples_the_second_expert_in_training(monkeypatch):
    moe, tokens = layer(TOP_2[:1], k=2)
    # Gumbel noise -ln(-ln u): 4.60 for u = 0.99, -0.83 for 0.1; the first choice is never moved
    uniform = torch.tensor([[0.1, 0.1, 0.99]], dtype=torch.float64)
    monkeypatch.setattr(torch, "rand", lambda *size, **_: uniform)
    factor, _, counts = factors(moe, tokens)
    assert counts == [1, 0, 1]
    assert factor == [round((0.5 * 1 + 0.2 * 3) / 0.7, 6)]
    assert factors(moe.eval(), tokens)[2] == [1, 1, 0]


def test_top_3_keeps_the_most_probable():
    rows = [[0.7, 0.2, 0.08, 0.02], [0.02, 0.3, 0.35, 0.33], [0.3, 0.4, 0.05, 0.25]]
    moe, tokens = layer(rows, k=3, capacity_factor=0.8, min_capacity=0)
    # capacity ceil(3 * 3 / 4 * 0.8) = 2. Expert 1 is the first choice of 2 (0.4), the second of 0
    # (0.2) and the third of 1 (0.3): that of 0 goes.
    kept = [
        round((0.7 * 1 + 0.08 * 3) / 0.78, 6),
        round((0.35 * 3 + 0.33 * 4 + 0.3 * 2) / 0.98, 6),
        round((0.4 * 2 + 0.3 * 1 + 0.25 * 4) / 0.95, 6),
    ]
    # 4/3 * (0.34 * 2/3 + 0.3 * 1 + 0.16 * 2/3 + 0.2 * 2/3): all choices, before dropping
    assert factors(moe, tokens) == (kept, 1.022222, [2, 3, 2, 2])


# -- Residual-MoE


@pytest.mark.parametrize(
    ("kind", "mixed"),
    [
        ("coefficient", 5.0),  # softmax(ln 3, 0) = 0.75, 0.25: 0.75 * 4 + 0.25 * 8
        ("add", 12.0),
        ("sigmoid", 10.0),  # 4 + sigmoid(ln 3) * 8
    ],
)
def test_residual_mix(kind, mixed):
    mix = ResidualMix(kind, 1)
    if mix.coefficient is not None:
        with torch.no_grad():
            mix.coefficient.weight[0] = math.log(3)
    got = mix(torch.tensor([[4.0]]), torch.tensor([[8.0]]), torch.tensor([[1.0]]))
    near(got, [[mixed]])


@pytest.mark.parametrize(("kind", "mixed"), [("coefficient", 6.0), ("sigmoid", 8.0)])
def test_residual_mix_starts_even(kind, mixed):
    got = ResidualMix(kind, 1)(torch.tensor([[4.0]]), torch.tensor([[8.0]]), torch.tensor([[1.0]]))
    near(got, [[mixed]])
