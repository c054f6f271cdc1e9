"""`save` killed, out of space or failing at every step: the old one or none is there, never a mix.

Run as a script this file is the process that forks the victims: it has one thread and imports torch
once. A victim counts what it is about to do to the file system, and dies before, or in the middle.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moeify as mf
from moeify.atomic_file import HashedFile
from moeify.errors import CheckpointError
from moeify.storage import atomic_folder
from tests.checkpoint.killing import Steps, victim

X = torch.linspace(-1, 1, 32).view(4, 8)
PLAN = {"layers": [{"select": "all", "experts": 3}]}
SHARD = 2_000


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


def converted(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mf.moeify(Net(), PLAN, example_inputs=(X,), verify=False).eval()


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(X)


def found_at(target: Path) -> Tensor | None:
    """Return what the saved model computes, None if there is none; a mix raises."""
    if not target.exists():
        return None
    files = tuple(sorted((p.name, p.read_bytes()) for p in target.iterdir()))
    if files not in _LOADED:  # the same bytes load alike
        _LOADED[files] = output(mf.load(target, model=Net()))
    return _LOADED[files]


_LOADED: dict[tuple[tuple[str, bytes], ...], Tensor] = {}


# -- the process that forks


def killed_everywhere(root: Path, *, existing: bool, exchange: bool) -> int:
    """Kill `save` at every step; return their number."""
    target, backup = root / "m", root.parent / f"{root.name}-backup"
    old, new = converted(0), converted(1)
    before, after = (output(old) if existing else None), output(new)
    if existing:
        mf.save(old, backup, max_shard_size=SHARD)
    steps, seen = 0, set()
    while True:
        steps += 1
        shutil.rmtree(target, ignore_errors=True)
        if existing:
            shutil.copytree(backup, target)

        def run(n: int = steps) -> None:
            act = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            if not exchange:
                atomic_folder._exchange = lambda one, other: False
            Steps(n, root, act, HashedFile).install(setattr, audit=True)
            mf.save(new, target, max_shard_size=SHARD)

        status = victim(run)
        got = found_at(target)
        if status == 0:
            assert got is not None
            assert torch.equal(got, after)
            break
        assert status == -signal.SIGKILL, status
        if got is None:
            assert not (existing and exchange), "an older save vanished"
            seen.add("none")
        elif torch.equal(got, after):
            seen.add("new")
        else:
            assert before is not None
            assert torch.equal(got, before)
            seen.add("old")
    assert "new" in seen or not existing
    assert ("old" if existing else "none") in seen
    assert len(list(root.iterdir())) == 1, "leftovers of killed saves were not removed"
    return steps


def out_of_space(root: Path, *, existing: bool) -> int:
    """Limit the size of files; return the number of failures."""
    target = root / "m"
    old, new = converted(0), converted(1)
    if existing:
        mf.save(old, target)
    before, failures = found_at(target), 0
    for limit in (0, 1, 100, 1_000, 3_000):

        def run(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            mf.save(new, target)

        assert victim(run) == 1
        failures += 1
        got = found_at(target)
        assert (got is None) == (before is None)
        assert got is None or before is None or torch.equal(got, before)
        assert len(list(root.iterdir())) == existing
    return failures


def main(root: Path) -> None:
    torch.set_num_threads(1)
    counts = {}
    for name, existing, exchange in (
        ("empty", False, True),
        ("over", True, True),
        ("aside", True, False),
    ):
        (root / name).mkdir()
        counts[name] = killed_everywhere(root / name, existing=existing, exchange=exchange)
    for name, existing in (("full", False), ("full-over", True)):
        (root / name).mkdir()
        counts[name] = out_of_space(root / name, existing=existing)
    sys.stdout.write(json.dumps(counts))


# -- tests


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and counts on Linux")
def test_killed_or_out_of_space_at_every_step(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(mf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["empty"] > 20, counts
    assert counts["over"] > counts["empty"], counts
    assert counts["full"] == counts["full-over"] == 5


def failure(run: Callable[[], None]) -> BaseException | None:
    try:
        run()
    except (CheckpointError, KeyboardInterrupt) as error:
        return error
    return None


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("error", [errno.ENOSPC, None])
def test_errors_at_every_step(
    existing: bool, error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "m"
    old, new = converted(0), converted(1)
    if existing:
        mf.save(old, target)
    before = found_at(target)

    def act() -> None:
        raise KeyboardInterrupt if error is None else OSError(error, os.strerror(error))

    for step in range(1, 100):
        with monkeypatch.context() as patch:
            Steps(step, tmp_path, act, HashedFile).install(patch.setattr, audit=False)
            raised = failure(lambda: mf.save(new, target, max_shard_size=SHARD))
        if raised is None:
            break
        if error is None:
            assert isinstance(raised, KeyboardInterrupt)
        else:
            assert isinstance(raised, CheckpointError)
            assert os.strerror(error) in str(raised)
            assert str(target) in str(raised)
        got = found_at(target)
        if got is not None and torch.equal(got, output(new)):
            break  # it came after the rename
        assert (got is None) == (before is None)
        assert got is None or before is None or torch.equal(got, before)
        assert len(list(tmp_path.iterdir())) == existing
    assert step > 10
    got = found_at(target)
    assert got is not None
    assert torch.equal(got, output(new))
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CheckpointError, match="cannot be saved"):
            mf.save(converted(0), tmp_path / "m")
    finally:
        tmp_path.chmod(0o700)


def test_saves_in_threads_do_not_disturb_each_other(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    models = [converted(seed) for seed in range(4)]
    expected = [output(model) for model in models]
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(mf.save, model, tmp_path / "m") for model in models * 3]
    failed = [job.exception() for job in jobs if job.exception() is not None]
    assert all(isinstance(error, CheckpointError) for error in failed)
    assert len(failed) < len(jobs)
    got = found_at(tmp_path / "m")
    assert got is not None
    assert any(torch.equal(got, one) for one in expected)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
