"""Derivatives of a router and experts together: every way that torch has to get them.

The ops one by one are in `tests/kernels/test_derivatives.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from moeify.kernels.combine_weights import COMBINES
from moeify.kernels.gate import SCORES
from moeify.kernels.registry import reference_only
from moeify.nn.experts import Experts
from moeify.nn.router import Router

ops = torch.ops.moeify


def normal(*size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float64)


class Block(torch.nn.Module):
    def __init__(self, width: int = 4, hidden: int = 5, **options: Any) -> None:
        super().__init__()
        self.width = width
        self.router = Router(width, experts=3, top_k=2, **options)
        self.experts = Experts(experts=3, d_in=width, d_ff=hidden, activation="silu", gated=True)
        self.kernel = "auto"

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, self.width)
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


def derivatives(model: Block, x: Tensor) -> tuple[Tensor, ...]:
    """Return a tangent, twice, a gradient, and all gradients of its square."""
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(model(leaf).square().sum(), leaf, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), [leaf, *model.parameters()])
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent
    return tangent, jvp(model, (x,), (x.cos(),))[1], first.detach(), *second


def check_against_float64(low: Block, x: Tensor, tolerance: float, **options: Any) -> None:
    high = Block(**options)
    high.load_state_dict(low.state_dict())
    high.double().kernel = "reference"
    ours, truth = derivatives(low, x), derivatives(high, x.double())
    for mine, theirs in zip(ours, truth, strict=True):
        assert mine.dtype == x.dtype
        error = (mine.double() - theirs).norm() / theirs.norm().clamp_min(1e-9)
        assert error < tolerance


@pytest.mark.parametrize("kernel", ["reference", "cpu", "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("combine", COMBINES)
def test_in_the_dtypes_of_training(kernel, dtype, tolerance, combine):
    torch.manual_seed(0)
    model = Block(combine=combine).to(dtype)
    model.kernel = kernel
    check_against_float64(model, torch.randn(16, 4).to(dtype), tolerance, combine=combine)


@pytest.mark.parametrize("kernel", ["triton", "grouped_mm"])
def test_behind_the_kernels_of_cuda(kernel, monkeypatch):
    """As on a GPU, whose kernels run the forward pass; here an interpreter runs them."""
    pytest.importorskip("triton")
    from moeify.kernels import experts_cuda

    ran = []

    def load(place: str) -> Callable[..., Any]:
        name = place.rpartition(":")[2]
        run = getattr(experts_cuda, name) if name.startswith("experts") else None

        def counted(*args: Any) -> Any:
            ran.append(name)
            return NotImplemented if run is None else run(*args)

        return counted

    torch.manual_seed(0)
    options = {"width": 16, "hidden": 16, "combine": "normalized"}
    model = Block(**options)
    model.kernel = kernel
    monkeypatch.setattr("moeify.kernels.registry._load", load)
    check_against_float64(model, torch.randn(7, 16), 1e-4, **options)
    assert "experts" in ran


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
