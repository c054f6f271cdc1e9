"""What ZeRO's decision says of many models: units, their order, and what is gathered ahead."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import fx, nn

import moeify as mf
from moeify.errors import PassError
from moeify.passes.infra.base import Fact
from moeify.passes.infra.printer import print_graph
from moeify.passes.insert_all_to_all import InsertAllToAll
from moeify.passes.partition_zero import PartitionZero, zero_of
from moeify.passes.testing import (
    assert_idempotent,
    assert_requires,
    assert_untouched,
    before_and_after,
)
from moeify.simulate.counter import fake_world
from moeify.sites.install import skeleton
from moeify.sites.record import conversion_of
from moeify.zero import fsdp2
from moeify.zero.plan import Part, Unit, ZeroPlan
from tests.passes.parallel_block import alone_after, dense_graph, stage
from tests.zoo_models import ZOO

SLICED = {"expert": 2, "tensor": 2, "experts_in_tp": "slice"}


def decided(
    model: nn.Module,
    *,
    inputs: Any = None,
    layers: list[dict[str, Any]] | None = None,
    zero: dict[str, Any] | None = None,
    **parallel: Any,
) -> ZeroPlan:
    """Convert a skeleton for eight ranks; return the decision, which every parameter is in."""
    plan = {
        "layers": layers or [{"select": "all", "experts": 4}],
        "parallel": parallel,
        "zero": zero or {},
    }
    made = mf.moeify(skeleton(model), plan, example_inputs=inputs, verify=False)
    zero_plan = conversion_of(made).parallel.zero
    if zero_plan.stage == 0:
        fsdp2.check(made, zero_plan)
    assert_units(zero_plan)
    return zero_plan


def assert_units(zero: ZeroPlan) -> None:
    """What holds for each decision."""
    names = [part.name for unit in zero.units for part in unit.parts]
    assert len(names) == len(set(names))
    units = {unit.name: unit for unit in zero.units}
    assert len(units) == len(zero.units)
    spans = list(dict.fromkeys(["", *(unit.around for unit in zero.units)]))
    for unit in zero.units:
        assert unit.parts
        assert len({(part.kind, part.over, part.ranks) for part in unit.parts}) == 1
        assert unit.kind == ("expert" if unit.name.endswith(".experts") else "dense")
        assert unit.name == unit.around or unit.name.startswith(f"{unit.around}.")
        ahead = [spans.index(units[name].around) for name in unit.after]
        behind = [spans.index(units[name].around) for name in unit.before]
        here = spans.index(unit.around)
        assert all(place > here for place in ahead)
        assert all(0 < place < (here or len(spans)) for place in behind)
        for part in unit.parts:
            whole = part.dim is None or part.shape[part.dim] % part.ranks == 0
            assert whole or part.dim == 0


def zoo(name: str, **options: Any) -> ZeroPlan:
    case = ZOO[name]
    return decided(case.build(), inputs=case.inputs and case.inputs(), **options)


def found(zero: ZeroPlan, name: str) -> Unit:
    return next(unit for unit in zero.units if unit.name == name)


GOLDEN = {
    "gpt2": SLICED,
    "t5": {"expert": 4},
    "llama": {"expert": 2, "tensor": 2},
    "albert": {"expert": 2},
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name, golden):
    """Units, parts and prefetching; slices leave fewer dimensions to cut."""
    with fake_world(8, 4):
        zero = zoo(name, zero={"prefetch": 1}, **GOLDEN[name]).at(3)
    golden(show(zero), f"partition_zero_{name}.txt")


def show(zero: ZeroPlan) -> str:
    """Print a decision whole."""
    text = "\n".join(zero.lines()) + "\n"
    for unit in zero.units:
        text += f"\n{unit.name or 'the model'} around {unit.around or 'the model'}\n"
        text += f"  before: {', '.join(unit.before) or 'nothing'}\n"
        for part in unit.parts:
            text += f"  {part.name.removeprefix(f'{unit.name}.')} {list(part.shape)}"
            text += f" {part.over} {part.ranks} dim {part.dim}\n"
    return text


def show_decision(gm: fx.GraphModule) -> str:
    zero = zero_of(gm)
    return "nothing is decided\n" if zero is None else show(zero)


def test_golden_before_and_after(golden):
    with fake_world(4, 2):
        ctx, gm, _ = stage(InsertAllToAll(), zero={"stage": 3})
        nodes = print_graph(gm)
        text = before_and_after(PartitionZero(), gm, ctx, show_decision)
        assert print_graph(gm) == nodes
    golden(text, "partition_zero.txt")


LAYER0 = ("transformer.h.0", "transformer.h.0.mlp.experts")
LAYER1 = ("transformer.h.1", "transformer.h.1.mlp.experts")


@pytest.mark.parametrize(
    ("prefetch", "after", "before"),
    [
        (0, {}, {}),
        (1, {"": LAYER0, LAYER0[0]: LAYER1}, {"": LAYER1, LAYER1[0]: LAYER0}),
        (
            2,
            {"": LAYER0 + LAYER1, LAYER0[0]: LAYER1},
            {"": LAYER1 + LAYER0, LAYER1[0]: LAYER0},
        ),
    ],
)
def test_prefetching(prefetch, after, before):
    with fake_world(8, 4):
        zero = zoo("gpt2", zero={"prefetch": prefetch}, expert=2)
    assert [unit.name for unit in zero.units] == ["", *LAYER0, *LAYER1]
    assert [unit.around for unit in zero.units] == ["", *[LAYER0[0]] * 2, *[LAYER1[0]] * 2]
    assert {unit.name: unit.after for unit in zero.units if unit.after} == after
    assert {unit.name: unit.before for unit in zero.units if unit.before} == before


MORE = ("qwen3", "phi3", "opt", "gptj", "swin", "wav2vec2", "bart", "clip", "nn.TransformerEncoder")


@pytest.mark.parametrize("name", MORE)
@pytest.mark.thin(2)
def test_every_parameter_of_the_zoo(name):
    with fake_world(8, 4):
        zoo(name, expert=2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Three layers, of which some share parameters with others or with the model itself."""

    def __init__(self, tie: tuple[int, int] | None = None, read: int | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.read = read
        if tie is not None:
            first, second = (self.layers[i] for i in tie)
            second.norm.weight = first.norm.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x if self.read is None else x * self.layers[self.read].norm.bias


def names(zero: ZeroPlan) -> list[str]:
    return [unit.name for unit in zero.units]


def test_tied_layers_are_merged():
    with fake_world(8, 4):
        zero = decided(Stack(tie=(0, 2)), inputs=torch.ones(4, 8), expert=2)
    experts = [f"layers.{i}.mlp.experts" for i in range(3)]
    assert names(zero) == ["", experts[0], "layers.1", experts[1], experts[2]]
    assert [unit.around for unit in zero.units] == ["", experts[0], *["layers.1"] * 2, experts[2]]
    tied = "layers.0.norm.weight"
    assert zero.merged[0][0] == "layers.0"
    assert zero.merged[1][0] == "layers.2"
    assert all(tied in reason for _, reason in zero.merged)
    assert [part.name for part in found(zero, "").parts if "norm" in part.name] == [
        *(tied, "layers.0.norm.bias", "layers.2.norm.bias"),
    ]
    assert f"layers.0: not a unit of its own: {zero.merged[0][1]}" in list(zero.lines())


def test_a_parameter_of_three_names():
    """Two within a layer and one in another: neither layer is a unit."""
    model = Stack(tie=(0, 1))
    model.layers[0].second = model.layers[0].norm  # type: ignore[assignment]
    with fake_world(8, 4):
        zero = decided(model, inputs=torch.ones(4, 8), expert=2)
    assert [path for path, _ in zero.merged] == ["layers.0", "layers.1"]


def test_what_only_a_name_ties():
    """A layer that holds a parameter of another one, and never reads it."""
    model = Stack()
    weight = model.layers[0].norm.weight
    for place, name in ((0, "again"), (2, "kept")):
        model.layers[place].register_parameter(name, weight)
    with fake_world(8, 4):
        zero = decided(model, inputs=torch.ones(4, 8), expert=2)
    assert [path for path, _ in zero.merged] == ["layers.0", "layers.2"]


def test_parameters_that_are_read_outside_are_merged():
    with fake_world(8, 4):
        zero = decided(Stack(read=1), inputs=torch.ones(4, 8), expert=2)
    assert zero.merged == (("layers.1", "layers.1.norm.bias is read outside of it"),)
    assert "layers.1" not in names(zero)
    assert {part.name for part in found(zero, "").parts} >= {"layers.1.norm.bias"}


def test_a_sequential_model():
    """Its items are the units; a frozen one stays in, and does not train."""
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    model = nn.Sequential(OrderedDict(first=nn.Linear(8, 8), mlp=mlp, last=nn.Linear(8, 6)))
    model.first.requires_grad_(False)
    with fake_world(8, 4):
        zero = decided(model, inputs=torch.ones(4, 8), expert=4, experts_in_tp="replicate")
    assert names(zero) == ["first", "mlp", "mlp.experts", "last"]
    first, last = zero.parts["first.weight"], zero.parts["last.bias"]
    assert (first.trains, last.trains) == (False, True)
    assert (last.shape, last.dim, last.ranks, last.cut()) == ((6,), 0, 8, 1)
    assert zero.parts["mlp.router.weight"].kind == "dense"
    up = zero.parts["mlp.experts.up_proj"]
    assert (up.kind, up.over, up.ranks, up.shape, up.dim) == ("expert", "edp", 2, (1, 16, 8), 1)


def test_experts_that_every_rank_repeats():
    with fake_world(8, 4):
        zero = decided(Stack(), inputs=torch.ones(4, 8))
    experts = found(zero, "layers.0.mlp.experts")
    assert {(part.kind, part.over, part.ranks) for part in experts.parts} == {("expert", "dp", 8)}


def test_residual_branches_are_dense():
    residual = [{"select": "all", "experts": 4, "residual": "coefficient"}]
    with fake_world(8, 4):
        zero = decided(Stack(), inputs=torch.ones(4, 8), layers=residual, **SLICED)
    kinds = {part.name: part.kind for unit in zero.units for part in unit.parts}
    inside = {name: kind for name, kind in kinds.items() if name.startswith("layers.0.mlp.")}
    assert {name for name, kind in inside.items() if kind == "expert"} == {
        name for name in inside if ".experts." in name
    }
    assert sum(kind == "dense" for kind in inside.values()) > 1


def test_stages_are_logged_and_carried_out(caplog):
    with fake_world(8, 4), caplog.at_level("INFO", "moeify"):
        zero = decided(Stack(), inputs=torch.ones(4, 8), zero={"stage": 3}, expert=2)
    assert zero.stage == 3
    for line in zero.lines():
        assert line in caplog.messages


def test_a_second_run_decides_the_same():
    with fake_world(4, 2):
        ctx, gm, _ = stage(InsertAllToAll())
        assert_idempotent(PartitionZero(), gm, ctx)
        first, before = zero_of(gm), print_graph(gm)
        assert first is not None
        assert_untouched(PartitionZero(), gm, ctx)
        assert zero_of(gm) is first
        assert print_graph(gm) == before


def test_without_ranks_nothing_is_decided():
    ctx, _, gm, _ = alone_after([])
    assert_untouched(PartitionZero(), gm, ctx)
    assert zero_of(gm) is None


def test_contract():
    with fake_world(4, 2):
        ctx, gm, block = stage()
        message = assert_requires(PartitionZero(), Fact.MOE_BLOCKS, dense_graph(ctx), ctx)
        assert "mlp: no node calls its block" in message
        block.experts.up_proj = nn.Parameter(torch.ones(8, 16, 8))
        message = assert_requires(PartitionZero(), Fact.SHARDED, gm, ctx)
        assert "mlp: experts.up_proj is whole on each of 2 ranks" in message


def test_a_decision_about_another_model():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    names = {"0.weight": (4, 4), "0.bias": (4,), "1.weight": (4, 4)}

    def check(**shapes: tuple[int, ...]) -> None:
        parts = [Part(n, "dense", "dp", 2, 0, s, 4) for n, s in {**names, **shapes}.items() if s]
        fsdp2.check(model, ZeroPlan(3, (Unit("", "dense", tuple(parts)),)))

    check()
    with pytest.raises(PassError, match=r"1\.weight is in no unit"):
        check(**{"1.weight": ()})
    with pytest.raises(PassError, match="other is not in the converted model"):
        check(other=(4,))
    with pytest.raises(PassError, match=r"0\.bias has shape \(4,\) here, not \(2,\)"):
        check(**{"0.bias": (2,)})
    model[1].weight = model[0].weight  # tied: one of the names is enough
    check(**{"1.weight": ()})
