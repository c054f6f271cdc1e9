"""`moeify convert` killed, out of space or failing at every step: no partial result is kept in
place, and `--resume` ends with the bytes of an undisturbed run.

Run as a script, this file is the process that forks the victims, as `test_crash.py` is.
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
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.atomic_file import HashedFile
from moeify.checkpoint.single import moeify_files
from moeify.errors import CheckpointError, MoeifyError
from moeify.storage import resumable_writer
from moeify.storage.atomic_folder import locked_folder
from moeify.storage.resumable_writer import partial_path, write_resumable
from moeify.storage.tensor_source import ModelFiles
from tests.checkpoint.test_crash import (
    Steps,
    converted,
    failure,
    found_at,
    output,
    victim,
)

SHARD = 1_200
MADE_OF = {"plan": "p", "source": "s"}


def write(model: nn.Module, target: Path, **options: Any) -> None:
    made_of = options.pop("made_of", MADE_OF)
    if id(model) not in _FILES:
        _FILES[id(model)] = model, moeify_files(model)
    model_files = _FILES[id(model)][1]
    write_resumable(model_files, target, made_of=made_of, max_shard_size=SHARD, **options)


_FILES: dict[int, tuple[nn.Module, ModelFiles]] = {}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def begin(root: Path, *, existing: bool) -> Path:
    """Make the target's surroundings as they are before."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    target, older = root / "m", root.with_name("older")
    if existing and not older.exists():
        mf.save(converted(0), older)
        (older / "mine.txt").write_text("of the user")
    if existing:
        shutil.copytree(older, target)
    return target


# -- the process that forks


def killed_everywhere(root: Path, *, existing: bool) -> int:
    """Kill a write at every second or fourth step and resume it; return the number of steps."""
    model = converted(1)
    allowed = [output(converted(0)), output(model)]
    write(model, begin(root, existing=existing))
    wanted = files(root / "m")
    steps, kept, stride = 0, 0, 4 if existing else 2
    while True:
        steps += stride
        target = begin(root, existing=existing)

        def run(n: int = steps, target: Path = target) -> None:
            act = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            Steps(n, root, act, HashedFile).install(setattr, audit=True)
            write(model, target)

        status = victim(run)
        if status == 0:
            assert files(target) == wanted
            break
        assert status == -signal.SIGKILL, status
        got = found_at(target)
        assert (got is not None and "mine.txt" in files(target)) or not existing, "it vanished"
        assert got is None or any(torch.equal(got, one) for one in allowed)
        journal = partial_path(target) / "journal.json"
        kept += journal.exists() and len(json.loads(journal.read_bytes())["shards"]) > 1
        write(model, target, resume=True)
        assert files(target) == wanted, f"step {steps}"
        assert [path.name for path in root.iterdir()] == ["m"], f"step {steps}"
    assert kept > 4
    return steps


def too_large(root: Path) -> int:
    """Limit the size of files; return the number of failures."""
    model, failures = converted(1), 0
    write(model, begin(root, existing=False))
    wanted = files(root / "m")
    for limit in (0, 100, 1_000, 1_700):
        target = begin(root, existing=False)

        def run(limit: int = limit, target: Path = target) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            write(model, target)

        assert victim(run) == 1
        failures += 1
        assert not target.exists()
        write(model, target, resume=True)
        assert files(target) == wanted
    return failures


def main(root: Path) -> None:
    torch.set_num_threads(1)
    counts = {
        "empty": killed_everywhere(root / "empty", existing=False),
        "over": killed_everywhere(root / "over", existing=True),
        "large": too_large(root / "large"),
    }
    sys.stdout.write(json.dumps(counts))


# -- tests


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and counts on Linux")
def test_killed_or_too_large_at_every_step(tmp_path: Path, repo: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["empty"] > 40, counts
    assert counts["over"] > counts["empty"], counts
    assert counts["large"] == 4


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EFBIG, None])
def test_errors_at_every_step(
    error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, target = converted(1), tmp_path / "m"
    write(model, target)
    wanted = files(target)

    def act() -> None:
        raise KeyboardInterrupt if error is None else OSError(error, os.strerror(error))

    for step in range(1, 100):
        shutil.rmtree(target, ignore_errors=True)
        with monkeypatch.context() as patch:
            Steps(step, tmp_path, act, HashedFile).install(patch.setattr, audit=False)
            raised = failure(lambda: write(model, target))
        if raised is None or target.exists():  # it came after the rename
            break
        if error is not None:
            assert isinstance(raised, CheckpointError)
            assert os.strerror(error) in str(raised)
        if step % 5 == 0:  # all are resumed elsewhere
            write(model, target, resume=True)
            assert files(target) == wanted
        assert len(list(tmp_path.iterdir())) <= 1
    assert step > 20
    write(model, target)
    assert files(target) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Path]:
    """A write that was interrupted in its last shard."""
    model, target = converted(1), tmp_path / "m"
    real = resumable_writer.write_shard

    def broken(path: Path, *rest: Any) -> Any:
        if path.name.startswith("moeify-00003"):
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        return real(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(resumable_writer, "write_shard", broken)
        with pytest.raises(KeyboardInterrupt):
            write(model, target)
    assert not target.exists()
    return model, target


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the shards that are written from now on."""
    written: list[str] = []
    real = resumable_writer.write_shard

    def note(path: Path, *rest: Any) -> Any:
        written.append(path.name)
        return real(path, *rest)

    monkeypatch.setattr(resumable_writer, "write_shard", note)
    return written


def test_finished_shards_are_not_written_again(begun, monkeypatch):
    model, target = begun
    written, counts = counted(monkeypatch), []
    write(model, target, resume=True, advance=counts.append)
    assert written[0].startswith("moeify-00003")
    assert sum(counts) == moeify_files(model).nbytes
    assert torch.equal(found_at(target), output(model))


def test_a_new_start_keeps_nothing(begun, monkeypatch):
    model, target = begun
    written = counted(monkeypatch)
    write(model, target)
    assert written[0].startswith("moeify-00001")
    assert not partial_path(target).exists()


@pytest.mark.parametrize("same_size", [True, False])
def test_changed_shards_are_not_trusted(same_size, begun, monkeypatch):
    model, target = begun
    shard = next((partial_path(target) / "folder").glob("moeify-00002*"))
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if same_size else data + b"x")
    written = counted(monkeypatch)
    write(model, target, resume=True)
    assert written[0].startswith("moeify-00002")
    assert written[1].startswith("moeify-00003")
    assert torch.equal(found_at(target), output(model))


@pytest.mark.parametrize("what", ["plan", "source"])
def test_resume_refuses_another_job(what, begun):
    model, target = begun
    before = {path: path.stat().st_mtime_ns for path in partial_path(target).rglob("*")}
    with pytest.raises(
        CheckpointError, match=f"was begun with another {what}, so it cannot be resumed"
    ):
        write(model, target, resume=True, made_of={**MADE_OF, what: "changed"})
    assert {p: p.stat().st_mtime_ns for p in partial_path(target).rglob("*")} == before


def test_resume_refuses_other_shards(begun):
    model, target = begun
    model_files = moeify_files(model)
    with pytest.raises(CheckpointError, match="another max_shard_size"):
        write_resumable(model_files, target, made_of=MADE_OF, max_shard_size=SHARD + 1, resume=True)


@pytest.mark.parametrize("text", ["{", '{"format": 1}', '{"a": 1, "a": 2}', "[" * 10_000])
def test_resume_refuses_a_damaged_journal(text, begun):
    model, target = begun
    (partial_path(target) / "journal.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"journal\.json"):
        write(model, target, resume=True)
    write(model, target)
    assert torch.equal(found_at(target), output(model))


def test_a_shard_that_is_a_link_is_not_followed(begun, tmp_path):
    model, target = begun
    shard = next((partial_path(target) / "folder").glob("moeify-00002*"))
    outside = tmp_path / "outside"
    shard.rename(outside)
    shard.symlink_to(outside)
    write(model, target, resume=True)
    assert not any(path.is_symlink() for path in target.iterdir())
    assert outside.exists()


def test_two_writers(begun):
    model, target = begun
    with locked_folder(partial_path(target)):
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="another process"):
                write(model, target, resume=resume)
    write(model, target, resume=True)
    assert torch.equal(found_at(target), output(model))


def test_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable_writer, "free_bytes", lambda directory: 1_000)
    with pytest.raises(CheckpointError, match="1,000 are free"):
        write(converted(1), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_check_leaves_the_target_alone(tmp_path, monkeypatch):
    model, target = converted(1), tmp_path / "m"
    seen = []

    def check(staged: Path) -> None:
        seen.append(sorted(files(staged)))
        raise MoeifyError("no")

    with pytest.raises(MoeifyError, match="no"):
        write(model, target, check=check, late=lambda: {"README.md": b"late"})
    assert {"README.md", "moeify.json"} <= set(seen[0])
    assert not target.exists()
    written = counted(monkeypatch)
    write(model, target, resume=True)
    assert not written


def test_sigkill_of_the_command_line(tmp_path: Path, repo: Path) -> None:
    import transformers
    from typer.testing import CliRunner

    from moeify.cli.main import app

    source, plan, out = tmp_path / "llama", tmp_path / "plan.yaml", tmp_path / "out"
    config = transformers.LlamaConfig(
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        hidden_size=32,
        intermediate_size=64,
        vocab_size=999,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(source)
    plan.write_text("version: 1\nlayers:\n  - {select: all, experts: 24}\n")
    rest = ["--plan", str(plan), "--verify", "0", "--max-shard-size", "9KB"]
    rest += ["--export", "native"]
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    env = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "moeify.cli.main", "convert", str(source), str(out), *rest]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    journal = partial_path(out) / "journal.json"
    while not journal.exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    text, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, text.decode()
    assert not out.exists()
    call: Callable[..., Any] = lambda *a: CliRunner().invoke(  # noqa: E731
        app, ["convert", str(source), *map(str, a), *rest]
    )
    plan.write_text("version: 1\nlayers:\n  - {select: all, experts: 4}\n")
    changed = call(out, "--resume")
    assert changed.exit_code == 1
    assert "another plan and tensors" in changed.stderr
    plan.write_text("version: 1\nlayers:\n  - {select: all, experts: 24}\n")
    resumed, whole = call(out, "--resume"), call(tmp_path / "whole")
    assert (resumed.exit_code, whole.exit_code) == (0, 0), resumed.stderr + whole.stderr
    assert files(out) == files(tmp_path / "whole")
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    assert after == before


if __name__ == "__main__":
    main(Path(sys.argv[1]))
