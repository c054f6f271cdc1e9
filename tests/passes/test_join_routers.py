"""join-routers: the groups that routers learn, and when there are none."""

from __future__ import annotations

from torch import fx

from moeify.passes.infra.base import Fact
from moeify.passes.infra.printer import print_graph
from moeify.passes.join_routers import JoinRouters
from moeify.passes.rewrite.blocks import blocks_of
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
    stage,
    without_group_names,
)


def show_router(gm: fx.GraphModule) -> str:
    """Print what the router of the one block knows of ranks: the pass changes nothing else."""
    ((path, block),) = blocks_of(gm)
    known = {name: getattr(block.router, name) for name in ("where", "group", "tensor_group")}
    lines = [f"{path}.router.{name} = {value!r}" for name, value in known.items()]
    return without_group_names("\n".join(lines))


def test_golden(golden):
    with fake_world(4, 2):
        ctx, gm, _ = stage()
        golden(before_and_after(JoinRouters(), gm, ctx, show_router), "join_routers.txt")


def test_routers_learn_their_groups():
    with fake_world(4, 2):
        *_, block = stage(JoinRouters())
        router = block.router
        assert router.group
        assert router.tensor_group
        assert router.group != router.tensor_group
        assert router.where == "mlp"


def test_the_graph_stays_as_it_is():
    with fake_world(4, 2):
        *_, before = stage()
        *_, after = stage(JoinRouters())
        assert print_graph(before) == print_graph(after)


def test_a_second_run_changes_nothing():
    with fake_world(4, 2):
        ctx, gm, block = stage()
        assert_idempotent(JoinRouters(), gm, ctx)
        groups = block.router.group, block.router.tensor_group
        assert_untouched(JoinRouters(), gm, ctx)
        assert (block.router.group, block.router.tensor_group) == groups


def test_axes_of_one_rank_have_no_group():
    with fake_world(4, 2):
        *_, block = block_after([JoinRouters()], expert=4)
        assert block.router.group
        assert not block.router.tensor_group
        *_, block = block_after([JoinRouters()], expert=1, tensor=4)
        assert not block.router.group
        assert block.router.tensor_group


def test_without_ranks_nothing_changes():
    ctx, _, gm, block = alone_after([])
    assert_untouched(JoinRouters(), gm, ctx)
    assert not block.router.group


def test_contract():
    with fake_world(4, 2):
        ctx, *_ = stage()
        message = assert_requires(JoinRouters(), Fact.MOE_BLOCKS, dense_graph(ctx), ctx)
        assert "mlp: no node calls its block" in message
