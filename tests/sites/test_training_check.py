"""Sites whose projections are used otherwise in training than in evaluation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.sites.discovery import discover

D, H = 8, 12


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, H), nn.Linear(H, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class Whole(nn.Module):
    """Its MLP is a module; in training it does `how` besides."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.mlp, self.norm, self.how = Mlp(), nn.LayerNorm(D), how

    def forward(self, x: Tensor) -> Tensor:
        how = self.how if self.training else ""
        y = x
        if how == "inner":
            y = y + self.mlp.up(2 * x).sum()
        elif how == "weight":
            y = y + self.mlp.up.weight.square().sum()
        elif how == "twice":
            y = self.mlp(y)
        if how == "masked":  # DropConnect
            weight = F.dropout(self.mlp.up.weight, 0.1)
            return self.norm(y + self.mlp.down(F.gelu(F.linear(y, weight, self.mlp.up.bias))))
        if how == "none":
            return self.norm(y)
        return self.norm(y + self.mlp(y))


class Across(nn.Module):
    """Its MLP is written across modules; in training it does `how` besides."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(D, H), nn.Linear(H, D), nn.LayerNorm(D)
        self.other, self.how = nn.Linear(H, D), how

    def mlp(self, x: Tensor) -> Tensor:
        return self.last(F.gelu(self.first(x)))

    def forward(self, x: Tensor) -> Tensor:
        how = self.how if self.training else ""
        y = x
        if how == "first":
            y = y + self.first(2 * x).sum()
        elif how == "last":
            y = y + self.last(y.new_zeros(*y.shape[:-1], H))
        elif how == "twice":
            y = self.mlp(y)
        elif how == "written":
            y = y.clone()
            h = F.gelu(self.first(y))
            y.mul_(2)
            return self.norm(y + self.last(h))
        elif how == "reordered":
            a, b = F.gelu(self.first(y)), F.gelu(self.first(-y))
            return self.norm(y + self.last(a) + self.last(b))
        if how == "part":
            return self.norm(y + self.other(F.gelu(self.first(y))))
        if how == "none":
            return self.norm(y)
        return self.norm(y + self.mlp(y))


class Gated(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.norm, self.how = nn.LayerNorm(D), how

    def forward(self, x: Tensor) -> Tensor:
        how = self.how if self.training else ""
        other = x + 1 if how == "other" else x.detach() if how == "detached" else x
        return self.norm(x + self.down(F.silu(self.gate(x)) * self.up(other)))


@pytest.mark.parametrize(
    ("kind", "how", "install", "reason"),
    [
        (Whole, "inner", "refused", "in training mode its parameter mlp.up.weight is also used"),
        (Whole, "weight", "refused", "in training mode its parameter mlp.up.weight is also used"),
        (Whole, "masked", "refused", "in training mode it is not such an MLP"),
        (Whole, "twice", "module", ""),
        (Whole, "none", "module", ""),
        (Across, "first", "refused", "in training mode its parameter first.weight is also used"),
        (Across, "last", "refused", "in training mode its parameter last.weight is also used"),
        (Across, "written", "refused", "in training mode its input is changed in place"),
        (Across, "reordered", "refused", "in training mode it runs again before"),
        (Across, "part", "refused", "in training mode it is not such an MLP"),
        (Across, "twice", "across modules", ""),
        (Across, "none", "across modules", ""),
        (Gated, "other", "refused", "in training mode it is not such an MLP"),
        (Gated, "detached", "refused", "in training mode it is not such an MLP"),
        (Gated, "", "across modules", ""),
    ],
)
def test_training_uses_the_projections_otherwise(
    kind: Any, how: str, install: str, reason: str
) -> None:
    model = nn.Sequential(kind(how), nn.Linear(D, D))
    sites = discover(model, torch.randn(2, 5, D)).sites
    assert [site.install for site in sites] == [install], sites
    assert reason.replace("parameter ", "parameter 0.") in sites[0].reason


def test_every_module_around_is_known() -> None:
    """A layer that runs an MLP inside another module in training bounds it there too."""

    class Inner(nn.Module):
        def __init__(self, outer: Any) -> None:
            super().__init__()
            self.__dict__["outer"] = outer

        def forward(self, x: Tensor) -> Tensor:
            return self.outer.mlp(x)

    class Outer(Across):
        def __init__(self) -> None:
            super().__init__("")
            self.inner = Inner(self)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x + (self.inner(x) if self.training else self.mlp(x)))

    found = discover(nn.Sequential(Outer()), torch.randn(2, 5, D)).found
    assert [site.placement.around for site in found] == [("0", "0.inner")]
