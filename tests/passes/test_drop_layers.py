"""drop-layers: before and after, what goes with a layer, and which layers must stay."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, fx, nn

from moeify.capture.capture import capture
from moeify.errors import UnsupportedModuleError
from moeify.passes.drop_layers import DropLayers
from moeify.passes.infra.base import Fact, PlanContext
from moeify.passes.infra.printer import print_graph
from moeify.passes.match.stacks import find_stacks
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


class Shares(nn.Module):
    """A first layer whose bias all layers read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PairBlock() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        bias = None
        for block in self.blocks:
            x, bias = block(x, bias)
        return x


class PairBlock(Block):
    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        bias = self.linear.bias * 2 if bias is None else bias
        return x + self.linear(x) + bias, bias


class Caches(nn.Module):
    """Returns the hidden state, and what each layer keeps for the next call."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(CacheBlock() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        caches = []
        for block in self.blocks:
            x, cache = block(x)
            caches.append(cache)
        return (x, *caches)


class CacheBlock(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.linear(x)
        return x + kept, kept


def row(count: int) -> nn.Sequential:
    return nn.Sequential(*(Block() for _ in range(count)))


def dropping(
    model: nn.Module, kept: Sequence[int], path: str = ""
) -> tuple[DropLayers, fx.GraphModule, PlanContext]:
    """Record a model; return the pass that keeps these layers of a stack, graph and context."""
    found = capture(model, x())
    stacks, _ = find_stacks(model, found)
    return DropLayers(stacks, {path: kept}), found.graph_module, PlanContext(model=model)


def x() -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(1))


def test_golden(golden):
    golden(before_and_after(*dropping(row(3), (0, 2))), "drop_layers.txt")


def test_drops_layers_from_the_graph():
    model = row(4)
    drop, gm, ctx = dropping(model, (0, 3))
    result = run_pass(drop, gm, ctx)
    assert result.modified
    assert torch.equal(result.graph_module(x())[0], model[3](model[0](x())))
    text = print_graph(result.graph_module)
    assert "0.linear" in text
    assert "1.linear" not in text
    assert "2.linear" not in text
    assert_untouched(drop, gm, ctx)  # nothing is left to do


@pytest.mark.parametrize("kept", [(1, 2), (0, 1)], ids=["the first", "the last"])
def test_drops_a_layer_at_either_end(kept):
    model = row(3)
    drop, gm, ctx = dropping(model, kept)
    first, second = kept
    after = run_pass(drop, gm, ctx).graph_module
    assert torch.equal(after(x())[0], model[second](model[first](x())))


def test_a_second_run_changes_nothing():
    assert_idempotent(*dropping(row(3), (0, 2)))


def test_what_a_dropped_layer_returned_to_the_caller_goes_with_it():
    model = Caches()
    drop, gm, ctx = dropping(model, (0, 2), "blocks")
    assert len(gm(x())) == 4
    got = run_pass(drop, gm, ctx).graph_module(x())
    hidden, first = model.blocks[0](x())
    hidden, last = model.blocks[2](hidden)
    for value, expected in zip(got, (hidden, first, last), strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize(
    ("kept", "path"), [((0, 1, 2), ""), ((0,), "elsewhere")], ids=["all kept", "another stack"]
)
def test_nothing_to_drop(kept, path):
    assert_untouched(*dropping(row(3), kept, path))


def test_refuses_a_layer_that_others_read():
    drop, gm, ctx = dropping(Shares(), (1, 2), "blocks")
    with pytest.raises(UnsupportedModuleError, match=r"blocks\.0: cannot be dropped: blocks\.1 "):
        run_pass(drop, gm, ctx)


def test_a_layer_that_only_reads_may_go():
    model = Shares()
    drop, gm, ctx = dropping(model, (0, 2), "blocks")
    got = run_pass(drop, gm, ctx).graph_module(x())[0]
    hidden, bias = model.blocks[0](x(), None)
    assert torch.equal(got, model.blocks[2](hidden, bias)[0])


def test_contract():
    drop, _, ctx = dropping(row(3), (0, 2))
    message = assert_requires(drop, Fact.CAPTURED, fx.symbolic_trace(row(3)), ctx)
    assert "no node has a record" in message
