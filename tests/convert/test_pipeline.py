"""The order of the passes, and where those of the user go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import fx, nn

import moeify as mf
from moeify.convert import pipeline
from moeify.convert.pipeline import PIPELINE, PassInputs, passes_for
from moeify.distributed.layout import Layout
from moeify.distributed.mesh import World
from moeify.errors import PassOrderError
from moeify.passes.infra.base import Fact, Pass, PassResult, PlanContext
from moeify.passes.infra.order import order_passes
from moeify.passes.rewrite.facts import CHECKS
from moeify.plan.plan import Plan
from moeify.simulate.counter import fake_world
from moeify.sites.discovery import discover

ONE = ["find-mlps", "replace-mlps", "lower-kernels"]
ALL = [
    "find-mlps",
    "slice-dense",
    "replace-mlps",
    "shard-experts",
    "insert-all-to-all",
    "coordinate-all-to-all",
    "slice-experts",
    "overlap-chunks",
    "hierarchical-all-to-all",
    "join-routers",
    "partition-zero",
    "lower-kernels",
    "gather-partitions",
]


@dataclass(frozen=True)
class Yours:
    """A pass of the user's that does nothing."""

    name: str = "yours"
    requires: frozenset[str] = frozenset()
    provides: frozenset[str] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        return PassResult(gm, False)


def inputs(world: World | None = None, *user_passes: Pass) -> PassInputs:
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Tanh())
    return PassInputs(discover(model, torch.ones(6, 8)), world, user_passes=user_passes)


def in_world(*user_passes: Pass, **parallel: Any) -> list[Pass]:
    with fake_world(4, 2):
        plan = Plan.of({"layers": [{"select": "all", "experts": 4}], "parallel": parallel})
        return passes_for(inputs(World.create(Layout.of(plan.parallel, 4)), *user_passes))


def names(passes: list[Pass]) -> list[str]:
    return [p.name for p in passes]


def test_the_order_is_the_one_that_is_listed():
    assert names(in_world(tensor=2, expert=2)) == ALL
    assert names(in_world(expert=2)) == [name for name in ALL if name != "slice-dense"]
    assert names(passes_for(inputs())) == ONE
    assert len(PIPELINE) == len(ALL) + 1  # the place of the user's


def test_facts_alone_give_the_same_order():
    passes = in_world(tensor=2, expert=2)
    assert names(order_passes(passes, frozenset(CHECKS))) == ALL


def test_facts_are_checked_provided_and_required():
    passes = in_world(tensor=2, expert=2)
    provided = {fact for p in passes for fact in p.provides}
    required = {fact for p in passes for fact in p.requires}
    assert set(CHECKS) == set(Fact)
    assert set(Fact) - provided == {Fact.CAPTURED, Fact.RESOLVED}
    assert set(Fact) - required == {Fact.LOWERED}  # for passes of the user's


@pytest.mark.parametrize(
    ("requires", "provides", "after"),
    [
        ([], [], "partition-zero"),
        ([Fact.MOE_BLOCKS], ["mine"], "partition-zero"),
        ([Fact.LOWERED], [], "lower-kernels"),
        ([Fact.MOE_BLOCKS], [Fact.SHARDED], "shard-experts"),
        ([Fact.DISPATCHED], [Fact.COORDINATED], "slice-experts"),
    ],
)
def test_where_a_pass_of_the_user_goes(requires, provides, after):
    yours = Yours(requires=frozenset(requires), provides=frozenset(provides))
    order = names(in_world(yours, expert=2, tensor=2))
    assert order[order.index("yours") - 1] == after
    assert [name for name in order if name != "yours"] == ALL


def test_passes_of_the_user_among_each_other():
    lower = Yours("lower", frozenset({"squares"}), frozenset({Fact.SHARDED}))
    find = Yours("find", frozenset({Fact.MOE_BLOCKS}), frozenset({"squares"}))
    order = names(in_world(lower, find, Yours("other"), expert=2, tensor=2))
    assert order[3:7] == ["shard-experts", "find", "lower", "insert-all-to-all"]
    assert order[-3:] == ["other", "lower-kernels", "gather-partitions"]


def test_a_pass_of_the_user_that_fits_nowhere():
    yours = Yours("yours", frozenset({Fact.LOWERED}), frozenset({Fact.SHARDED}))
    message = r"cycle: .*insert-all-to-all comes after yours because it requires 'sharded'"
    with pytest.raises(PassOrderError, match=message):
        in_world(yours, expert=2)
    with pytest.raises(PassOrderError, match="yours requires 'nothing', which no other pass"):
        in_world(Yours("yours", frozenset({"nothing"})), expert=2)
    with pytest.raises(PassOrderError, match="two passes are named 'lower-kernels'"):
        in_world(Yours("lower-kernels"), expert=2)


def test_a_wrong_listing_is_refused(monkeypatch):
    """Rows must be shared out over tensor ranks before they are cut in pieces."""
    rows = list(PIPELINE)
    rows[5], rows[7] = rows[7], rows[5]
    monkeypatch.setattr(pipeline, "PIPELINE", rows)
    message = "overlap-chunks comes after coordinate-all-to-all because it requires 'coordinated'"
    with pytest.raises(PassOrderError, match=message):
        in_world(expert=2, tensor=2)


def test_a_disabled_pass_that_others_need(monkeypatch):
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), nn.Tanh())
    monkeypatch.setenv("MOEIFY_DISABLE", "find-mlps")
    message = (
        "replace-mlps requires 'mlp-sites', which does not hold: 0: no nodes are marked as its "
        "projections; find-mlps provides it, and is disabled: disable replace-mlps, too"
    )
    with pytest.raises(PassOrderError, match=message):
        mf.moeify(
            model,
            {"layers": [{"select": "all", "experts": 4}]},
            example_inputs=torch.ones(6, 8),
        )
    assert type(model[0]) is nn.Sequential


def test_passes_are_made_from_their_inputs():
    made = inputs()
    (find, _, lower) = passes_for(replace(made, user_passes=()))
    assert find.regions == made.discovery.regions
    assert lower.kernel == "auto"
