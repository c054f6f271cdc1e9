"""The proof of a conversion: what it accepts, and what it catches."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import moeify as mf
from moeify.convert import install, verify
from moeify.convert.dense_gradients import untouched
from moeify.convert.verify import compare, snapshot
from moeify.nn.router import Router
from moeify.passes.infra.base import PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of
from tests.convert.models import ALL4, Mlp, ScaleHidden, Stack
from tests.zoo_models import ZOO, ids


@pytest.mark.parametrize("residual", ["none", "coefficient", "add", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("init", ["copy", "granular"])
@pytest.mark.parametrize("name", ["phi3", "gpt2", "bert"])
@pytest.mark.thin(5)
def test_step_zero_is_exact_where_promised(name, residual, top_k, init):
    if init == "granular":
        top_k *= 2
    model = ZOO[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    dense = copy.deepcopy(model)
    plan = {
        "layers": [{"select": "all", "experts": 4, "top_k": top_k, "residual": residual}],
        "init": {"experts": init, "granularity": 2 if init == "granular" else 1},
    }
    inputs = {"input_ids": ids()}
    mf.moeify(model, plan)
    names = [n for n, _ in model.named_parameters()]
    gap = compare(
        snapshot(dense, inputs, untouched(dense, names)),
        snapshot(model, inputs, untouched(model, names)),
        (),
    )
    assert gap.outputs < 1e-5
    assert gap.gradients < 1e-5


def test_verification_catches_a_wrong_number(monkeypatch):
    monkeypatch.setitem(verify.TOLERANCE, torch.float32, 1e-12)
    model = ZOO["llama"].build()
    with pytest.raises(mf.VerificationError, match="differ from the dense"):
        mf.moeify(model, {"layers": [{"select": "all", "experts": 3, "top_k": 2}]})
    assert not any(isinstance(m, Router) for m in model.modules())


class NormLast(nn.Module):
    """Post-norm: the squares of its outputs are constant, so their gradients are rounding noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Linear(8, 8), Mlp()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.norm(x + self.mlp(x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_final_norm_verifies_and_still_catches_wrong_gradients(top_k, monkeypatch):
    plan = {"layers": [{"select": "all", "experts": 3, "top_k": top_k}]}
    x = torch.randn(64, 8)
    mf.moeify(NormLast(), plan, example_inputs=x)
    real = install.compare

    def wrong_gradients(dense: Any, moe: Any, layers: Any) -> Any:
        moe.gradients["embed.weight"].mul_(1.001)
        return real(dense, moe, layers)

    monkeypatch.setattr(install, "compare", wrong_gradients)
    with pytest.raises(mf.VerificationError, match="gradients differ"):
        mf.moeify(NormLast(), plan, example_inputs=x)


def test_a_model_without_a_backward_is_compared_by_its_outputs():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise NotImplementedError("forward only")

    class Model(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(NoBackward.apply(x * self.weight))

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

    mf.moeify(Model(), ALL4, example_inputs=torch.randn(4, 8))


def test_a_gradient_that_vanishes_is_caught():
    @dataclass(frozen=True)
    class Detach(ScaleHidden):
        def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
            for _, block in blocks_of(gm):
                node = next(n for n in block.graph.nodes if n.target is torch.ops.moeify.combine)
                with block.graph.inserting_after(node):
                    cut = block.graph.call_method("detach", (node,))
                node.replace_all_uses_with(cut, delete_user_cb=lambda u, c=cut: u is not c)
                block.recompile()
            return PassResult(gm, True)

    # no path around the MLP: the first layer gets no gradient at all, and the numbers stay right
    model = nn.Sequential(nn.Linear(8, 8), Mlp(), nn.LayerNorm(8))
    with pytest.raises(mf.VerificationError, match="gradients differ"):
        mf.moeify(model, ALL4, example_inputs=torch.randn(9, 8), passes=[Detach(1.0)])
    assert isinstance(model[1], Mlp)


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


def test_mixed_dtypes_are_compared_at_the_coarsest():
    model = nn.Sequential(nn.Embedding(9, 8), Cast(), Mlp().bfloat16(), Mlp().bfloat16())
    plan = {"layers": [{"select": "all", "experts": 3, "top_k": 2}]}
    mf.moeify(model, plan, example_inputs=torch.arange(9)[None])
    assert model[0].weight.dtype == torch.float32
    assert all(isinstance(model[i], fx.GraphModule) for i in (2, 3))
