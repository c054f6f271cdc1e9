"""insert-all-to-all: each form of an exchange, where none is needed, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx

from moeify.distributed import collectives
from moeify.errors import PassError, PassOrderError
from moeify.passes.coordinate_all_to_all import CoordinateAllToAll
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.lower_kernels import LowerKernels
from moeify.passes.overlap_chunks import OverlapChunks
from moeify.passes.rewrite.blocks import blocks_of
from moeify.passes.shard_experts import ShardExperts
from moeify.passes.testing import run_pass
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import alone_after, assert_unchanged, block_after, text_of

FORMS: dict[str, dict[str, Any]] = {
    "": {},
    "_uneven": {"splits": "uneven"},
    "_allgather": {"all_to_all": "allgather"},
}


def test_golden_before(golden):
    with fake_world(4, 2):
        *_, block = block_after([], expert=4)
        golden(text_of(block), "insert_all_to_all_before.txt")


@pytest.mark.parametrize("form", list(FORMS))
def test_golden(form, golden):
    with fake_world(4, 2):
        *_, block = block_after([InsertAllToAll()], expert=4, **FORMS[form])
        golden(text_of(block), f"insert_all_to_all{form}.txt")


def test_golden_lowered(golden):
    """The experts are fused with the sort of the rows that arrived, and nothing else is."""
    with fake_world(4, 2):
        *_, block = block_after([InsertAllToAll(), LowerKernels(kernel="cpu")], expert=4)
        golden(text_of(block), "insert_all_to_all_lowered.txt")


@pytest.mark.parametrize("form", list(FORMS))
def test_a_second_run_changes_nothing(form):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([InsertAllToAll()], expert=4, **FORMS[form])
        assert_unchanged(InsertAllToAll(), gm, ctx)


def test_experts_that_every_rank_has_need_no_exchange():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=1)
        assert_unchanged(InsertAllToAll(), gm, ctx)


def test_without_ranks_nothing_changes():
    passes = [ShardExperts(), InsertAllToAll(), CoordinateAllToAll(), OverlapChunks()]
    ctx, _, gm, block = alone_after(passes)
    assert not [n for n in block.graph.nodes if "collectives" in str(n.target)]
    assert_unchanged(InsertAllToAll(), gm, ctx)


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
            InsertAllToAll().run(gm, ctx)
        assert not block.graph.find_nodes(op="call_function", target=collectives.all_to_all)


@pytest.mark.parametrize("missing", [Fact.MOE_BLOCKS, Fact.SHARDED])
def test_contract(missing):
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=4)
        facts = InsertAllToAll.requires - {missing}
        with pytest.raises(PassOrderError, match=str(missing)):
            run_pass(InsertAllToAll(), gm, replace(ctx, facts=facts))
