"""The benchmarks run at tiny sizes with the peers that are installed; times are never asserted."""

import dataclasses
import functools
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmarks import exchange_peers, gate, layer, machine, race, zero, zero_peers
from benchmarks.case import Case, Weights, cold_copies, compare, draw_tokens, truth
from benchmarks.peers import CONTESTANTS, Refused, _module, einsum_gate

TINY = Case("cpu", "train", "fp32", 1, 32, 48, 6, 2, 21)
SIZES = "--threads 1 --width 32 --hidden 48 --experts 6 --budget 0.01".split()
CEILINGS = {"linear_gflops": 100.0, "onednn_gflops": 200.0, "read_gbs": 10.0, "gemv_gbs": 5.0}


@pytest.fixture(autouse=True)
def _short_and_without_traces(monkeypatch):
    monkeypatch.setattr(machine, "pin", lambda threads: None)
    monkeypatch.setattr(machine, "ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(race, "FEWEST_ROUNDS", 2)
    monkeypatch.setattr(layer, "FEW_CALLS", 2)
    former = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(former)


def _cases(path: Path) -> dict:
    return json.loads(path.read_text())["cases"]


@pytest.mark.parametrize("top_k", [1, 2, 6])
def test_truth_is_the_layer_in_float64(top_k):
    case = dataclasses.replace(TINY, top_k=top_k)
    weights = Weights.drawn(case)
    x = draw_tokens(case, weights, 0)
    gradient = layer.gradient_of(case)
    got = truth(case, weights, x, gradient)
    x = x.double().requires_grad_()
    chosen, ids = (x @ weights.router.double().t()).softmax(1).topk(top_k)
    if top_k > 1:
        chosen = chosen / chosen.sum(1, keepdim=True)
    hidden = torch.einsum("td,ehd->teh", x, weights.gate_up.double())
    first, second = hidden.chunk(2, -1)
    everything = torch.einsum("tef,edf->ted", F.silu(first) * second, weights.down.double())
    want = (everything.gather(1, ids[..., None].expand(-1, -1, 32)) * chosen[..., None]).sum(1)
    (grad,) = torch.autograd.grad(want, x, gradient.double())
    torch.testing.assert_close(got.out.double(), want.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.grad.double(), grad, rtol=1e-4, atol=1e-5)
    counts = torch.bincount(ids.flatten(), minlength=6)
    assert (got.used, got.busiest) == (int((counts > 0).sum()), int(counts.max()))


def test_compare_counts_what_may_differ_and_refuses_what_may_not():
    want = torch.randn(5, 8)
    got = want.clone()
    assert compare(got, want, TINY, 0) == (0.0, 0)
    got[3] = 0
    assert compare(got, want, TINY, 1) == (0.0, 1)
    got[1] = math.nan
    with pytest.raises(AssertionError, match="2 of 5 tokens are wrong"):
        compare(got, want, TINY, 1)


def test_cold_copies_are_equal_at_other_addresses():
    weights = Weights.drawn(TINY)
    copies = cold_copies(weights, 2 * weights.gate_up.nbytes)
    assert copies[0].router is weights.router
    assert len({copy.dense_down.data_ptr() for copy in copies}) == len(copies) > 1
    for copy in copies:
        torch.testing.assert_close(copy.gate_up, weights.gate_up, rtol=0, atol=0)


def test_all_run_each_round_and_ratios_are_taken_within_rounds():
    ticks = iter(range(1, 1000))
    samples = race.race({"a": lambda: float(next(ticks)), "b": lambda: 2.0}, budget=0)
    assert {name: [len(each) for each in times] for name, times in samples.items()} == {
        "a": [race.FEWEST_ROUNDS] * race.SETS,
        "b": [race.FEWEST_ROUNDS] * race.SETS,
    }
    assert race.medians([[0.001, 0.005, 0.003]]) == [3.0]
    assert race.ratios([[2.0, 30.0, 3.0]], [[1.0, 10.0, 3.0]]) == [2.0]


def test_machine_describes_itself():
    said = machine.describe()
    assert {"cpu", "instructions", "caches", "cores", "torch"} <= set(said)
    assert all(isinstance(value, str) for value in said.values())
    assert machine.available_bytes("cpu") > 2**20


def test_ceilings_are_rates(monkeypatch):
    monkeypatch.undo()
    found = machine.ceilings("cpu", torch.float32, size=2**20)
    assert set(found) >= {"linear_gflops", "read_gbs", "gemv_gbs"}
    assert all(0 < value < math.inf for value in found.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layer_measures_all_that_is_installed(tmp_path, dtype):
    pytest.importorskip("transformers")
    out = tmp_path / "layer.json"
    names = [n for n, c in CONTESTANTS.items() if not (c.compiled or n.startswith("deepspeed"))]
    status = layer.main(
        [*SIZES, "--dtype", dtype, "--tokens", "3", "40", "--top-k", "1", "2", "--out", str(out)]
        + ["--contestants", *names]
    )
    assert status == 0
    cases = _cases(out)
    assert len(cases) == 8  # tokens, top-k, forward and train
    for found in cases.values():
        assert set(found["contestants"]) | set(found["skipped"]) == set(names)
        reasons = found["skipped"]
        assert all("on" in reasons[name] for name in ("liger", "scattermoe"))
        assert not [why for why in reasons.values() if "wrong" in why]
        for name, facts in found["contestants"].items():
            assert len(facts["ms"]) == len(facts["over_dense"]) == race.SETS, name
            assert facts["gflops"] > 0
            assert facts["over_ideal"] > 0
            assert ("error" in facts) == (not name.startswith("dense")), name
            assert ("dropped_tokens" in facts) == (name == "einsum"), name
        assert {"moeify", "hf_grouped", "einsum"} <= set(found["contestants"])
        assert {"torch", "transformers"} <= set(found["versions"])


def test_layer_fills_a_file_in_pieces_and_draws_it(tmp_path, monkeypatch):
    out, png = tmp_path / "layer.json", tmp_path / "layer.png"
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    command = [*SIZES, "--dtype", "fp32", "--mode", "train", "--out", str(out), "--top-k", "2"]
    layer.main([*command, "--tokens", "9", "--contestants", "grouped_mm"])
    layer.main([*command, "--tokens", "9", "30", "--contestants", "grouped_mm", "moeify_compiled"])
    cases = _cases(out)
    assert [sorted(found["contestants"]) for found in cases.values()] == [
        ["dense", "grouped_mm", "moeify_compiled"]
    ] * 2
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(layer, "run_case", None)  # nothing is left to measure
    layer.main([*command, "--tokens", "9", "30", "--contestants", "moeify_compiled"])
    from benchmarks import picture

    picture.main([str(out), str(png), "mode=train", "top_k=2"])
    assert png.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="no layer"):
        picture.draw({"cases": {}, "machine": {}}, png)


def test_a_wrong_layer_is_reported_and_not_timed(tmp_path, monkeypatch):
    from benchmarks import peers

    monkeypatch.setattr(peers.Moeify, "forward", lambda self, x: 2 * self.block(x))
    out = tmp_path / "layer.json"
    command = [*SIZES, "--dtype", "fp32", "--mode", "forward", "--top-k", "2", "--tokens", "9"]
    assert layer.main([*command, "--contestants", "moeify", "--out", str(out)]) == 1
    (found,) = _cases(out).values()
    assert "moeify" not in found["contestants"]
    assert found["skipped"]["moeify"].startswith("wrong: ")


def test_results_of_other_hardware_are_not_mixed(tmp_path):
    path = tmp_path / "results.json"
    results = race.Results(path)
    results.add("a case", contestants={"x": {}})
    results.data["machine"]["cpu"] = "another"
    path.write_text(json.dumps(results.data))
    with pytest.raises(SystemExit, match="another"):
        race.Results(path)


def test_what_cannot_run_gives_the_reason():
    weights = Weights.drawn(TINY)
    with pytest.raises(Refused, match="runs on cuda only"):
        CONTESTANTS["liger"].layer(TINY, weights)
    large = dataclasses.replace(TINY, tokens=10**6)
    with pytest.raises(Refused, match="a step takes about"):
        CONTESTANTS["einsum"].layer(large, weights)
    slow = dataclasses.replace(TINY, width=512, hidden=2048, experts=128, tokens=1024)
    with pytest.raises(Refused, match="backward moves about"):
        CONTESTANTS["hf_eager"].layer(slow, weights)
    with pytest.raises(Refused, match="no_such_peer is not installed"):
        _module("no_such_peer.moe")


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine without a GPU")
def test_gpu_cases_are_planned_without_a_gpu():
    options = layer._options(["--device", "cuda"])
    planned = list(layer.cases(options))
    assert {(case.width, case.hidden) for case in planned} >= {(4096, 14336), (2048, 768)}
    assert max(case.tokens for case in planned) == 32768
    assert {case.dtype for case in planned} == {"bf16"}
    names = layer.field(options, planned[0])
    assert {"liger", "scattermoe", "moeify_triton", "moeify_graphed"} <= set(names)
    with pytest.raises(SystemExit, match="no CUDA device"):
        layer.main(["--device", "cuda"])


def test_einsum_gate_keeps_first_choices_first():
    ids = torch.tensor([[0, 1], [0, 1], [1, 0]])
    weights = torch.full((3, 2), 0.5)
    combine = einsum_gate(weights, ids, experts=2, capacity=2)
    assert combine.sum((0, 2)).tolist() == [1.0, 1.0]
    assert combine[:, 1].nonzero()[:, 0].tolist() == [0, 2]  # token 1 comes third


def test_gate_measures_with_and_without_the_linear(tmp_path):
    out = tmp_path / "gate.json"
    sizes = "--tokens 50 --experts 8 --width 24 --top-k 1 2 3 --budget 0.01".split()
    names = ["sort", "transformers", "einsum", "moeify", "moeify_capacity", "moeify_reference"]
    assert gate.main([*sizes, "--contestants", *names, "--out", str(out)]) == 0
    for found in _cases(out).values():
        both = {name + end for name in names for end in ("", gate.LINEAR)}
        assert set(found["contestants"]) == both | {"linear"}
        assert found["skipped"] == {}
        rows = 50 * found["case"]["top_k"]
        assert found["contestants"]["moeify"]["kept_routes"] == rows
        assert found["contestants"]["moeify_capacity"]["kept_routes"] <= rows


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_peak_memory_counts_what_a_call_takes(repo):
    code = """
import torch
from benchmarks import race
print(race.peak_bytes(lambda: torch.ones(2**26 // 4).mul_(2), "cpu"))
"""  # in a fresh process: this one may hold that much freed memory
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=120)
    assert 2**26 <= int(done.stdout) < 2**27, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
def test_memory_of_a_gate_is_measured_in_its_own_process(tmp_path):
    out = tmp_path / "gate.json"
    sizes = "--tokens 500 --experts 8 --width 24 --top-k 2".split()
    gate.main([*sizes, "--memory", "--contestants", "moeify", "--out", str(out)])
    (found,) = _cases(out).values()
    assert found["memory"]["moeify"]["peak_mb"] >= 0


def test_deepspeed_runs_as_its_users_run_it(tmp_path):
    pytest.importorskip("deepspeed")
    out = tmp_path / "layer.json"
    command = [*SIZES, "--dtype", "fp32", "--top-k", "1", "2", "--tokens", "40"]
    names = ["deepspeed", "deepspeed_dropless"]
    subprocess.run(
        [sys.executable, "-m", "benchmarks.layer", *command, "--contestants", *names]
        + ["--out", str(out)],
        check=True,
    )
    for found in _cases(out).values():
        assert set(map(machine.label, names)) <= set(found["contestants"]), found["skipped"]


@pytest.mark.slow
def test_exchange_measures_layers_over_four_ranks(tmp_path):
    out = tmp_path / "exchange.json"
    sizes = "--tokens 24 --width 16 --hidden 24 --experts 8 --budget 0.01".split()
    command = [sys.executable, "-m", "benchmarks.exchange", *sizes, "--out", str(out)]
    subprocess.run(command, check=True, timeout=300)
    cases = _cases(out)
    assert [found["case"]["top_k"] for found in cases.values()] == [1, 2]
    for found in cases.values():
        measured, skipped = found["contestants"], found["skipped"]
        named = {machine.label(n): c for n, c in exchange_peers.CONTESTANTS.items()}
        assert set(measured) | set(skipped) == set(named)
        assert all("deepspeed is not installed" in why for why in skipped.values()), skipped
        for name, facts in measured.items():
            assert len(facts["ms"]) == len(facts["over_plain"]) == race.SETS, name
            assert ("error" in facts) == named[name].is_layer, name
            assert ("dropped_tokens" in facts) == named[name].drops, name
        # Of four exchanges of rows a quarter stays where it is.
        rows = 4 * 24 * found["case"]["top_k"] * 16 * 4 * 3 / 4
        assert measured["wire"]["sent_mb"] == pytest.approx(rows / 1e6)
        assert measured["wire"]["collectives"] == {"all_to_all": 4}
        assert measured["plain"]["collectives"] == {"all_to_all": 5}
        assert measured["moeify"]["collectives"] == {"all_to_all": 5, "all_reduce": 1}
        assert measured["moeify_local"]["collectives"] == {"all_reduce": 1}
        assert "all_to_all" not in measured["moeify_allgather"]["collectives"]
        assert measured["moeify_hierarchical"]["collectives"]["all_to_all"] > 5
        assert measured["moeify_overlap"]["collectives"]["all_to_all"] > 5


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.slow
def test_zero_measures_training_steps_over_four_ranks(tmp_path):
    out = tmp_path / "zero.json"
    sizes = "--layers 2 --width 16 --hidden 24 --vocabulary 32 --length 8 --sequences 2".split()
    names = ["moeify_1", "moeify_3", "deepspeed_1"]
    command = [*sizes, "--budget", "0.01", "--contestants", *names, "--out", str(out)]
    subprocess.run([sys.executable, "-m", "benchmarks.zero", *command], check=True, timeout=300)
    ((key, found),) = _cases(out).items()
    assert key.startswith("layers=2 width=16 hidden=24")
    everybody = {machine.label(name) for name in (*names, *zero.BASELINES.values())}
    measured, memory = found["contestants"], found["memory"]
    assert set(measured) | set(found["skipped"]) == everybody
    assert set(memory) == {machine.label(name) for name in names}
    assert all("deepspeed is not installed" in why for why in found["skipped"].values())
    for name, facts in measured.items():
        assert [len(facts[key]) for key in ("ms", *zero.BASELINES)] == [race.SETS] * 3, name
        assert facts["losses"][2] < facts["losses"][0], name
    one, three = memory["moeify_1"], memory["moeify_3"]
    for held in (one, three):
        for name, planned in held["planned"].items():
            # Beside the plan: steps of the optimizer, one float for each parameter.
            assert held[name] == pytest.approx(planned, rel=0.05), name
    assert three["parameters"] < 0.7 * one["parameters"]
    assert three["gradients"] < 0.7 * one["gradients"]


def test_zero_refuses_other_losses_and_counts_a_storage_once():
    known = {"moeify_0": {"losses": [2.0, 1.0, 0.5]}}
    contestant = zero_peers.CONTESTANTS["moeify_3"]
    zero.check(contestant, [2.0, 1.0, 0.50001], known)
    with pytest.raises(AssertionError, match="loss 2 is"):
        zero.check(contestant, [2.0, 1.0, 0.6], known)
    zero.check(zero_peers.CONTESTANTS["deepspeed_1"], [2.0, 9.0, 9.0], known)
    tensor = torch.zeros(6)
    assert zero.size_of([tensor, tensor[2:], torch.zeros(2)]) == 4 * (6 + 2)
