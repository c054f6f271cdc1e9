"""slice-experts: before and after, the shares, when it stays away, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeify.errors import PassOrderError, PlanError, UnsupportedModuleError
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.slice_experts import SliceExperts
from moeify.passes.testing import run_pass
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import alone_after, assert_unchanged, block_after, text_of

SLICED = {"expert": 2, "tensor": 2, "experts_in_tp": "slice"}
PASSES = [InsertAllToAll(), SliceExperts()]


def test_golden(golden):
    with fake_world(4, 2):
        *_, block = block_after([InsertAllToAll()], **SLICED)
        golden(text_of(block), "coordinate_all_to_all_before.txt")
        *_, block = block_after(PASSES, **SLICED)
        golden(text_of(block), "slice_experts.txt")


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
        ctx, _, gm, block = block_after(PASSES, **SLICED)
        before = dict(block.experts.named_parameters())
        assert_unchanged(SliceExperts(), gm, ctx)
        assert all(before[name] is p for name, p in block.experts.named_parameters())


@pytest.mark.parametrize("experts_in_tp", ["replicate", "fold"])
def test_experts_that_are_not_to_be_sliced(experts_in_tp):
    with fake_world(4, 2):
        parallel = SLICED | {"experts_in_tp": experts_in_tp}
        ctx, _, gm, _ = block_after([InsertAllToAll()], **parallel)
        assert_unchanged(SliceExperts(), gm, ctx)


def test_without_ranks_nothing_changes():
    ctx, _, gm, _ = alone_after([])
    assert_unchanged(SliceExperts(), gm, ctx)


def test_widths_that_do_not_slice():
    with fake_world(3, 3), pytest.raises(PlanError, match="does not slice over a tensor axis of 3"):
        block_after([SliceExperts()], world=3, node=3, tensor=3, experts_in_tp="slice")
    with fake_world(16, 16), pytest.raises(UnsupportedModuleError, match="16 and 8 do not slice"):
        block_after([SliceExperts()], world=16, node=16, tensor=16, experts_in_tp="slice")


def test_contract():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], **SLICED)
        with pytest.raises(PassOrderError, match="sharded"):
            run_pass(SliceExperts(), gm, replace(ctx, facts=frozenset({"moe-blocks"})))
