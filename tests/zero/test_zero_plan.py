"""The arithmetic of ZeRO: pieces, bytes by stage, traffic; and plans that cannot be carried out."""

from __future__ import annotations

from dataclasses import astuple, replace
from math import prod
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeify.errors import PlanError
from moeify.plan.plan import Plan
from moeify.plan.specs import ZeroSpec
from moeify.plan.zero_checks import check_process
from moeify.zero.plan import Part, Unit, ZeroPlan

NONE = {"gather": 0, "reduce_scatter": 0, "all_reduce": 0}


def part(name: str, shape: tuple[int, ...], ranks: int, dim: int | None, **more: Any) -> Part:
    kind, over = ("expert", "edp") if "experts" in name else ("dense", "dp")
    made: dict[str, Any] = {"kind": kind, "over": over, "itemsize": 4} | more
    return Part(name, ranks=ranks, dim=dim, shape=shape, **made)


def small(**changes: Any) -> ZeroPlan:
    """Two layers over four ranks and their experts over two; some cut unevenly, one whole."""
    after = ("l.0", "l.0.experts"), ("l.1", "l.1.experts")
    layers = []
    for i in range(2):
        dense = part(f"l.{i}.weight", (8, 8), 4, 0), part(f"l.{i}.bias", (6,), 4, 0)
        experts = part(f"l.{i}.experts.up", (2, 6, 8), 2, 1)
        layers += [
            Unit(f"l.{i}", "dense", dense, f"l.{i}", after[1] if i == 0 else ()),
            Unit(f"l.{i}.experts", "expert", (experts,), f"l.{i}"),
        ]
    root = part("embed", (10, 8), 4, 1), part("frozen", (4,), 4, 0, trains=False)
    root = (*root, part("scale", (), 4, None))
    made: dict[str, Any] = {"stage": 0, "units": (Unit("", "dense", root, "", after[0]), *layers)}
    return ZeroPlan(**made | changes)


def memory(zero: ZeroPlan, kind: str = "dense", **options: Any) -> tuple[int, ...]:
    return astuple(zero.memory(**options)[kind])  # type: ignore[index]


@given(
    shape=st.lists(st.integers(0, 13), min_size=1, max_size=4),
    ranks=st.integers(1, 9),
    data=st.data(),
)
def test_pieces_are_those_of_chunk(shape, ranks, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    cut = part("p", tuple(shape), ranks, dim)
    whole = torch.empty(shape, device="meta")
    chunks = [piece.numel() for piece in whole.chunk(ranks, dim)]
    chunks = (chunks + [0] * ranks)[:ranks]
    sizes = [cut.cut(rank) for rank in range(ranks)]
    assert sizes == chunks
    assert sum(sizes) == cut.numel == prod(shape)
    assert cut.cut() == max(sizes)
    assert cut.numel <= cut.padded == ranks * max(sizes)
    kept = replace(cut, dim=None)
    assert {kept.cut(rank) for rank in range(ranks)} == {kept.padded} == {kept.numel}


# Elements by hand. Dense: embed 80, frozen 4, scale 1, per layer 64 + 6; a rank's largest piece is
# 20, 1, 1, 16 + 2 (of 6 in 4). Experts: 96 per layer, 48 a piece.
WHOLE, TRAINED = 80 + 4 + 1 + 2 * 70, 80 + 1 + 2 * 70
PIECES, TRAINED_PIECES = 20 + 1 + 1 + 2 * 18, 20 + 1 + 2 * 18
TRAVEL = 80 + 4 + 1 + 2 * (64 + 8)
WINDOW = 80 + 4 + 1 + 2 * (64 + 8)  # the model's own, one layer and the next
E, HALF = 2 * 96, 2 * 48


def test_memory_by_stage():
    dense = {
        0: (4 * WHOLE, 4 * TRAINED, 8 * TRAINED, 0),
        1: (4 * WHOLE, 4 * TRAINED, 8 * TRAINED_PIECES, 0),
        2: (4 * PIECES, 4 * TRAINED_PIECES, 8 * TRAINED_PIECES, 4 * TRAVEL),
        3: (4 * PIECES, 4 * TRAINED_PIECES, 8 * TRAINED_PIECES, 4 * WINDOW),
    }
    experts = {
        0: (4 * E, 4 * E, 8 * E, 0),
        1: (4 * E, 4 * E, 8 * HALF, 0),
        2: (4 * HALF, 4 * HALF, 8 * HALF, 4 * E),
        3: (4 * HALF, 4 * HALF, 8 * HALF, 4 * E),
    }
    for stage in range(4):
        zero = small().at(stage)
        assert memory(zero) == dense[stage]
        assert memory(zero, "expert") == experts[stage]
        assert zero.memory()["dense"].total == sum(dense[stage])


def test_memory_of_other_ranks_and_optimizers():
    zero = small(stage=3)
    assert memory(zero, states=0)[2] == 0
    assert memory(zero, states=1)[2] == 4 * TRAINED_PIECES
    last = 20 + 1 + 1 + 2 * 16  # nothing is left of the six for the last rank
    assert memory(zero, rank=3)[0] == 4 * last


@pytest.mark.parametrize("prefetch", [0, 1])
def test_memory_gathered_at_once(prefetch):
    """Stage 3: the model's own, the layer that runs, and those that are gathered ahead."""
    units = small().units
    if not prefetch:
        units = tuple(replace(unit, after=()) for unit in units)
    layers = 1 + prefetch
    zero = small(stage=3, units=units)
    assert memory(zero)[3] == 4 * (85 + 72 * layers)
    assert memory(zero, "expert")[3] == 4 * 96 * layers


@pytest.mark.parametrize("stage", range(4))
def test_memory_in_another_precision(stage):
    """What is computed with takes 2 bytes; what is updated 4, with a master in float32."""
    zero = small(stage=stage, precision="bf16")
    assert zero.has_masters
    parameters, gradients, states, gathered = memory(zero)
    if stage >= 2:
        assert (parameters, gradients) == (4 * PIECES, 4 * TRAINED_PIECES)
        assert states == 8 * TRAINED_PIECES
    else:
        assert (parameters, gradients) == (2 * WHOLE, 2 * TRAINED)
        assert states == 12 * (TRAINED_PIECES if stage else TRAINED)
    assert gathered == {0: 0, 1: 0, 2: 2 * TRAVEL, 3: 2 * WINDOW}[stage]

    same = small(stage=stage, precision="bf16", master="same")
    assert not same.has_masters
    parameters, gradients, states, _ = memory(same)
    pieces = stage >= 2
    assert parameters == 2 * (PIECES if pieces else WHOLE)
    assert gradients == 2 * (TRAINED_PIECES if pieces else TRAINED)
    assert states == 4 * (TRAINED_PIECES if stage else TRAINED)


def test_memory_offloaded():
    """Whole parameters need a copy elsewhere; on the CPU there is nothing to copy."""
    for stage, held in ((0, TRAINED), (1, TRAINED_PIECES)):
        away = small(stage=stage, offload="optimizer")
        assert memory(away)[2] == 12 * held
        assert memory(replace(away, device="cpu"))[2] == 8 * held
        assert memory(replace(away, precision="fp16", device="cpu"))[2] == 12 * held
    assert memory(small(stage=3, offload="all"))[2] == 8 * TRAINED_PIECES


def test_traffic():
    assert small().traffic() == {
        "dense": NONE | {"all_reduce": 4 * TRAINED},
        "expert": NONE | {"all_reduce": 4 * E},
    }
    cut = 80 + 2 * (64 + 8)  # of what trains
    assert small(stage=1).traffic()["dense"] == {
        "gather": 4 * cut,
        "reduce_scatter": 0,
        "all_reduce": 4 * TRAINED,
    }
    rest = {"reduce_scatter": 4 * cut, "all_reduce": 4}
    assert small(stage=2).traffic()["dense"] == {"gather": 4 * (cut + 4), **rest}
    again = 2 * 72
    assert small(stage=3).traffic()["dense"] == {"gather": 4 * (cut + 4 + again), **rest}
    assert small(stage=3, engine="graph").traffic()["dense"] == {"gather": 8 * (cut + 4), **rest}
    assert small(stage=3).traffic()["expert"] == NONE | {"gather": 8 * E, "reduce_scatter": 4 * E}


def test_traffic_in_another_precision():
    wide = small(stage=3, precision="bf16").traffic()["expert"]
    assert wide == NONE | {"gather": 4 * E, "reduce_scatter": 4 * E}
    same = small(stage=3, precision="bf16", reduce="same").traffic()["expert"]
    assert same == NONE | {"gather": 4 * E, "reduce_scatter": 2 * E}
    assert small(precision="bf16").traffic()["expert"] == NONE | {"all_reduce": 2 * E}


def test_one_rank_sends_nothing():
    alone = part("l.experts.up", (2, 6, 8), 1, None)
    for stage in range(4):
        zero = ZeroPlan(stage, (Unit("l.experts", "expert", (alone,), "l"),))
        assert zero.traffic() == {"dense": NONE, "expert": NONE}
        assert memory(zero, "expert")[0] == 4 * 96


def test_what_has_no_free_dimension():
    """FSDP2 cuts this rank's share along dimension 0; gathers in the graph leave it whole."""
    bias = part("l.experts.bias", (2, 24), 2, None)
    fsdp2 = ZeroPlan(3, (Unit("l.experts", "expert", (bias,), "l"),))
    assert memory(fsdp2, "expert") == (4 * 24, 4 * 24, 8 * 24, 4 * 48)
    assert fsdp2.traffic()["expert"] == NONE | {"gather": 8 * 48, "reduce_scatter": 4 * 48}
    graph = replace(fsdp2, engine="graph")
    assert memory(graph, "expert") == (4 * 48, 4 * 48, 8 * 48, 4 * 48)
    assert graph.traffic()["expert"] == NONE | {"all_reduce": 4 * 48}
    assert memory(fsdp2.at(1), "expert") == (4 * 48, 4 * 48, 8 * 48, 0)


def test_another_zero_on_the_same_units():
    spec = ZeroSpec(stage=2, engine="graph", precision="fp16", master="same", reduce="same")
    zero = small().under(spec)
    assert zero.units == small().units
    assert (zero.stage, zero.engine, zero.precision) == (2, "graph", "fp16")
    assert (zero.master, zero.reduce, zero.offload) == ("same", "same", "none")


def test_lines():
    zero = small(stage=3, merged=(("l.2", "l.2.w is tied to embed"),))
    assert list(zero.lines()) == [
        "ZeRO stage 3 (fsdp2), offload none",
        "the model: 85 dense over dp of 4, then l.0, l.0.experts",
        "l.0: 70 dense over dp of 4, then l.1, l.1.experts",
        "l.0.experts: 96 expert over edp of 2",
        "l.1: 70 dense over dp of 4",
        "l.1.experts: 96 expert over edp of 2",
        "l.2: not a unit of its own: l.2.w is tied to embed",
    ]


HEAD = "version: 1\nlayers:\n- select: all\n  experts: 4\n"

WRONG = {
    "engine": ("zero:\n  stage: 1\n  engine: graph\n", "zero.engine", 7, "use stage 2 or 3"),
    "offload by the graph": (
        "zero:\n  stage: 3\n  engine: graph\n  offload: optimizer\n",
        *("zero.offload", 8, "engine: fsdp2"),
    ),
    "parameters": (
        "zero:\n  stage: 2\n\n  offload: parameters\n",
        *("zero.offload", 8, "needs stage 3"),
    ),
    "all": ("zero:\n  offload: all\n  stage: 1\n", "zero.offload", 6, "use `optimizer`"),
    "gradients": (
        "parallel:\n  gradients: experts\nzero:\n  stage: 2\n",
        *("parallel.gradients", 6, "stage 2 reduces all gradients itself"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_settings_that_exclude_each_other(name, tmp_path):
    text, path, line, message = WRONG[name]
    file = tmp_path / "plan.yaml"
    file.write_text(HEAD + text)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(file)
    assert (caught.value.path, caught.value.line) == (path, line)
    assert f"plan.yaml:{line}" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path", "line"),
    [
        ("zero:\n  precision: bf16\n", "zero.precision", 6),
        ("zero:\n  stage: 1\n  precision: bf16\n  offload: optimizer\n", "zero.offload", 8),
    ],
)
def test_plans_that_need_a_process_group(text, path, line, tmp_path):
    file = tmp_path / "plan.yaml"
    file.write_text(HEAD + text)
    plan = Plan.load(file)
    check_process(plan, distributed=True)
    with pytest.raises(PlanError, match="torchrun --nproc-per-node 1") as caught:
        check_process(plan, distributed=False)
    assert (caught.value.path, caught.value.line) == (path, line)


def test_stages_alone_have_nothing_to_do(caplog):
    plan = Plan.of({"layers": [{"select": "all", "experts": 4}], "zero": {"stage": 3}})
    with caplog.at_level("INFO", "moeify"):
        check_process(plan, distributed=False)
    assert "zero.stage 3 has nothing to partition" in caplog.text
