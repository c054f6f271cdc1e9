"""An optimizer made before a conversion says so when it steps."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from torch import nn

import moeify as mf
from tests.convert.models import ALL4, Stack


def convert(model: nn.Module) -> nn.Module:
    return mf.moeify(model, ALL4, example_inputs=torch.randn(4, 8), verify=False)


def stale(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [r.message for r in caplog.records if "make the optimizer after" in r.message]
    caplog.clear()
    return found


@pytest.fixture(autouse=True)
def _warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="moeify")


def test_one_made_before_warns_once(caplog):
    model = Stack(2)
    old = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(old, 1)
    convert(model)
    model(torch.randn(4, 8)).sum().backward()
    old.step()
    schedule.step()
    (text,) = stale(caplog)
    assert text.startswith("AdamW holds layers.0.up.weight, layers.0.up.bias, ")
    assert "and 5 more, which moeify() replaced" in text
    old.step()
    assert not stale(caplog)
    new = torch.optim.AdamW(model.parameters())
    new.step()
    assert not stale(caplog)


def test_a_group_that_is_added_later(caplog):
    model = Stack(1)
    dense = list(model.parameters())
    convert(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert not stale(caplog)
    optimizer.add_param_group({"params": dense[:1]})
    optimizer.step()
    assert "SGD holds layers.0.up.weight, which moeify()" in stale(caplog)[0]


def test_the_way_back(caplog):
    model = convert(Stack(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.step()
    assert not stale(caplog)
    mf.demoeify(model)
    optimizer.step()
    assert "make the optimizer after demoeify()" in stale(caplog)[0]


def test_what_the_residual_branch_keeps_is_not_stale(caplog):
    model = Stack(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = {"layers": [{"select": "all", "experts": 4, "residual": "coefficient"}]}
    mf.moeify(model, plan, example_inputs=torch.randn(4, 8), verify=False)
    optimizer.step()  # it lacks the experts, and trains what it holds
    assert not stale(caplog)


def test_nothing_is_kept_alive_and_a_failed_conversion_says_nothing(caplog):
    model = Stack(1)
    old = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(mf.MoeifyError):
        mf.moeify(
            model, {"layers": [{"select": "all", "experts": 0}]}, example_inputs=torch.ones(1)
        )
    old.step()
    assert not stale(caplog)
    weight = weakref.ref(model.layers[0].up.weight)
    convert(model)
    del old
    gc.collect()
    assert weight() is None


def test_a_compiled_step_runs():
    model = convert(Stack(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(4, 8)).sum().backward()
    before = model.layers[0].experts.down_proj.detach().clone()
    torch.compile(optimizer.step, backend="eager")()
    assert not torch.equal(model.layers[0].experts.down_proj, before)
