"""insert-all-to-all: each form of an exchange, where none is needed, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx, nn

from moeify.distributed import collectives
from moeify.errors import PassError
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.lower_kernels import LowerKernels
from moeify.passes.overlap_chunks import OverlapChunks
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
from tests.passes.parallel_block import (
    alone_after,
    block_after,
    dense_graph,
    hide_experts,
    show_block,
)

FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "_uneven": {"splits": "uneven"},
    "_allgather": {"all_to_all": "allgather"},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_golden(form, golden):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=4, **FORMS[form])
        text = before_and_after(InsertAllToAll(), gm, ctx, show_block)
        golden(text, f"insert_all_to_all{form}.txt")


def test_golden_lowered(golden):
    """The experts are fused with the sort of the rows that arrived, and nothing else is."""
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], expert=4)
        text = before_and_after(LowerKernels(kernel="cpu"), gm, ctx, show_block)
        golden(text, "insert_all_to_all_lowered.txt")


@pytest.mark.parametrize("form", list(FORMS))
def test_a_second_run_changes_nothing(form):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=4, **FORMS[form])
        assert_idempotent(InsertAllToAll(), gm, ctx)


def test_experts_that_every_rank_has_need_no_exchange():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=1)
        assert_untouched(InsertAllToAll(), gm, ctx)


def test_without_ranks_nothing_changes():
    passes = [ShardExperts(), InsertAllToAll(), CoordinateAllToAll(), OverlapChunks()]
    ctx, _, gm, block = alone_after(passes)
    assert not [n for n in block.graph.nodes if "collectives" in str(n.target)]
    assert_untouched(InsertAllToAll(), gm, ctx)


def test_a_block_that_another_pass_has_changed():
    with fake_world(4, 2), pytest.raises(PassError, match="mlp: no dispatch, experts, combine"):
        block_after([_Rename(), InsertAllToAll()], expert=4)


class _Rename:
    name = "rename"
    requires = frozenset({Fact.MOE_BLOCKS})
    provides: frozenset[str] = frozenset({Fact.SHARDED})

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        ((_, block),) = blocks_of(gm)
        for call in block.graph.find_nodes(op="call_module", target="experts"):
            with block.graph.inserting_after(call):
                clone = block.graph.call_function(torch.clone, (call,))
            call.replace_all_uses_with(clone)
            clone.args = (call,)
        return PassResult(gm, True)


def test_a_lowered_block_is_refused():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([LowerKernels(kernel="cpu")], expert=4)
        with pytest.raises(PassError, match="mlp: no dispatch, experts, combine"):
            run_pass(InsertAllToAll(), gm, ctx)
        assert not block.graph.find_nodes(op="call_function", target=collectives.all_to_all)


def test_contract():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=4)
        message = assert_requires(InsertAllToAll(), Fact.MOE_BLOCKS, dense_graph(ctx), ctx)
        assert "mlp: no node calls its block" in message
        message = assert_requires(InsertAllToAll(), Fact.EXPERT_CALLS, gm, hide_experts(gm, ctx))
        assert "mlp: does not call its experts as a module" in message


def test_whole_experts_are_refused():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([], expert=4)
        block.experts.up_proj = nn.Parameter(torch.ones(8, 16, 8))
        message = assert_requires(InsertAllToAll(), Fact.SHARDED, gm, ctx)
        assert "mlp: experts.up_proj is whole on each of 4 ranks" in message
