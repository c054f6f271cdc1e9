"""slice-experts: before and after, the shares, when it stays away, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moeify.errors import PlanError, UnsupportedModuleError
from moeify.passes.infra.base import Fact
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.slice_experts import SliceExperts
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
)
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import (
    alone_after,
    block_after,
    dense_graph,
    hide_experts,
    show_block,
    stage,
)

SLICED = {"expert": 2, "tensor": 2, "experts_in_tp": "slice"}
PASSES = [InsertAllToAll(), SliceExperts()]


def test_golden(golden):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], **SLICED)
        golden(before_and_after(SliceExperts(), gm, ctx, show_block), "slice_experts.txt")


def test_slices():
    with fake_world(4, 2):
        *_, block = block_after(PASSES, **SLICED)
        experts = block.experts
        assert experts.up_proj.to_local().shape == (4, 8, 8)
        assert experts.down_proj.to_local().shape == (4, 8, 8)
        assert experts.down_bias.to_local().shape == (4, 4)
        assert experts.up_proj.shape == (8, 16, 8)


def test_a_second_run_changes_nothing():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([InsertAllToAll()], **SLICED)
        assert_idempotent(SliceExperts(), gm, ctx)
        before = dict(block.experts.named_parameters())
        assert_untouched(SliceExperts(), gm, ctx)
        assert all(before[name] is p for name, p in block.experts.named_parameters())


@pytest.mark.parametrize("experts_in_tp", ["replicate", "fold"])
def test_experts_that_are_not_to_be_sliced(experts_in_tp):
    with fake_world(4, 2):
        parallel = SLICED | {"experts_in_tp": experts_in_tp}
        ctx, _, gm, _ = block_after([InsertAllToAll()], **parallel)
        assert_untouched(SliceExperts(), gm, ctx)


def test_without_ranks_nothing_changes():
    ctx, _, gm, _ = alone_after([])
    assert_untouched(SliceExperts(), gm, ctx)


def test_widths_that_do_not_slice():
    with fake_world(3, 3), pytest.raises(PlanError, match="does not slice over a tensor axis of 3"):
        block_after([SliceExperts()], world=3, node=3, tensor=3, experts_in_tp="slice")
    with fake_world(16, 16), pytest.raises(UnsupportedModuleError, match="16 and 8 do not slice"):
        block_after([SliceExperts()], world=16, node=16, tensor=16, experts_in_tp="slice")


def test_contract():
    with fake_world(4, 2):
        ctx, gm, _ = stage(**SLICED)
        message = assert_requires(SliceExperts(), Fact.MOE_BLOCKS, dense_graph(ctx), ctx)
        assert "mlp: no node calls its block" in message
        message = assert_requires(SliceExperts(), Fact.EXPERT_CALLS, gm, hide_experts(gm, ctx))
        assert "mlp: does not call its experts as a module" in message


def test_whole_experts_are_refused():
    with fake_world(4, 2):
        ctx, gm, block = stage(**SLICED)
        block.experts.up_proj = nn.Parameter(torch.ones(8, 16, 8))
        message = assert_requires(SliceExperts(), Fact.SHARDED, gm, ctx)
        assert "mlp: experts.up_proj is whole on each of 2 ranks" in message
