"""Stacks of layers on the graph, and why there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from moeify.capture.capture import capture
from moeify.passes.match.stacks import find_stacks


class Block(nn.Module):
    def __init__(self, width: int = 4, out: int | None = None, residual: bool = True) -> None:
        super().__init__()
        self.linear, self.residual = nn.Linear(width, out or width), residual

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return x + y if self.residual else y


class Other(Block):
    pass


class PostNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Twice(nn.Module):
    """Runs its blocks in an order, with something between them."""

    def __init__(self, order: tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        self.blocks, self.order, self.scale = nn.ModuleList([Block(), Block()]), order, scale

    def forward(self, x: Tensor) -> Tensor:
        for at in self.order:
            x = self.blocks[at](x if self.scale == 1.0 else x * self.scale)
        return x


def row(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(*blocks)


def test_finds_stacks_past_what_is_around():
    model = row(nn.Linear(4, 4), row(Block(), Block(), Block()), row(PostNorm(), PostNorm()))
    stacks, _ = find_stacks(model, capture(model, torch.randn(2, 4)))
    assert [(s.path, len(s), s.role) for s in stacks] == [("1", 3, ""), ("2", 2, "")]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (row(Block(residual=False), Block(residual=False)), "0: has no residual path"),
        (row(Block(), Other()), "different classes (Block and Other)"),
        (row(Block(4, 6, residual=False), Block(6, 4, residual=False)), "another shape ([2, 6])"),
        (Twice((0, 1, 1)), "block 1 runs 2 times"),
        (Twice((1, 0)), "blocks.1: does not take just what blocks.0 returns"),
        (Twice((0, 1), 0.5), "blocks.1: does not take just what blocks.0 returns"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_says_why_there_is_none(model, reason):
    stacks, misses = find_stacks(model, capture(model, torch.randn(2, 4)))
    assert not stacks
    assert any(reason in str(miss) for miss in misses), [str(miss) for miss in misses]
