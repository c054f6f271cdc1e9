"""join-routers: the groups that routers learn, and when there are none."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moeify.errors import PassOrderError
from moeify.passes.infra.printer import print_graph
from moeify.passes.join_routers import JoinRouters
from moeify.passes.testing import run_pass
from moeify.simulate.counter import fake_world
from tests.passes.parallel_block import alone_after, assert_unchanged, block_after


def test_routers_learn_their_groups():
    with fake_world(4, 2):
        *_, block = block_after([JoinRouters()], expert=2, tensor=2)
        router = block.router
        assert router.group
        assert router.tensor_group
        assert router.group != router.tensor_group
        assert router.where == "mlp"


def test_the_graph_stays_as_it_is():
    with fake_world(4, 2):
        *_, before = block_after([], expert=2, tensor=2)
        *_, after = block_after([JoinRouters()], expert=2, tensor=2)
        assert print_graph(before) == print_graph(after)


def test_a_second_run_changes_nothing():
    with fake_world(4, 2):
        ctx, _, gm, block = block_after([JoinRouters()], expert=2, tensor=2)
        groups = block.router.group, block.router.tensor_group
        assert_unchanged(JoinRouters(), gm, ctx)
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
    ctx, _, gm, block = alone_after([JoinRouters()])
    assert not block.router.group
    assert_unchanged(JoinRouters(), gm, ctx)


def test_contract():
    with fake_world(4, 2):
        ctx, _, gm, _ = block_after([], expert=4)
        with pytest.raises(PassOrderError, match="moe-blocks"):
            run_pass(JoinRouters(), gm, replace(ctx, facts=frozenset()))
