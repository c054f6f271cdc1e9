"""A rank that acts alone is told at once who is missing; one that is slow is waited for."""

from __future__ import annotations

import itertools
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import moeify as mf
from moeify.distributed import meeting
from moeify.distributed.meeting import SHORT, meet
from moeify.errors import CheckpointError, DispatchError, MoeifyError, PlanError
from moeify.sites.record import ATTRIBUTE
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import WIDTH, dense, plan


def convert(**options: Any) -> nn.Module:
    example = torch.ones(4, WIDTH)
    return mf.moeify(dense(), plan(expert=2), example_inputs=example, verify=False, **options)


def calls_of_one_rank(rank: int, root: Path) -> list[tuple[str, float]]:
    """Rank 0 makes each call alone, then both make it."""
    os.environ["MOEIFY_WAIT"] = "0.5"
    model = convert()
    calls = [
        (DispatchError, convert),
        (CheckpointError, lambda: mf.save_sharded(model, root)),
        (CheckpointError, lambda: mf.load_sharded(model, root)),
    ]
    told = []
    for kind, call in calls:
        if rank == 0:
            start = time.monotonic()
            with pytest.raises(kind) as info:
                call()
            told.append((str(info.value), time.monotonic() - start))
        dist.barrier()
        call()
    return told


def test_a_call_of_one_rank_alone(tmp_path: Path) -> None:
    told, _ = run_ranks(calls_of_one_rank, 2, tmp_path)
    whats = ("take model and plan", "save a sharded checkpoint", "load a sharded checkpoint")
    for what, (text, seconds) in zip(whats, told, strict=True):
        assert text.startswith(f"rank 0 could not {what} with the other ranks: rank 1 did not come")
        assert "MOEIFY_WAIT" in text
        assert seconds < 5.0


def different_calls(rank: int, root: Path) -> str:
    model = convert()
    with pytest.raises(CheckpointError) as info:
        mf.save_sharded(model, root) if rank == 0 else mf.load_sharded(model, root)
    assert not any(root.iterdir())
    return str(info.value)


def test_ranks_that_make_different_calls(tmp_path: Path) -> None:
    for text in run_ranks(different_calls, 2, tmp_path):
        assert "rank 0 to save a sharded checkpoint; rank 1 to load a sharded checkpoint" in text


def slow(rank: int) -> list[str]:
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("moeify").addHandler(handler)
    meeting._WARN = 0.2  # type: ignore[misc]
    time.sleep(1.0 * (rank == 2))
    meet("begin", SHORT)
    meet("go on", SHORT)
    return seen


def test_a_slow_rank_is_named_and_waited_for() -> None:
    first, second, third = run_ranks(slow, 3)
    (text,) = first + second + third
    assert "waits to begin: rank 2 did not come yet" in text


def late(rank: int) -> Any:
    """Rank 1 comes when rank 0 has given up; afterwards they meet again."""
    os.environ["MOEIFY_WAIT"] = "0.5"
    time.sleep(1.5 * rank)
    with pytest.raises(DispatchError) as info:
        meet("begin", SHORT)
    dist.barrier()
    meet("go on", SHORT)
    return str(info.value)


def test_a_rank_that_comes_too_late_is_told_as_well() -> None:
    first, second = run_ranks(late, 2)
    assert "rank 1 did not come" in first
    assert "rank 0 did not come" in second


def wrong_number(rank: int) -> None:
    os.environ["MOEIFY_WAIT"] = "soon"
    with pytest.raises(MoeifyError, match="MOEIFY_WAIT: 'soon' is not a number of seconds"):
        meet("begin", SHORT)


def test_a_wait_that_is_no_number() -> None:
    run_ranks(wrong_number, 2)


def part_of_the_world(rank: int) -> None:
    mesh = DeviceMesh("cpu", [[0], [1]], mesh_dim_names=("dp", "tp"))
    if rank == 2:
        return
    model = dense()
    with pytest.raises(PlanError, match=r"mesh: holds 2 of the 3 ranks of the world"):
        mf.moeify(model, plan(expert=2), example_inputs=torch.ones(4, WIDTH), mesh=mesh)
    assert ATTRIBUTE not in model.__dict__


def test_a_mesh_over_a_part_of_the_world() -> None:
    run_ranks(part_of_the_world, 3)


def one_rank_converts_a_checkpoint(rank: int, root: Path) -> None:
    mf.save_sharded(convert(), root / "sharded")
    if rank == 1:
        mf.to_single(root / "sharded", root / "single", model=dense())


def test_one_rank_alone_may_make_a_single_folder(tmp_path: Path) -> None:
    run_ranks(one_rank_converts_a_checkpoint, 2, tmp_path, deadline=60.0)
    model = mf.load(tmp_path / "single", model=dense())
    single = {k: v for k, v in plan().items() if k != "parallel"}
    want = mf.moeify(dense(), single, example_inputs=torch.ones(4, WIDTH))
    pairs = itertools.zip_longest(model.parameters(), want.parameters())
    assert all(torch.equal(one, other) for one, other in pairs)
