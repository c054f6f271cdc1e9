"""The study of findings: its text, its test, and a part of it at one step."""

import json
from concurrent.futures import Future

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    findings,
    findings_claims,
    findings_page,
    findings_study,
    findings_text,
    findings_train,
)


def test_the_split_holds_out_whole_files_once_each(tmp_path):
    for i in range(40):
        lines = [f"line {i} {j}" for j in range(20)]
        (tmp_path / f"{i}.py").write_text("\n".join(lines))
        (tmp_path / f"{i}-copy.py").write_text("\n".join(lines))
        (tmp_path / f"{i}-near.py").write_text("\n".join([*lines, "another"]))
    corpus = findings_text.read(tmp_path)
    facts = corpus.facts
    assert facts["train_files"] + facts["held_out_files"] == 40
    assert facts["identical_left_out"] + facts["near_identical_left_out"] == 80
    train = bytes(corpus.train.tolist())
    assert not any(bytes(file.tolist()) in train for file in corpus.held_out)


def test_batches_of_a_seed_are_the_same_from_any_start():
    text = torch.arange(250, dtype=torch.uint8)
    whole, later = (findings_text.batches(text, 8, 4, 1, first) for first in (0, 3))
    want = [next(whole) for _ in range(12)]
    assert all(torch.equal(batch, next(later)) for batch in want[3:])


@pytest.mark.parametrize(
    ("first", "verdict"),
    [
        ([1.0, 1.01, 0.99], "reproduced"),
        ([3.0, 3.01, 2.99], "not reproduced"),
        ([1.0, 2.9, 1.5], "within noise"),  # less on the whole, and not for every seed
        ([3.0, 1.1, 2.5], "within noise"),
    ],
)
def test_a_verdict_needs_the_whole_interval(first, verdict):
    claim = findings_claims.Claim("less", "us", "a", "b")
    assert findings_claims.judge(claim, first, [2.0, 2.0, 2.0])["verdict"] == verdict


def test_on_par_allows_a_margin_and_more_is_more():
    par = findings_claims.Claim("on par", "us", "a", "b", par=True)
    for first, verdict in ((2.01, "reproduced"), (2.03, "not reproduced")):
        found = findings_claims.judge(par, [first, first + 1e-4], [2.0, 2.0])
        assert found["verdict"] == verdict


def test_a_part_of_the_study_at_one_step(tmp_path, monkeypatch, capsys):
    lines = [f"{i} {j} {i * j % 97}" for i in range(40) for j in range(60)]
    for i in range(40):
        (tmp_path / f"{i}.py").write_text("\n".join(lines[60 * i : 60 * i + 60]))
    corpus = findings_text.read(tmp_path)
    monkeypatch.setattr(findings, "_corpus", lambda: corpus)
    monkeypatch.setattr(findings, "ProcessPoolExecutor", Here)
    threads = torch.get_num_threads()
    some = ["copy", "probability", "student staged", "copy, equal time"]
    command = ["--steps", "1", "--seeds", "1", "--out", str(tmp_path / "out"), "--only", *some]
    assert findings.main([*command, "--minutes", "0"]) == 2
    assert "run the same command again" in capsys.readouterr().out
    assert findings.main(command) == 0
    assert findings.main(command) == 0  # nothing is left: the same results
    torch.set_num_threads(threads)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = {run["job"]: run for run in results["jobs"]}
    names = {"dense", "continued", "pr-moe", *some}
    assert set(found) == names
    dense = found["dense"]["loss"]
    for name in ("continued", "copy", "pr-moe"):
        assert found[name]["curve"][0]["loss"] == pytest.approx(dense, abs=1e-5)
    assert found["probability"]["curve"][0]["loss"] != pytest.approx(dense, abs=1e-5)
    sizes = [found[name]["parameters"] for name in ("copy", "pr-moe", "student staged", "dense")]
    assert sizes == sorted(sizes, reverse=True)
    counted = {row["claim"]: row["verdict"] for row in results["findings"]}
    assert counted.pop("PR-MoE has fewer parameters") == "reproduced"
    assert counted["Straight-through ends lower"] == "too few seeds"
    assert counted["Second half beats first half"] == "not run"
    assert set(counted.values()) == {"too few seeds", "not run"}
    text = findings_page.page(results, tmp_path / "out" / "results.json")
    assert all(f"| `{name}` |" in text for name in names)
    assert (tmp_path / "out" / "results.png").stat().st_size > 10_000


def test_a_study_of_other_settings_is_not_gone_on_with(tmp_path):
    size = findings_study.tiny()
    job = findings_train.Job("dense", 0)
    for name in (job.file, "costs"):
        findings.write(tmp_path / f"{name}.json", {"settings": {"name": "small"}})
    with pytest.raises(SystemExit, match="other settings"):
        findings.done(job, size, tmp_path)
    with pytest.raises(SystemExit, match="other settings"):
        findings.costs(["copy"], size, 1, tmp_path)


def test_budgets_and_flops():
    size = findings_study.tiny()
    costs = {
        "continued": {"seconds": [1.0, 2.0, 9.0], "flops": [3.0]},
        "copy, equal time": {"seconds": [4.0], "flops": [3.0]},
        "copy, equal FLOPs": {"seconds": [4.0], "flops": [9.0]},
    }
    steps = {name: findings_train.Job(name, 0).steps(size, costs) for name in [*costs, "scratch"]}
    assert steps == {
        "continued": size.steps,
        "copy, equal time": size.steps // 2,
        "copy, equal FLOPs": size.steps // 3,
        "scratch": size.steps + size.dense_steps,
    }
    model = findings_train.dense_model(size, 0)
    model.set_attn_implementation("eager")  # the counter knows no fused attention on a CPU
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(1, size.context, dtype=torch.long))
    # The counter has all scores where half are masked, and no norms and biases.
    masked = 2 * size.layers * size.context * size.width
    counted = counter.get_total_flops() / size.context - masked
    assert findings_train.flops_per_token(model, size) == pytest.approx(counted, rel=0.02)


class Here:
    """A pool that runs what it is given, here and now."""

    def __init__(self, workers, mp_context):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, call, *arguments):
        future = Future()
        future.set_result(call(*arguments))
        return future
