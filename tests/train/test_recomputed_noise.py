"""Recomputed forwards route as the first ones did, whether or not torch keeps the RNG state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import moeify as mf
from moeify.sites.record import routers_of
from tests.zoo_models import ZOO, ids

NOISES: dict[str, tuple[int, dict[str, Any]]] = {
    "random drop": (2, {"drop": "random", "capacity_factor": 0.5, "min_capacity": 1}),
    "rsample": (1, {"noise": "rsample", "capacity_factor": None}),
    "gumbel": (2, {"noise": "gumbel", "capacity_factor": None}),
    "all": (2, {"noise": "jitter", "jitter_eps": 0.2, "drop": "random", "capacity_factor": 0.5}),
}
X = torch.randn(40, 16, generator=torch.Generator().manual_seed(2))


def plan(name: str) -> dict[str, Any]:
    top_k, router = NOISES[name]
    return {
        "layers": [{"select": "all", "experts": 4, "top_k": top_k}],
        "router": {"aux_loss": 0.1, **router},
        "init": {"router_std": 0.3, "experts": "noise", "noise_std": 0.3},
    }


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Pair(nn.Module):
    """Two layers, of which the second runs twice; `wrap` checkpoints what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Layer(), Layer()
        self.wrap: Callable[..., Tensor] = lambda f, x: f(x)
        self.inner: Callable[..., Tensor] = lambda f, x: f(x)

    def twice(self, x: Tensor) -> Tensor:
        return self.inner(self.b, self.inner(self.b, x).tanh()) * 2

    def forward(self, x: Tensor) -> Tensor:
        return self.wrap(self.twice, self.wrap(self.a, x))


def converted(name: str) -> Pair:
    torch.manual_seed(0)
    return mf.moeify(Pair(), plan(name), example_inputs=X).train()


def checkpointed(**options: Any) -> Callable[..., Tensor]:
    return lambda f, x: torch_checkpoint(f, x, preserve_rng_state=False, **options)


def gradients(model: Pair, run: Callable[[Tensor], Tensor], passes: int = 1) -> list[Tensor]:
    """Return the gradients with the draws of one seed, after as many backward passes."""
    model.zero_grad()
    x = X.clone().requires_grad_()
    torch.manual_seed(1)
    loss = run(x).square().mean()
    losses = mf.aux_loss(model) if model.training else torch.zeros(())
    loss = loss + losses if losses.requires_grad else loss
    for number in range(passes):
        torch.manual_seed(100 + number)  # the state that a recomputation finds
        loss.backward(retain_graph=number < passes - 1)
    assert x.grad is not None
    return [x.grad / passes, *(p.grad / passes for p in model.parameters() if p.grad is not None)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def selective() -> Any:
    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        matmul = op is torch.ops.aten.addmm.default
        return CheckpointPolicy.MUST_SAVE if matmul else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


WRAPS: dict[str, Callable[..., Tensor]] = {
    "early stop": checkpointed(use_reentrant=False),
    "whole": checkpointed(use_reentrant=False, early_stop=False),
    "selective": checkpointed(use_reentrant=False, context_fn=selective),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("wrap", WRAPS)
def test_gradients_are_those_of_the_forward(noise: str, wrap: str) -> None:
    model = converted(noise)
    want = gradients(model, model)
    model.wrap = WRAPS[wrap]
    assert_same(gradients(model, model), want)


@pytest.mark.parametrize("noise", NOISES)
def test_several_recomputations_and_nested_regions(noise: str) -> None:
    model = converted(noise)
    want = gradients(model, model)
    model.wrap = WRAPS["early stop"]
    assert_same(gradients(model, model, passes=2), want)
    model.inner = WRAPS["early stop"]
    assert_same(gradients(model, model), want)
    assert_same(gradients(model, lambda x: WRAPS["early stop"](model, x)), want)


@pytest.mark.parametrize("noise", NOISES)
def test_reentrant(noise: str) -> None:
    model = converted(noise)
    for router in dict(routers_of(model)).values():
        router.aux_loss = 0.0  # without a graph in a reentrant forward
        router.weight.requires_grad_(False)
    want = gradients(model, model)
    model.wrap = checkpointed(use_reentrant=True)
    assert_same(gradients(model, model), want)
    model.inner = model.wrap
    assert_same(gradients(model, model), want)


class Recomputed(torch.autograd.Function):
    """Checkpointing as other libraries write it."""

    @staticmethod
    def forward(ctx: Any, function: Any, x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        torch.autograd.backward(out, grad)
        return None, x.grad


def test_other_libraries() -> None:
    model = converted("all")
    for router in dict(routers_of(model)).values():
        router.aux_loss = 0.0
        router.weight.requires_grad_(False)
    want = gradients(model, model)
    model.wrap = Recomputed.apply
    assert_same(gradients(model, model), want)


def test_dropout_of_the_user_is_repeated_where_torch_does() -> None:
    model = converted("all")

    def wrap(preserve: bool, f: Any, x: Tensor) -> Tensor:
        def noisy(x: Tensor) -> Tensor:
            return nn.functional.dropout(f(nn.functional.dropout(x, 0.3)), 0.3)

        if not preserve:
            return noisy(x)
        return torch_checkpoint(noisy, x, use_reentrant=False)

    model.wrap = lambda f, x: wrap(False, f, x)
    want = gradients(model, model)
    model.wrap = lambda f, x: wrap(True, f, x)
    assert_same(gradients(model, model), want)


def test_what_is_drawn_is_the_same_with_and_without_checkpoints() -> None:
    model, states = converted("all"), []
    for wrap in (model.wrap, WRAPS["early stop"]):
        model.wrap = wrap
        torch.manual_seed(1)
        out = model(X.clone().requires_grad_())
        states.append(torch.get_rng_state())
        out.sum().backward()
        assert torch.equal(torch.get_rng_state(), states[-1])
    assert torch.equal(*states)


@pytest.mark.parametrize("way", ["model", "layers", "wrapped layers"])
@pytest.mark.parametrize("noise", ["all", "gumbel"])
def test_compiled(noise: str, way: str) -> None:
    torch._dynamo.reset()
    model = converted(noise).double()
    model.wrap = WRAPS["early stop"]
    run: Any = model
    if way == "model":
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif way == "layers":
        for layer in (model.a, model.b):
            layer.compile(backend="aot_eager", fullgraph=True)
    else:
        model.a, model.b = (
            torch.compile(layer, backend="aot_eager") for layer in (model.a, model.b)
        )

    def output(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return run(x).square().sum()

    x, along = X.double().requires_grad_(), torch.ones(X.shape, dtype=torch.float64) * 1e-6
    loss = output(x)
    torch.manual_seed(2)
    gradient = torch.autograd.grad(loss, x)[0]
    slope = (output(x + along) - output(x - along)) / 2  # of the forward, with its draws
    torch.testing.assert_close((gradient * along).sum(), slope, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["llama"])
def test_hugging_face(name: str) -> None:
    torch.manual_seed(0)
    model = mf.moeify(ZOO[name].build(), plan("all")).train()
    found = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
            )
        model.zero_grad()
        torch.manual_seed(1)
        loss = model(input_ids=ids(), labels=ids()).loss
        torch.manual_seed(2)
        loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert_same(found[1], found[0])
