"""Every example runs, and prints what its text promises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.scripts import run_script

EXPECTED = {
    "custom_pass": ["+    clamp = torch.clamp(hidden, -0.05, 0.05)", "plain numbers again: True"],
    "distill": ["student, 3 layers, not trained yet", "staged:", "alpha 0)"],
    "export_graph": ["moeify.experts.default", "equal after pickling: True", "own router"],
    "gpt2_pr_moe": ["whole model", "largest difference", "kernel = 'cpu'"],
    "plan_from_yaml": ["layers.5", "largest difference", "did you mean `residual`?"],
    "train_elastic": ["go on from"],
    "train_expert_parallel": ["% of the routes to each expert"],
    "train_loop": ["MoE, 100 steps more", "% of the tokens to its experts"],
    "train_trainer": ["MoE, 60 steps more", "of an even load per expert"],
}


def run(name, repo):
    """What an example prints, run in a process that need not import torch again."""
    return run_script(repo / "examples" / f"{name}.py")


def launch(name, repo, launcher=(), arguments=()):
    """The same in a Python of its own, or in those of a launcher."""
    env = {**os.environ, "PYTHONPATH": str(repo), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launcher, str(repo / "examples" / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested(repo):
    assert {path.stem for path in (repo / "examples").glob("*.py")} == set(EXPECTED)


@pytest.mark.parametrize("name", ["export_graph", "gpt2_pr_moe", "plan_from_yaml"])
def test_example(name, repo):
    out = run(name, repo)
    assert all(text in out for text in EXPECTED[name]), out
    assert float(re.findall(r"largest difference.*: (\S+)", out)[0]) < 1e-4


def test_custom_pass(repo):
    out = run("custom_pass", repo)
    assert all(text in out for text in EXPECTED["custom_pass"]), out
    clamped, free = (float(x) for x in re.findall(r"(?:returns|pass): +(\S+)", out))
    assert clamped <= 0.05 < free


def test_distill(repo):
    out = run("distill", repo)
    assert all(text in out for text in EXPECTED["distill"]), out
    teacher, untrained, *trained = (float(x) for x in re.findall(r"loss (\S+)", out))
    assert untrained > teacher
    assert len(trained) == 3
    assert all(loss < untrained for loss in trained)
    assert [float(a) for a in re.findall(r"alpha (\S+)\)", out)] == [0, 1, 0]


def test_train_loop(repo):
    out = run("train_loop", repo)
    assert all(text in out for text in EXPECTED["train_loop"]), out
    untrained, dense, converted, moe = (float(x) for x in re.findall(r"loss (\S+)", out))
    assert untrained > dense > moe
    assert abs(converted - dense) < 2e-3


def test_train_trainer(repo):
    out = run("train_trainer", repo)
    assert all(text in out for text in EXPECTED["train_trainer"]), out
    untrained, dense, converted, moe = (
        float(x) for pair in re.findall(r"held-out loss (\S+) -> (\S+);", out) for x in pair
    )
    assert untrained > dense > moe
    assert abs(converted - dense) < 2e-3
    loads = [(float(a), float(b)) for a, b in re.findall(r"(\S+) to (\S+) of an even", out)]
    assert len(loads) == 2
    assert all(0 < least <= 1 <= most < 4 for least, most in loads)


@pytest.mark.slow  # the same losses on any number of ranks are in tests/distributed
def test_train_expert_parallel(repo):
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    alone, over_ranks = (launch("train_expert_parallel", repo, how) for how in ((), torchrun))
    assert EXPECTED["train_expert_parallel"][0] in alone
    want, got = (
        [float(loss) for loss in re.findall(r"loss (\S+)", out)] for out in (alone, over_ranks)
    )
    assert len(want) == 20
    assert want[-1] < want[0] - 1
    assert got == pytest.approx(want, rel=1e-4)
    ranks = re.findall(r"rank (\d): (\d) of 4 experts per layer, ([\d,]+) weights", over_ranks)
    assert [(rank, experts) for rank, experts, _ in ranks] == [(str(i), "2") for i in range(2)]
    assert {weights for *_, weights in ranks} == {"287,232"}


@pytest.mark.slow  # resuming in other layouts, without torchrun, is in tests/distributed
def test_train_elastic(repo, tmp_path):
    """A rank is killed; the ranks go on by themselves, and one alone from the same checkpoint."""
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node {} --max-restarts 1"
    folder = ["--folder", str(tmp_path), "--steps", "9", "--every", "3"]
    killed = launch("train_elastic", repo, torchrun.format(2).split(), [*folder, "--die", "5"])
    losses = [float(loss) for loss in re.findall(r"loss (\S+)", killed)]
    assert "2 ranks go on from" in killed
    assert len(losses) == 5 + 6
    assert losses[5:7] == pytest.approx(losses[3:5], rel=1e-5)  # steps 3 and 4, again
    for later in ("step-00000006", "step-00000009"):
        shutil.rmtree(tmp_path / later)
    alone = launch("train_elastic", repo, torchrun.format(1).split(), [*folder, "--stage", "0"])
    assert "1 ranks go on from" in alone
    assert "step-00000003" in alone
    got = [float(loss) for loss in re.findall(r"loss (\S+)", alone)]
    assert got == pytest.approx(losses[5:], rel=1e-5)
