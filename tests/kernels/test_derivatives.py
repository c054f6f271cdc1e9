"""Derivatives of every op in every mode: forward, and any number of times.

Each op is compared with finite differences in float64, or, where its gradient is a surrogate, with
the surrogate written out. An op that has no entry here fails the first test.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, jvp

import moeify.kernels
from moeify.kernels.assign import assign_reference
from moeify.kernels.combine_weights import COMBINES
from moeify.kernels.elementwise import FUSED
from moeify.kernels.gate import BALANCES, SCORES
from tests.kernels.cases import Case, Problem, problem

ops = torch.ops.moeify

WITHOUT_DERIVATIVE = {
    "assign": "rows and routes are integers",
    "check_counts": "counts are integers",
    "local_routes": "rows and routes are integers",
    "receive_layout": "rows are integers",
    "send_layout": "rows are integers",
}


def call(op: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    """Return a function of the float64 tensors among `args`, which gives the floats of an op."""
    places = [i for i, a in enumerate(args) if isinstance(a, Tensor) and a.is_floating_point()]

    def run(*leaves: Tensor) -> Any:
        given = list(args)
        for place, leaf in zip(places, leaves, strict=True):
            given[place] = leaf
        result = op(*given)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(r for r in results if r.is_floating_point() and r.numel())

    return run, tuple(args[place].detach().clone().requires_grad_() for place in places)


def layout(capacity: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Return order, slots and offsets of five tokens with two routes each to three experts."""
    ids = torch.tensor([[0, 1], [2, 0], [0, 2], [0, 1], [1, 0]], dtype=torch.int32)
    slots, order, offsets = assign_reference(ids, None, 3, capacity)
    return order, slots, offsets


def normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


def gate_backward_args(score: str, balance: str) -> tuple[Any, ...]:
    tokens, weight = normal(5, 4), normal(3, 4)
    _, ids, logits, *_ = ops.gate(tokens, weight, *[None] * 3, 2, score, "none", balance, False)
    grads = normal(5, 2), normal(5, 3), normal(), normal()
    return *grads, tokens, weight, None, logits, ids, score, balance, False


def experts_args(given: Problem) -> tuple[Any, ...]:
    table = given.order, given.slots, given.offsets
    return *given.floats, *table, given.activation, given.gated, True, "auto"


def experts_backward_args(given: Problem, **needs: bool) -> tuple[Any, ...]:
    tokens, weights, up, up_bias, down, down_bias = given.floats
    hidden = given.run("reference")[1]
    wanted = {"tokens": True, "weights": weights is not None, "params": True, **needs}
    return (
        given.grad, tokens, weights, up, down, down_bias, hidden, given.order, given.slots,
        given.offsets, given.activation, given.gated, up_bias is not None, *wanted.values(), "auto",
    )  # fmt: skip


TINY = Case(tokens=4, d_in=3, d_ff=2, experts=3, up_bias=True, down_bias=True)
EXPERTS = {
    f"{name}{' gated' if gated else ''}": replace(TINY, activation=name, gated=gated)
    for name in FUSED
    for gated in (True, False)
} | {
    "without biases": replace(TINY, up_bias=False, down_bias=False),
    "without weights": replace(TINY, weighted=False),
    "with drops": replace(TINY, capacity=1),
    "with an expert alone": replace(TINY, top_k=1, only=(1,)),
}


def cases() -> dict[str, dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]]]:
    """Return by op and name a function of floats and its arguments."""
    torch.manual_seed(0)
    order, slots, offsets = layout()
    rows, weights = normal(10, 4), torch.rand(5, 2, dtype=torch.float64)
    projections, biases = normal(3, 2, 4), normal(3, 2)
    noises = (None, 1 + 0.01 * torch.rand(5, 4, dtype=torch.float64)) * 2
    return {
        "gate": {
            f"{s} {b}": call(functools.partial(_gate, jitter), normal(5, 4), normal(3, 4), s, b)
            for s, b, jitter in zip(SCORES * 2, (*BALANCES, *BALANCES[::-1]), noises, strict=True)
        },
        "gate_backward": {
            f"{s} {b}": call(ops.gate_backward, *gate_backward_args(s, b))
            for s in SCORES
            for b in BALANCES
        },
        "combine_weights": {
            c: call(ops.combine_weights, weights, slots, c) for c in ("probability", "normalized")
        },
        "combine_weights_backward": {
            c: call(ops.combine_weights_backward, normal(5, 2), weights, slots, c) for c in COMBINES
        },
        "dispatch": {"": call(ops.dispatch, normal(5, 4), order, slots)},
        "combine": {
            "weighted": call(ops.combine, rows, weights, order, slots),
            "a sum": call(ops.combine, rows, None, order, slots),
        },
        "combine_backward": {
            "": call(ops.combine_backward, normal(5, 4), rows, weights, order, slots)
        },
        "grouped_linear": {
            "biased": call(ops.grouped_linear, rows, projections, biases, offsets),
            "plain": call(ops.grouped_linear, rows, projections, None, offsets),
            "transposed": call(
                ops.grouped_linear, normal(10, 2), projections.transpose(1, 2), None, offsets
            ),
        },
        "grouped_linear_backward": {
            "biased": call(ops.grouped_linear_backward, normal(10, 2), rows, offsets, True),
            "plain": call(ops.grouped_linear_backward, normal(10, 2), rows, offsets, False),
        },
        "experts": {n: call(ops.experts, *experts_args(problem(c))) for n, c in EXPERTS.items()},
        "experts_backward": {
            **{
                n: call(ops.experts_backward, *experts_backward_args(problem(c)))
                for n, c in EXPERTS.items()
                if c.activation == "silu" or n == "gelu"  # third derivatives are all autograd's
            },
            "of tokens alone": call(
                ops.experts_backward,
                *experts_backward_args(problem(TINY), weights=False, params=False),
            ),
        },
    }


def _gate(
    jitter: Tensor | None, tokens: Tensor, weight: Tensor, score: str, balance: str
) -> tuple[Tensor, ...]:
    """Return the outputs of `gate` that have a derivative."""
    args = tokens, weight, None, jitter, None, 2, score, "none", balance, False
    scores, _, logits, _, aux_loss, z_loss, entropy = ops.gate(*args)
    assert not entropy.requires_grad
    return scores, logits, aux_loss, z_loss


CASES = cases()
ALL = [pytest.param(op, name, id=f"{op} {name}") for op, found in CASES.items() for name in found]


def registered() -> set[str]:
    """Return the names of all ops of ours, after importing what registers them."""
    for module in pkgutil.iter_modules(moeify.kernels.__path__):
        importlib.import_module(f"moeify.kernels.{module.name}")
    names = torch._C._dispatch_get_all_op_names()
    return {n.removeprefix("moeify::").partition(".")[0] for n in names if n.startswith("moeify::")}


def test_every_op_is_tested_here():
    assert registered() == {*CASES, *WITHOUT_DERIVATIVE}


@pytest.mark.parametrize("op", WITHOUT_DERIVATIVE)
def test_what_has_no_derivative_returns_integers(op):
    registered()
    returns = getattr(ops, op).default._schema.returns
    assert returns, op
    _, slots, offsets = layout()
    counts = torch.tensor([[1, 2, 3]])
    args = {
        "assign": (torch.zeros(2, 1, dtype=torch.int32), torch.rand(2, 1), 3, 1),
        "check_counts": (counts, -1, "here", [0], 0),
        "local_routes": (torch.zeros(2, 1, dtype=torch.int32), 0, 3),
        "receive_layout": (counts, 6, -1),
        "send_layout": (slots, offsets, -1, 1),
    }[op]
    results = getattr(ops, op)(*args)
    results = results if isinstance(results, tuple) else (results,)
    assert not any(r.is_floating_point() for r in results)


@pytest.mark.parametrize(("op", "name"), ALL)
def test_first_derivatives_in_both_modes(op, name):
    run, leaves = CASES[op][name]
    assert gradcheck(run, leaves, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize(("op", "name"), ALL)
def test_second_derivatives_in_both_modes(op, name):
    run, leaves = CASES[op][name]
    assert gradgradcheck(run, leaves, check_fwd_over_rev=True, atol=1e-4, fast_mode=True)


@pytest.mark.parametrize(("op", "name"), ALL)
def test_the_formula_has_the_values_and_gradients_of_the_op(op, name):
    run, leaves = CASES[op][name]
    plain = tuple(leaf.detach() for leaf in leaves)
    want = run(*plain)
    got = jvp(run, plain, plain)[0]
    weights = [torch.rand_like(r) for r in want]

    def total(*inputs: Tensor) -> Tensor:
        return sum((r * w).sum() for r, w in zip(run(*inputs), weights, strict=True))

    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    places = tuple(range(len(leaves)))
    expected = torch.autograd.grad(total(*leaves), leaves, allow_unused=True)
    for mine, theirs in zip(grad(total, places)(*plain), expected, strict=True):
        theirs = torch.zeros_like(mine) if theirs is None else theirs
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


# -- surrogates


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("combine", "top_k"), [("straight_through", 1), ("straight_through", 2),
                                                ("sum", 2)])  # fmt: skip
def test_derivatives_of_surrogates_are_those_of_what_they_stand_for(combine, top_k, score):
    torch.manual_seed(0)
    _, slots, _ = layout(9)
    slots = slots[:, :top_k].contiguous()
    tokens, weight = normal(5, 4), normal(3, 4)

    def surrogate(tokens: Tensor, weight: Tensor) -> Tensor:
        logits = tokens.detach() @ weight.t()
        scores = logits.softmax(1) if score == "softmax" else logits.sigmoid()
        kept = scores.sort(1, descending=True).values[:, :top_k]
        value = kept / kept.sum(1, keepdim=True) if combine != "sum" else torch.ones_like(kept)
        return value.detach() + kept - kept.detach()

    def ours(tokens: Tensor, weight: Tensor) -> Tensor:
        args = tokens, weight, None, None, None, top_k, score, "none", "all", True
        return ops.combine_weights(ops.gate(*args)[0], slots, combine)

    factor, tangents = normal(5, top_k), (normal(5, 4), normal(3, 4))
    results = []
    for function in (ours, surrogate):
        leaves = tokens.clone().requires_grad_(), weight.clone().requires_grad_()

        def penalty(x, w, function=function):  # a function of a gradient
            g = grad(lambda w: (function(x, w) * factor * x[:, :top_k]).sum())(w)
            return g.square().sum()

        out = (function(*leaves) * factor * leaves[0][:, :top_k]).sum()
        first = torch.autograd.grad(out, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        results.append((*first, *second, *jvp(function, (tokens, weight), tangents),
                        *grad(penalty, (0, 1))(tokens, weight)))  # fmt: skip
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-9)
