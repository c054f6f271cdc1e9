"""Layouts: every small world, cut in every way, is a partition of its ranks."""

from __future__ import annotations

import itertools
import re

import pytest

from moeify.distributed.layout import Layout
from moeify.errors import PlanError
from moeify.plan.specs import ParallelSpec

WORLDS = range(1, 17)
MODES = ("replicate", "slice", "fold")


def spec(expert: int, tensor: int, mode: str) -> ParallelSpec:
    return ParallelSpec(expert=expert, tensor=tensor, experts_in_tp=mode)


def fits(world: int, expert: int, tensor: int, mode: str) -> bool:
    """The rule, stated apart from the code: both views tile the world."""
    if world % tensor:
        return False
    if mode == "fold":
        return world % expert == 0 and (expert == 1 or expert % tensor == 0)
    return world % (expert * tensor) == 0


CASES = list(itertools.product(WORLDS, range(1, 17), (1, 2, 3, 4, 8), MODES))
GOOD = [case for case in CASES if fits(*case)]
BAD = [case for case in CASES if not fits(*case)]


def test_sizes_that_fit_are_accepted_and_others_refused():
    for world, expert, tensor, mode in GOOD:
        layout = Layout.of(spec(expert, tensor, mode), world)
        assert (layout.world, layout.expert, layout.tensor) == (world, expert, tensor)
    for world, expert, tensor, mode in BAD:
        with pytest.raises(PlanError):
            Layout.of(spec(expert, tensor, mode), world)


def counts_for(ranks: int) -> list[int]:
    """Numbers of experts that a plan may give to so many ranks: multiples and divisors."""
    return [n for n in range(1, 2 * ranks + 1) if n % ranks == 0 or ranks % n == 0]


def test_both_views_are_partitions_of_the_world():
    for world, expert, tensor, mode in GOOD:
        layout = Layout.of(spec(expert, tensor, mode), world)
        dense = layout.dense_grid()
        assert [len(row) for row in dense] == [tensor] * layout.dp
        assert [rank for row in dense for rank in row] == list(range(world))
        for experts in counts_for(expert):
            ep, edp, etp = layout.ep(experts), layout.edp(experts), layout.etp
            assert edp * ep * etp == layout.dp * tensor == world
            assert ep == min(expert, experts)
            assert experts % ep == 0
            grid = layout.sparse_grid(experts)
            assert len(grid) == edp
            assert all(len(row) == ep and all(len(cell) == etp for cell in row) for row in grid)
            ranks = [rank for row in grid for cell in row for rank in cell]
            assert sorted(ranks) == list(range(world)), (world, expert, tensor, mode, experts)


def test_groups_hold_the_ranks_that_each_mode_promises():
    for world, expert, tensor, mode in GOOD:
        layout = Layout.of(spec(expert, tensor, mode), world)
        tensor_group = {rank: i for i, row in enumerate(layout.dense_grid()) for rank in row}
        for experts in counts_for(expert):
            grid = layout.sparse_grid(experts)
            for row in grid:
                for place in range(layout.etp):
                    group = [cell[place] for cell in row]
                    assert group == sorted(group)
                    members = [tensor_group[rank] for rank in group]
                    if mode == "fold":  # neighbours, tensor group after tensor group
                        assert group == list(range(group[0], group[0] + len(group)))
                    else:  # one rank of each tensor group, of equal place
                        assert len({rank % tensor for rank in group}) == 1
                        assert members == list(range(members[0], members[0] + len(group)))
            if mode == "slice":
                assert all(
                    len({tensor_group[rank] for rank in cell}) == 1 for r in grid for cell in r
                )


def test_a_layer_with_fewer_experts_cuts_groups_in_pieces():
    for world, expert, tensor, mode in GOOD:
        layout = Layout.of(spec(expert, tensor, mode), world)
        whole = [{r for cell in row for r in cell} for row in layout.sparse_grid(expert)]
        for experts in (n for n in range(1, expert) if expert % n == 0):
            for row in layout.sparse_grid(experts):
                piece = {r for cell in row for r in cell}
                assert sum(piece <= group for group in whole) == 1


def test_examples():
    grid = Layout(8, tensor=2, expert=2).sparse_grid(8)
    assert grid == [[[0], [2]], [[1], [3]], [[4], [6]], [[5], [7]]]
    grid = Layout(8, tensor=2, expert=2, experts_in_tp="slice").sparse_grid(8)
    assert grid == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]
    grid = Layout(8, tensor=2, expert=4, experts_in_tp="fold").sparse_grid(8)
    assert grid == [[[0], [1], [2], [3]], [[4], [5], [6], [7]]]
    assert Layout(4, expert=4).sparse_grid(2) == [[[0], [1]], [[2], [3]]]


def test_copies():
    assert Layout(8, tensor=2, expert=2).copies(coordinated=False) == 2
    assert Layout(8, tensor=2, expert=2).copies(coordinated=True) == 1
    sliced = Layout(8, tensor=2, expert=2, experts_in_tp="slice")
    assert sliced.copies(coordinated=False) == 1


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_errors_list_sizes_that_work():
    hints = {"worlds": 0, "expert may be": 0, "tensor must divide": 0, "multiple": 0, "start": 0}
    for world, expert, tensor, mode in BAD:
        with pytest.raises(PlanError) as caught:
            Layout.of(spec(expert, tensor, mode), world)
        message = caught.value.message
        assert caught.value.path == ("parallel.expert" if expert > 1 else "parallel.tensor")
        if "must be a multiple of tensor" in message:
            assert mode == "fold"
            assert expert % tensor
            hints["multiple"] += 1
            continue
        assert message.startswith(f"expert {expert} and tensor {tensor} ({mode}) do not fit")
        assert f"a world of {world}: " in message
        if world == 1:
            (processes,) = numbers(re.search(r"start (\d+) processes", message)[1])
            assert fits(processes, expert, tensor, mode)
            hints["start"] += 1
            continue
        for size in numbers(re.search(r"worlds of (.*), \.\.\. work", message)[1]):
            assert fits(size, expert, tensor, mode), message
        hints["worlds"] += 1
        if found := re.search(r"expert may be (.*)$", message):
            listed = numbers(found[1])
            assert listed == [n for n in WORLDS if fits(world, n, tensor, mode)], message
            hints["expert may be"] += 1
        else:
            listed = numbers(re.search(r"tensor must divide \d+: (.*)$", message)[1])
            assert listed == [n for n in WORLDS if world % n == 0]
            hints["tensor must divide"] += 1
    assert all(hints.values()), hints
