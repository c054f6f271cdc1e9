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
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

import moeify.kernels
from moeify.kernels.assign import assign_reference
from moeify.kernels.combine_weights import COMBINES
from moeify.kernels.elementwise import FUSED
from moeify.kernels.gate import BALANCES, SCORES
from moeify.kernels.registry import reference_only
from moeify.nn.experts import Experts
from moeify.nn.router import Router
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


# -- a router and experts together


class Block(torch.nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.router = Router(4, experts=3, top_k=2, **options)
        self.experts = Experts(experts=3, d_in=4, d_ff=5, activation="silu", gated=True)
        self.kernel = "auto"

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 4)
        r = self.router(tokens)
        args = r.offsets, r.weights, r.order, r.slots
        return self.experts(tokens, *args, kernel=self.kernel).view(x.shape)


def block(**options: Any) -> Block:
    torch.manual_seed(0)
    return Block(**{"combine": "normalized", **options}).double().eval()


def losses(model: Block, x: Tensor) -> Tensor:
    return (model(x) * x.detach().cos()).sum()


@pytest.mark.parametrize("combine", ["probability", "normalized"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("drop", ["position", "score"])
def test_a_block_is_differentiable_twice_in_all_its_parameters(combine, score, drop):
    model = block(combine=combine, score=score, drop=drop, eval_capacity_factor=0.7, min_capacity=1)
    x = normal(6, 4)
    assert int(model.router(x).dropped) > 0
    names = [n for n, _ in model.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in model.parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(model, dict(zip(names, parameters, strict=True)), (x,))

    inputs = (x.requires_grad_(), *leaves)
    assert gradcheck(run, inputs, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(run, inputs, check_fwd_over_rev=True, fast_mode=True)


@functools.cache
def hessians() -> tuple[Block, Tensor, Tensor]:
    """Return a block, an input and the Hessian of its `losses`, by finite differences."""
    model, x = block(), normal(3, 4)
    step, columns = 1e-6, []
    for i in range(x.numel()):
        change = torch.zeros(x.numel(), dtype=x.dtype).index_fill(0, torch.tensor(i), step)
        ends = []
        for sign in (1, -1):
            moved = (x + sign * change.view_as(x)).requires_grad_()
            out = (model(moved) * x.cos()).sum()
            ends.append(torch.autograd.grad(out, moved)[0].flatten())
        columns.append((ends[0] - ends[1]) / (2 * step))
    return model, x, torch.stack(columns, 1)


def _fixed(model: Block, x: Tensor) -> Callable[[Tensor], Tensor]:
    factor = x.cos()
    return lambda y: (model(y) * factor).sum()


def _functional(name: str) -> Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]:
    """Return a function that gives the Hessian by one of the ways of `torch.autograd`."""
    found = torch.autograd.functional

    def by_columns(product: Callable[..., Any], f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        units = torch.eye(x.numel(), dtype=x.dtype).view(-1, *x.shape)
        return torch.stack([product(f, x, v)[1].flatten() for v in units], 1)

    return {
        "hessian": lambda f, x: found.hessian(f, x),
        "hessian, vectorized": lambda f, x: found.hessian(f, x, vectorize=True),
        "hessian, forward over reverse": lambda f, x: found.hessian(
            f, x, vectorize=True, outer_jacobian_strategy="forward-mode"
        ),
        "jacobian of gradient": lambda f, x: found.jacobian(grad(f), x),
        "hvp": functools.partial(by_columns, found.hvp),
        "vhp": functools.partial(by_columns, found.vhp),
        "jvp of gradient": lambda f, x: by_columns(found.jvp, grad(f), x),
        "forward over reverse": lambda f, x: jacfwd(grad(f))(x),
        "reverse over reverse": lambda f, x: jacrev(grad(f))(x),
        "reverse over forward": lambda f, x: jacrev(jacfwd(f))(x),
        "forward over forward": lambda f, x: jacfwd(jacfwd(f))(x),
        "torch.func.hessian": lambda f, x: torch.func.hessian(f)(x),
        "vjp of gradient": lambda f, x: torch.stack(
            [vjp(grad(f), x)[1](v)[0] for v in torch.eye(x.numel(), dtype=x.dtype).view(-1, 3, 4)]
        ),
        "linearized gradient": lambda f, x: vmap(torch.func.linearize(grad(f), x)[1])(
            torch.eye(x.numel(), dtype=x.dtype).view(-1, 3, 4)
        ),
    }[name]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own
@pytest.mark.parametrize(
    "name",
    ["hessian", "hessian, vectorized", "hessian, forward over reverse", "hvp", "vhp",
     "jacobian of gradient", "jvp of gradient", "forward over reverse", "reverse over reverse",
     "reverse over forward", "forward over forward", "torch.func.hessian", "vjp of gradient",
     "linearized gradient"],
)  # fmt: skip
def test_every_way_to_a_hessian(name):
    model, x, want = hessians()
    got = _functional(name)(_fixed(model, x), x).reshape(want.shape)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_a_third_derivative():
    model, x = block(), normal(2, 4)
    f = _fixed(model, x)
    want = jacfwd(torch.func.hessian(f))(x)
    by_hand = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(by_hand), by_hand, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), by_hand, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), by_hand)
    g, h = grad(f)(x).flatten(), torch.func.hessian(f)(x).reshape(8, 8)
    cubic = want.reshape(8, 8, 8)
    # second = 2 H g; the gradient of its sum is 2 (sum_i dH_i g + H H 1)
    expected = 2 * (torch.einsum("ijk,j->k", cubic, g) + h @ h.sum(0))
    torch.testing.assert_close(third.flatten(), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_a_loop():
    model, x = block(), normal(4, 3, 4)
    torch.testing.assert_close(vmap(model)(x), torch.stack([model(y) for y in x]))

    def one(parameters: dict[str, Tensor], y: Tensor) -> Tensor:
        return functional_call(model, parameters, (y,)).square().sum()

    parameters = {n: p.detach() for n, p in model.named_parameters()}
    got = vmap(grad(one), (None, 0))(parameters, x)  # of each sample
    for place, y in enumerate(x):
        for name, value in grad(one)(parameters, y).items():
            torch.testing.assert_close(got[name][place], value, rtol=1e-10, atol=1e-12)
    many = {n: torch.stack([p, 2 * p]) for n, p in parameters.items()}
    got = vmap(grad(one), (0, None))(many, x[0])  # of an ensemble
    for place, scale in enumerate((1, 2)):
        own = {n: scale * p for n, p in parameters.items()}
        for name, value in grad(one)(own, x[0]).items():
            torch.testing.assert_close(got[name][place], value, rtol=1e-10, atol=1e-12)


# -- precision, and what an ordinary backward pass costs


@pytest.mark.parametrize("kernel", ["reference", "cpu", "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("combine", COMBINES)
def test_in_the_dtypes_of_training(kernel, dtype, tolerance, combine):
    torch.manual_seed(0)
    low = Block(combine=combine)
    low.experts.to(dtype)
    low.router.to(dtype)
    low.kernel = kernel
    high = Block(combine=combine)
    high.load_state_dict(low.state_dict())
    high.double().kernel = "reference"
    x = torch.randn(16, 4).to(dtype)

    def derivatives(model: Block, x: Tensor) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [leaf, *model.parameters()])
        with forward_ad.dual_level():
            out = model(forward_ad.make_dual(x, x.cos()))
            tangent = forward_ad.unpack_dual(out).tangent
        return tangent, jvp(model, (x,), (x.cos(),))[1], first.detach(), *second

    ours, truth = derivatives(low, x), derivatives(high, x.double())
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.dtype == dtype
        error = (mine.double() - theirs).norm() / theirs.norm().clamp_min(1e-9)
        assert error < tolerance


def test_an_ordinary_backward_pass_runs_and_keeps_nothing_more():
    model, x = block().float(), torch.randn(5, 4, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        args = x, model.router(x)
        out = ops.experts(x, args[1].weights, *_parameters(model), args[1].order, args[1].slots,
                          args[1].offsets, "silu", True, True, "auto")[0]  # fmt: skip
    node = out.grad_fn
    assert node.name() == "MoeifyExpertsBackward"
    # tokens, weights, up, down, down_bias, hidden, order, slots, offsets
    assert sum(t.shape == (5, 4) for t in node.saved_tensors) == 1
    assert len(node.saved_tensors) == 9
    with torch.profiler.profile() as profile:
        out.sum().backward()
    ran = [e.key for e in profile.key_averages() if e.key.startswith("moeify::")]
    assert sorted(ran) == ["moeify::combine_weights_backward", "moeify::experts_backward",
                           "moeify::gate_backward"]  # fmt: skip


def _parameters(model: Block) -> tuple[Tensor | None, ...]:
    e = model.experts
    return e.gate_up_proj, e.gate_up_bias, e.down_proj, e.down_bias


def test_reference_only_serves_second_derivatives_too():
    model, x = block().float(), torch.randn(5, 4, requires_grad=True)
    with reference_only():
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        assert torch.autograd.grad(first.square().sum(), x)[0].isfinite().all()
