"""`demoeify` on every form of MLP: gates, slopes, norms inside, and linear experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeify as mf
from moeify.errors import UnsupportedModuleError
from tests.convert.test_demoeify import RESIDUALS, X, convert, plan, same_state, state_of


class Gated(nn.Module):
    """Gated in any form: fused or not, the linear half first or second."""

    def __init__(self, fused, linear_first):
        super().__init__()
        self.fused, self.linear_first = fused, linear_first
        if fused:
            self.both = nn.Linear(8, 32)
        else:
            self.one, self.two = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        one, two = self.both(x).chunk(2, -1) if self.fused else (self.one(x), self.two(x))
        return self.down(one * F.silu(two) if self.linear_first else F.silu(one) * two)


class Sloped(nn.Module):
    """One PReLU slope for all of the width."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.act = nn.Linear(8, 16), nn.Linear(16, 8), nn.PReLU()

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize(
    "build",
    [lambda f=f, s=s: Gated(f, s) for f in (True, False) for s in (True, False)] + [Sloped],
)
@pytest.mark.thin(2)
def test_forms(build, residual):
    model = nn.Sequential(build(), nn.LayerNorm(8))
    before = state_of(model)
    y = model(X)
    mf.demoeify(convert(model, residual=residual))
    same_state(model, before)
    assert torch.equal(model(X), y)


class Inlined(nn.Module):
    """An MLP with a norm inside, written out in a larger module."""

    def __init__(self):
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 8)
        self.out = nn.LayerNorm(8)

    def forward(self, x):
        return self.out(x + self.down(self.norm(F.gelu(self.up(x)))))


@pytest.mark.parametrize("residual", RESIDUALS)
def test_inlined_norm(residual):
    model = Inlined()
    before = state_of(model)
    norm = model.norm.weight
    mf.moeify(model, plan(residual=residual), example_inputs=X)
    mf.demoeify(model)
    same_state(model, before)
    assert model.norm.weight is norm
    mf.moeify(model, plan(residual="none"), example_inputs=X)
    with torch.no_grad():
        model.down.experts.inner_0_norm.add_(1.0)
    mf.demoeify(model)
    torch.testing.assert_close(model.norm.weight, norm + 1)


# -- expert: linear


LINEAR = {"layers": [{"select": {"name": "0"}, "experts": 4, "expert": "linear"}]}


def test_linear_experts():
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8))
    before, linear = state_of(model), model[0]
    mf.moeify(model, LINEAR, example_inputs=X)
    mf.demoeify(model)
    assert model[0] is linear
    same_state(model, before)


def test_trained_linear_experts_are_folded():
    model = nn.Sequential(nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 8)).eval()
    mf.moeify(model, LINEAR, example_inputs=X)
    experts = model[0].experts
    with torch.no_grad():  # alike, so that the fold is all there is
        experts.weight.add_(torch.randn(8, 8))
        experts.bias.add_(torch.randn(8))
    y = model(X)
    mf.demoeify(model)
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(X), y)


def test_linear_experts_without_a_bias_to_fold_into():
    model = nn.Sequential(nn.Linear(8, 5, bias=False), nn.ReLU(), nn.Linear(5, 8))
    mf.moeify(model, LINEAR, example_inputs=X)
    with torch.no_grad():
        model[0].experts.bias.add_(1.0)
    with pytest.raises(UnsupportedModuleError, match="none to hold it"):
        mf.demoeify(model)
