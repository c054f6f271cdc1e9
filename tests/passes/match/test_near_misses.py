"""What looks like an MLP and is none, and why."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.sites.discovery import discover
from tests.conv_models import Conv, ConvModel

D, H = 8, 24


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), D)


def reason(model: nn.Module, inputs: object = None) -> str:
    """Return the one reason why a model has no site that can be replaced."""
    found = discover(model, x() if inputs is None else inputs)
    assert all(site.install == "refused" for site in found.sites), found.sites
    reasons = {site.reason for site in found.sites} | {n.reason for n in found.near_misses}
    assert len(reasons) == 1, reasons
    return reasons.pop()


class Leaky(nn.Module):
    """Uses its hidden value for something else as well."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(D, H), nn.Linear(H, D), how
        self.kept: list[object] = []

    def forward(self, x: Tensor) -> object:
        h = F.gelu(self.up(x))
        match self.how:
            case "returned":
                return self.down(h), h
            case "read":
                self.kept.append(h.detach().abs().mean())
            case "item":
                if float(h.sum()) > 1e9:
                    return x
            case "view":
                h.view(-1)[0] = 0
            case "setitem":
                h[..., 0] = 0
            case "index":
                h[..., :4].mul_(2)
        return self.down(h)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("returned", "also returned"),
        ("read", "also used by `detach` in the model"),
        ("item", "also used by `sum` in the model"),
        ("view", "also used by `view` in the model"),
        ("setitem", "`setitem` is not elementwise"),
        ("index", "also used by `getitem` in the model"),
    ],
)
def test_hidden_value_leaks(how: str, text: str) -> None:
    model = Leaky(how)
    assert text in reason(model)
    assert model.kept == []


class Wrong(nn.Module):
    """Looks like an MLP and is none."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)
        self.batch, self.mask = nn.BatchNorm1d(H), torch.rand(5, 1)
        self.table = nn.Embedding(5, H)
        self.register_buffer("beta", torch.ones(H))

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        match self.how:
            case "batch norm":
                h = self.batch(F.gelu(h).transpose(1, 2)).transpose(1, 2)
            case "mask":
                h = F.gelu(h) * self.mask
            case "shift":
                h = F.gelu(h.roll(1, 1))
            case "over tokens":
                h = F.softmax(h, 1)
            case "normalised":
                h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
            case "buffer":
                h = F.silu(self.beta * h)
            case "always dropped":
                h = F.dropout(F.gelu(h), 0.5)
            case "cumulated":
                h = F.gelu(h).cumsum(-1)
        return self.down(h)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("batch norm", "`transpose` is not elementwise"),
        ("mask", "comes from outside"),
        ("shift", "`roll` is not elementwise"),
        ("over tokens", "`softmax` over dimension 1 mixes tokens"),
        ("normalised", "only a normalisation"),
        ("buffer", "beta of shape (24,)"),
        ("always dropped", "on in evaluation too"),
        ("cumulated", "`cumsum` is not elementwise"),
    ],
)
def test_not_tokenwise(how: str, text: str) -> None:
    assert text in reason(Wrong(how))


def test_three_layers_are_no_mlp() -> None:
    model = nn.Sequential(
        nn.Linear(D, H), nn.ReLU(), nn.Linear(H, 2 * H), nn.ReLU(), nn.Linear(2 * H, D)
    )
    found = discover(model, x())
    assert not found.sites
    assert {near.name for near in found.near_misses} == {"2", "4"}
    head = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D), nn.ReLU(), nn.Linear(D, 4))
    found = discover(head, x())
    assert not found.sites
    assert "part of an MLP of more layers" in found.near_misses[0].reason


@pytest.mark.parametrize("options", [{"groups": 2}, {"stride": 2}, {"padding": 1}])
def test_convolutions_that_are_no_projections(options: dict[str, int]) -> None:
    mlp = nn.Sequential(Conv(**options), nn.AdaptiveAvgPool2d(4))
    found = discover(ConvModel(mlp), torch.randn(2, 3, 8, 8))
    assert not found.sites
    assert next(iter(options)) in found.near_misses[0].reason


def test_squeeze_and_excitation() -> None:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, D, 3), nn.Conv2d(D, 4, 1), nn.Conv2d(4, D, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))

    assert "only scales another value" in reason(Squeeze(), torch.randn(2, 3, 8, 8))
