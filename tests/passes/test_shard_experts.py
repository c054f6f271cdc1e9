"""shard-experts: each rank's share, when it stays away, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import fx, nn

from moeify.distributed.dtensor import is_sharded
from moeify.errors import PassError
from moeify.passes.infra.base import Fact
from moeify.passes.rewrite.blocks import blocks_of
from moeify.passes.shard_experts import ShardExperts
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
    run_pass,
)
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import alone_after, block_after, dense_graph


def show_experts(gm: fx.GraphModule) -> str:
    """Print what the experts of the one block hold: the pass changes nothing else."""
    ((path, block),) = blocks_of(gm)
    lines = []
    for name, parameter in block.experts.named_parameters():
        line = f"{path}.experts.{name} {list(parameter.shape)}"
        if is_sharded(parameter):
            line += f", DTensor, here {list(parameter.to_local().shape)}"
        lines.append(line)
    return "\n".join(lines)


def test_golden(golden):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], shard=False, expert=4)
        golden(before_and_after(ShardExperts(), gm, ctx, show_experts), "shard_experts.txt")


def test_the_graph_stays_as_it_is():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([], shard=False, expert=4)
        nodes = list(block.graph.nodes)
        assert run_pass(ShardExperts(), gm, ctx).modified
        assert list(block.graph.nodes) == nodes


def test_shards():
    with fake_world(4, 2):
        *_, block = block_after([], expert=4)
        weight = block.experts.up_proj
        assert weight.shape == (8, 16, 8)
        assert weight.to_local().shape == (2, 16, 8)
        *_, block = block_after([], expert=4, experts=2)  # a smaller group
        assert block.experts.up_proj.to_local().shape == (1, 16, 8)


def test_a_second_run_changes_nothing():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([], shard=False, expert=4)
        assert_idempotent(ShardExperts(), gm, ctx)
        before = dict(block.experts.named_parameters())
        assert_untouched(ShardExperts(), gm, ctx)
        assert all(before[name] is p for name, p in block.experts.named_parameters())


def test_experts_that_every_rank_has_stay_whole():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([], shard=False, expert=1)
        assert_untouched(ShardExperts(), gm, ctx)
        assert not any(map(is_sharded, block.experts.parameters()))


def test_without_ranks_nothing_changes():
    ctx, _, gm, block = alone_after([])
    assert_untouched(ShardExperts(), gm, ctx)
    assert not any(map(is_sharded, block.experts.parameters()))


def test_a_parameter_that_is_not_by_expert_is_refused():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([], expert=1)
        block.experts.up_proj = nn.Parameter(block.experts.up_proj.detach()[:3].clone())
        other, *_ = block_after([], expert=4)
        with pytest.raises(PassError, match=r"mlp: up_proj of shape \(3, 16, 8\) is not by expert"):
            run_pass(ShardExperts(), gm, replace(ctx, mesh=other.mesh))


def test_contract():
    with fake_world(4, 2):
        ctx, *_ = block_after([], shard=False, expert=4)
        message = assert_requires(ShardExperts(), Fact.MOE_BLOCKS, dense_graph(ctx), ctx)
        assert "mlp: no node calls its block" in message
