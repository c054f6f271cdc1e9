"""shard-experts: each rank's share, when it stays away, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn

from moeify.distributed.dtensor import is_sharded
from moeify.errors import PassError, PassOrderError
from moeify.passes.shard_experts import ShardExperts
from moeify.passes.testing import run_pass
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import alone_after, assert_unchanged, block_after


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
        ctx, _, gm, block = block_after([], expert=4)
        before = dict(block.experts.named_parameters())
        assert_unchanged(ShardExperts(), gm, ctx)
        assert all(before[name] is p for name, p in block.experts.named_parameters())


def test_experts_that_every_rank_has_stay_whole():
    with fake_world(4, 2):
        *_, block = block_after([], expert=1)
        assert not any(map(is_sharded, block.experts.parameters()))


def test_without_ranks_nothing_changes():
    ctx, _, gm, block = alone_after([ShardExperts()])
    assert not any(map(is_sharded, block.experts.parameters()))
    assert_unchanged(ShardExperts(), gm, ctx)


def test_a_parameter_that_is_not_by_expert_is_refused():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([], expert=1)
        block.experts.up_proj = nn.Parameter(block.experts.up_proj.detach()[:3].clone())
        other, *_ = block_after([], expert=4)
        with pytest.raises(PassError, match=r"mlp: up_proj of shape \(3, 16, 8\) is not by expert"):
            ShardExperts().run(gm, replace(ctx, mesh=other.mesh))


def test_contract():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=4)
        with pytest.raises(PassOrderError, match="moe-blocks"):
            run_pass(ShardExperts(), gm, replace(ctx, facts=frozenset()))
