"""The simulation of large worlds: what is counted, against numbers worked out by hand."""

from __future__ import annotations

import io
import json
import os
import sys
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint
from typer.testing import CliRunner, Result

from moeify import compat
from moeify.cli.main import app
from moeify.cli.simulate import print_simulation
from moeify.distributed.layout import Layout
from moeify.errors import MoeifyError
from moeify.simulate.counter import Call, count, fake_world
from moeify.simulate.plot import draw, exchange_once, sweep
from moeify.simulate.simulate import Collectives, Simulation, simulate, step
from moeify.simulate.zero import with_pieces
from moeify.zero.plan import Part, Unit, ZeroPlan

ops = torch.ops._c10d_functional


@pytest.fixture(autouse=True)
def no_world_is_left():
    yield
    assert not dist.is_initialized()


def world_group() -> str:
    return dist.group.WORLD.group_name


class Exchange(nn.Module):
    """Experts between two all-to-alls, as a converted block has them."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.experts = nn.Linear(8, 8, device="meta")
        self.recompute = recompute

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)

    def body(self, x: torch.Tensor) -> torch.Tensor:
        size = dist.get_world_size()
        each = [x.shape[0] // size] * size
        there = ops.wait_tensor(ops.all_to_all_single(x, each, each, world_group()))
        hidden = self.experts(there)
        return ops.wait_tensor(ops.all_to_all_single(hidden, each, each, world_group()))


class Net(nn.Module):
    """A dense layer before two blocks."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, device="meta")
        self.blocks = nn.ModuleList([Exchange(recompute) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_step_counts_forward_and_backward_by_layer():
    with fake_world(16, 4):
        calls, kept = step(Net(), torch.zeros(32, 8), ["blocks.0", "blocks.1"])
    assert [(c.layer, c.phase) for c in calls] == [
        *[("blocks.0", "forward")] * 2,
        *[("blocks.1", "forward")] * 2,
        *[("blocks.1", "backward")] * 2,
        *[("blocks.0", "backward")] * 2,
    ]
    for call in calls:
        assert (call.kind, call.ranks, call.hops) == ("all_to_all", tuple(range(16)), 15)
        assert call.payload == 32 * 8 * 4
        assert call.sent(4) == (3 * 64, 12 * 64)
    assert kept == 3 * 32 * 8 * 4  # the input of each linear layer, and no weight


def test_a_recomputed_forward_counts_in_the_backward_pass():
    with fake_world(4):
        calls, _ = step(Net(recompute=True), torch.zeros(4, 8), ["blocks.0", "blocks.1"])
    phases = [(c.layer, c.phase) for c in calls]
    for block in ("blocks.0", "blocks.1"):
        assert phases.count((block, "forward")) == 2
        assert phases.count((block, "backward")) in (3, 4)  # the last one need not run again


def test_gradient_reductions_are_a_separate_phase():
    class Reduced(nn.Linear):
        def __deepcopy__(self, memo):
            clone = Reduced(8, 8, device="meta")
            clone.weight, clone.bias = memo[id(self.weight)], memo[id(self.bias)]
            clone.weight.register_post_accumulate_grad_hook(lambda p: dist.all_reduce(p.grad))
            return clone

    with fake_world(8, 4):
        calls, _ = step(Reduced(8, 8, device="meta"), torch.zeros(2, 8))
    assert len(calls) == 1
    call = calls[0]
    assert (call.kind, call.phase, call.layer) == ("all_reduce", "gradients", "")
    assert call.hops == 14
    assert call.sent(4) == (3 * 2 * 256 // 8, 4 * 2 * 256 // 8)


def test_sharded_parameters_run_as_their_local_part():
    class Sharded(nn.Module):
        def __init__(self, mesh):
            super().__init__()
            local = torch.empty(2, 8, 8, device="meta")
            whole = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
            self.weight = nn.Parameter(whole)

        def forward(self, x):
            return x @ self.weight.to_local()

    with fake_world(4):
        mesh = DeviceMesh("cpu", torch.arange(4))
        model = Sharded(mesh)
        calls, kept = step(model, torch.zeros(2, 5, 8))
    assert model.weight.is_meta
    assert model.weight.grad is None
    assert (calls, kept) == ([], 2 * 5 * 8 * 4)


@pytest.mark.parametrize(
    ("kind", "payload", "hops", "sent"),
    [
        ("all_to_all", 64, 3, (16, 32)),
        ("all_gather", 64, 3, (64, 128)),
        ("reduce_scatter", 64, 3, (16, 32)),
        ("all_reduce", 64, 6, (32, 64)),
        ("broadcast", 64, 3, (64, 128)),
    ],
)
def test_kinds(kind, payload, hops, sent):
    def run():
        x, group = torch.empty(16, device="meta"), world_group()
        started = {
            "all_to_all": lambda: ops.all_to_all_single(x, [4] * 4, [4] * 4, group),
            "all_gather": lambda: ops.all_gather_into_tensor(x, 4, group),
            "reduce_scatter": lambda: ops.reduce_scatter_tensor(x, "sum", 4, group),
            "all_reduce": lambda: ops.all_reduce(x, "sum", group),
            "broadcast": lambda: ops.broadcast(x, 0, group),
        }[kind]()
        ops.wait_tensor(started)

    with fake_world(4):
        (call,) = count(run)
    assert (call.kind, call.payload, call.hops, call.sent(2)) == (kind, payload, hops, sent)


def test_both_kinds_of_calls_count_alike():
    def run():
        x = torch.empty(8, 2)
        dist.all_to_all_single(torch.empty(8, 2), x)
        dist.all_gather_into_tensor(torch.empty(32, 2), x)
        dist.reduce_scatter_tensor(torch.empty(2, 2), x)
        dist.all_gather([torch.empty(8, 2) for _ in range(4)], x)
        dist.all_reduce(x, async_op=True).wait()

    with fake_world(4):
        calls = count(run)
    kinds = ["all_to_all", "all_gather", "reduce_scatter", "all_gather", "all_reduce"]
    assert [c.kind for c in calls] == kinds
    assert [c.payload for c in calls] == [64] * 5
    assert [c.ranks for c in calls] == [(0, 1, 2, 3)] * 5


def test_uneven_splits_leave_out_what_stays():
    def run():
        x = torch.empty(8)
        ops.wait_tensor(ops.all_to_all_single(x, [2] * 4, [5, 1, 1, 1], world_group()))

    with fake_world(4):
        (call,) = count(run)
    assert call.sent(1) == (0, 3 * 4)


def test_a_collective_of_one_rank_sends_nothing():
    assert Call("all_to_all", (0,), 64, 0.0).sent(8) == (0, 0)


def test_hierarchical_hops_fall_and_volume_doubles():
    points = {(p.kind, p.ranks): p for p in sweep(8, sizes=(8, 16, 64, 4096), tensors=())}
    for ranks in (16, 64, 4096):
        assert points["flat", ranks].hops == ranks - 1
        two = points["hierarchical", ranks]
        assert (two.hops, two.volume) == ((8 - 1) + (ranks // 8 - 1), 2.0)
    assert ("hierarchical", 8) not in points


def test_coordinated_hops_fall_with_tensor_slicing():
    points = sweep(8, sizes=(16, 1024))
    hops = {(p.ranks, p.tensor): p.hops for p in points if p.kind == "coordinated"}
    for ranks in (16, 1024):
        for tensor in (2, 4, 8):
            assert hops[ranks, tensor] == (ranks // tensor - 1) + (tensor - 1)


def test_sweep_counts_the_given_exchange():
    asked = []

    def exchange(kind, ranks, node, tensor):
        asked.append((kind, ranks, node, tensor))
        return exchange_once("flat", ranks, node, 1)

    points = sweep(4, sizes=(8,), tensors=(2,), exchange=exchange)
    assert asked == [("flat", 8, 4, 1), ("hierarchical", 8, 4, 1), ("coordinated", 8, 4, 2)]
    assert [p.hops for p in points] == [7, 7, 7]


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "hops.svg"
    draw(sweep(4, sizes=(4, 8), tensors=(2,)), path)
    assert "all-to-all" in path.read_text() or path.stat().st_size > 1_000
    with pytest.raises(MoeifyError, match="nonsense"):
        draw(sweep(4, sizes=(4,)), tmp_path / "hops.nonsense")


def test_plot_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MoeifyError, match=r"pip install 'moeify\[plot\]'"):
        draw(sweep(4, sizes=(4,)), tmp_path / "hops.png")


def test_the_world_ends_after_an_error(monkeypatch):
    def fail():
        with fake_world(64, 8):
            assert (dist.get_world_size(), os.environ["LOCAL_WORLD_SIZE"]) == (64, "8")
            raise ZeroDivisionError

    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ZeroDivisionError):
        fail()
    assert not dist.is_initialized()
    assert os.environ["LOCAL_WORLD_SIZE"] == "3"


def test_a_running_process_group_is_left_alone():
    dist.init_process_group("fake", store=compat.fake_store(), rank=0, world_size=2)
    try:
        with (
            pytest.raises(MoeifyError, match="a process group of 2 ranks is running"),
            fake_world(8),
        ):
            pass
        assert dist.get_world_size() == 2
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The config of a small GPT-2."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=4,
        n_embd=32,
        n_head=4,
        vocab_size=99,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
        architectures=["GPT2LMHeadModel"],
    )
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    config.save_pretrained(folder)
    return folder


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="moeify")


def test_cli_json(folder):
    result = call("simulate", folder, "--plan", "mixtral", "--world", 16, "--json")
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert set(data) == {
        *("model", "class", "world", "node", "layout", "inputs", "even_load", "collectives"),
        *("parameters", "parameter_bytes", "activation_bytes", "imbalance", "totals"),
        *("zero", "memory"),
    }
    assert (data["model"], data["class"]) == (str(folder), "GPT2LMHeadModel")
    assert (data["world"], data["node"]) == (16, 8)
    assert data["layout"]["dp"] == 16
    assert data["inputs"]["input_ids"] == [1, 32]
    assert data["even_load"] is True
    experts = 4 * 8 * (2 * 32 * 128 + 128 + 32)
    assert data["parameters"]["expert"] == experts
    assert data["parameter_bytes"]["expert"] == 4 * experts
    assert data["activation_bytes"] > 0
    for layer in data["imbalance"]:
        assert 1 <= layer["ranks"] <= layer["experts"] <= 4
    for row in data["collectives"]:
        assert set(row) == {
            *("layer", "phase", "kind", "ranks", "nodes", "count", "hops", "payload_bytes"),
            *("node_bytes", "network_bytes"),
        }
    assert set(data["totals"]) == {
        *("count", "hops", "payload_bytes", "node_bytes", "network_bytes"),
    }


def test_cli_spreads_experts_over_ranks(folder, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "version: 1\n"
        "layers: [{select: all, experts: 8, top_k: 2}]\n"
        "router: {capacity_factor: null}\n"
        "parallel: {expert: 2, all_to_all: flat}\n"
    )
    arguments = ["--plan", plan, "--world", 32, "--expert", 8, "--batch", 2, "--json"]
    result = call("simulate", folder, *arguments)
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    assert data["parameters"]["expert"] == 4 * (2 * 32 * 128 + 128 + 32)
    rows = 2 * 32 * 2 * 32 * 4  # tokens, top-k, width, bytes: there and back
    blocks = {f"transformer.h.{i}.mlp" for i in range(4)}
    for phase in ("forward", "backward"):
        found = [
            row
            for row in data["collectives"]
            if (row["kind"], row["phase"]) == ("all_to_all", phase)
        ]
        assert {row["layer"] for row in found} == blocks
        for row in found:
            assert (row["ranks"], row["nodes"], row["network_bytes"]) == (8, 1, 0)
            assert row["hops"] == row["count"] * 7
            assert 2 * rows <= row["payload_bytes"] < 2.1 * rows
    reduced = [row for row in data["collectives"] if row["phase"] == "gradients"]
    assert {(row["kind"], row["ranks"]) for row in reduced} == {
        ("all_reduce", 32),
        ("all_reduce", 4),
    }


def test_cli_table(folder):
    arguments = ["--world", 8, "--batch", 2, "--length", 16, "--set", "capacity_factor=1.25"]
    result = call("simulate", folder, "--plan", "moe", *arguments)
    assert result.exit_code == 0, result.stderr
    for text in (
        "on 8 ranks, 8 per node",
        "input_ids [2, 16]",
        "parameters on a rank",
        "imbalance",
    ):
        assert text in result.stdout
    assert "an even load is assumed" not in result.stdout


def test_cli_plot(folder, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    few = partial(sweep, sizes=(8, 16), tensors=(2,))
    monkeypatch.setattr("moeify.cli.simulate.sweep", few)
    arguments = ["--plan", "mixtral", "--world", 8, "--plot", tmp_path / "hops.png", "--json"]
    result = call("simulate", folder, *arguments)
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "hops.png").stat().st_size > 10_000
    hops = json.loads(result.stdout)["hops"]
    assert {"kind", "ranks", "node", "tensor", "hops", "volume"} == set(hops[0])


def test_cli_world_that_does_not_fit(folder):
    result = call("simulate", folder, "--plan", "mixtral", "--world", 6, "--expert", 4)
    assert result.exit_code == 1
    assert "expert" in result.stderr


def test_inputs_without_tokens_have_no_length():
    class Picture(nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.main_input_name = type("C", (), {"image_size": 9})(), "pixel_values"
            self.up, self.down = nn.Linear(9, 32), nn.Linear(32, 9)

        def forward(self, pixel_values):
            return pixel_values + self.down(self.up(pixel_values).relu())

    with pytest.raises(MoeifyError, match="pixel_values have no tokens"):
        simulate(Picture(), "mixtral", world=4, node=4, length=64)
    found = simulate(Picture(), "mixtral", world=4, node=4, batch=5)
    assert next(iter(found.inputs.values()))[0] == 5


# ZeRO.

DENSE = 2 * 2 * 32 + (32 * 96 + 96) + (32 * 32 + 32) + 4 * 32
"""Elements of a layer by hand: two norms, attention, the router of 4 experts."""
EXPERT = 2 * 32 * 128 + 128 + 32
ROOT = 99 * 32 + 32 * 32 + 2 * 32
LAYERS = ("transformer.h.0", "transformer.h.1")


@cache
def zeroed(parallel: int = 2, **zero: Any) -> Simulation:
    """Simulate two layers of GPT-2 on 8 ranks of two nodes."""
    import transformers

    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=4, vocab_size=99, n_positions=32, bos_token_id=1
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    plan = {
        "layers": [{"select": "all", "experts": 4}],
        "parallel": {"all_to_all": "flat", "expert": parallel},
        "zero": zero,
    }
    return simulate(model, plan, world=8, node=4, length=8)


def rows(found: Simulation, *kinds: str) -> list[Collectives]:
    return [row for row in found.collectives if row.kind in kinds]


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gathers_and_scatters_units(stage):
    """Dense units over 8 ranks, experts over the 4 that repeat them; no gradient is reduced."""
    simulation = zeroed(stage=stage)
    found = rows(simulation, "all_gather", "reduce_scatter")
    want = {("", 8, 4 * ROOT)}
    want |= {(layer, 8, 4 * DENSE) for layer in LAYERS}
    want |= {(f"{layer}.mlp.experts", 4, 4 * 2 * EXPERT) for layer in LAYERS}
    phases = ("forward", "backward") if stage == 3 else ("forward",)
    for phase in phases:
        gathers = {
            (row.layer, row.ranks, row.ranks * row.payload_bytes)
            for row in found
            if (row.kind, row.phase) == ("all_gather", phase)
        }
        assert gathers == (want if phase == "forward" else want - {("", 8, 4 * ROOT)})
    assert {row.phase for row in found if row.kind == "all_gather"} == set(phases)
    scattered = [row for row in found if row.kind == "reduce_scatter"]
    assert {(row.layer, row.ranks, row.payload_bytes) for row in scattered} == want
    assert {row.phase for row in scattered} == {"gradients"}
    assert not [row for row in rows(simulation, "all_reduce") if row.phase == "gradients"]
    assert simulation.zero == {"stage": stage, "engine": "fsdp2"}
    for row in found:  # (n - 1) / n of the whole; ranks 0, 2, 4, 6 are on both nodes, too
        size = row.payload_bytes * (row.ranks if row.kind == "all_gather" else 1)
        each = (row.node_bytes + row.network_bytes) / (row.ranks - 1)
        assert each == pytest.approx(size / row.ranks, abs=1)
        assert row.nodes == 2


def test_zero_alone_in_a_group_sends_nothing():
    found = rows(zeroed(8, stage=3), "all_gather", "reduce_scatter")
    assert {row.layer for row in found} >= {"", *LAYERS}  # 4 experts over 4 ranks, twice
    assert {row.ranks for row in found if row.layer.endswith("experts")} == {2}
    alone = Part("l.experts.up", "expert", "edp", 1, None, (4, 8), 4)
    zero = ZeroPlan(3, (Unit("l.experts", "expert", (alone,), "l"),))
    for stage in range(4):
        assert with_pieces([], zero.at(stage), Layout(4, expert=4), {"l.experts": 4}) == []


def test_zero_publishes_what_the_optimizer_has_updated():
    base, found = zeroed(stage=0), zeroed(stage=1)
    assert not rows(base, "all_gather")
    assert rows(base, "all_reduce") == rows(found, "all_reduce")
    sent = {(row.phase, row.ranks): row.payload_bytes for row in rows(found, "all_gather")}
    assert sent == {
        ("optimizer", 8): 4 * (ROOT + 2 * DENSE) // 8,
        ("optimizer", 4): 4 * 2 * 2 * EXPERT // 4,
    }


def test_zero_publishes_in_buckets():
    parts = [Part(f"p{i}", "dense", "dp", 4, 0, (1 << 20,), 4) for i in range(10)]
    zero = ZeroPlan(1, (Unit("", "dense", tuple(parts)),))
    sent = [call.payload * 4 for call in with_pieces([], zero, Layout(4), {})]
    assert sent == [28 << 20, 12 << 20]  # one is full when it has passed 25 MiB
    assert with_pieces([], zero.at(0), Layout(4), {}) == []


def test_zero_keeps_sums_within_slices():
    """What tensor ranks sum is not what pieces reduce."""
    zero = ZeroPlan(2, (Unit("", "dense", (Part("w", "dense", "dp", 2, 0, (4,), 4),)),))
    within = Call("all_reduce", (0, 1), 8, 8.0, "gradients")
    across = Call("all_reduce", (0, 2), 16, 16.0, "gradients")
    calls = with_pieces([within, across], zero, Layout(4, tensor=2), {})
    assert [call.kind for call in calls] == ["all_gather", "all_reduce", "reduce_scatter"]
    assert calls[1] == within


def test_zero_memory_by_stage():
    memory = zeroed(stage=2, precision="bf16").memory
    experts = 2 * 2 * EXPERT  # two layers of two experts on this rank
    assert {stage: tuple(kinds["expert"].values()) for stage, kinds in memory.items()} == {
        0: (2 * experts, 2 * experts, 12 * experts, 0),
        1: (2 * experts, 2 * experts, 12 * experts // 4, 0),
        2: (experts, experts, 2 * experts, 2 * experts),
        3: (experts, experts, 2 * experts, 2 * experts),  # of two layers, both at once
    }
    dense = ROOT + 2 * DENSE
    assert memory[3]["dense"]["parameters"] == 4 * dense // 8
    ahead, not_ahead = (zeroed(stage=3, prefetch=n).memory[3]["expert"] for n in (1, 0))
    assert (ahead["gathered"], not_ahead["gathered"]) == (4 * experts, 2 * experts)


def test_zero_memory_table():
    console = Console(width=120, record=True, file=io.StringIO())
    print_simulation(zeroed(stage=3), console)
    text = console.export_text()
    assert "kept on a rank by ZeRO stage, with Adam; the plan's is 3" in text
    assert "gathered at once" in text
    lines = [line.replace("|", " ").split() for line in text.splitlines()]
    kinds = ("dense", "expert")
    stages = [(a, b) for a, b, *_ in (line for line in lines if len(line) > 5) if b in kinds]
    assert stages == [(str(stage), kind) for stage in range(4) for kind in kinds]
    console = Console(width=120, record=True, file=io.StringIO())
    print_simulation(replace(zeroed(stage=3), memory={}), console)
    assert "by ZeRO stage" not in console.export_text()
