"""Sharded checkpoints that are killed, damaged, full of tricks or of another model.

Whatever happens to a save, the older checkpoint is there and loads; whatever is wrong with a
checkpoint, the model and its optimizer are as they were. Run as a script this file is the process
that forks the victims of SIGKILL.
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
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moeify as mf
from moeify.atomic_file import SyncedFile
from moeify.checkpoint.sharded.api import latest, load_sharded, save_sharded
from moeify.checkpoint.sharded.manifest import NAME
from moeify.errors import CheckpointError
from moeify.storage.strict_json import canonical_digest
from tests.checkpoint.killing import Steps, victim
from tests.distributed.ranks import run_ranks

X = torch.linspace(-1, 1, 32).view(4, 8)


class Net(nn.Module):
    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, hidden), nn.Linear(hidden, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x + self.down(torch.relu(self.up(x))))


def converted(seed: int, *, experts: int = 4, hidden: int = 16, **parallel: Any) -> nn.Module:
    torch.manual_seed(seed)
    plan = {"layers": [{"select": "all", "experts": experts}], "parallel": parallel}
    return mf.moeify(Net(hidden), plan, example_inputs=(X,), verify=False).train()


def trained(seed: int, **changes: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = converted(seed, **changes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    (model(X).square().mean() + mf.aux_loss(model)).backward()
    optimizer.step()
    return model, optimizer


def values(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[torch.Tensor]:
    found = [t.detach().clone() for t in model.state_dict().values()]
    for state in {} if optimizer is None else optimizer.state.values():
        found += [t.clone() for t in state.values()]
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# -- killed at every step: a process with one thread, which forks


def found_at(root: Path, into: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, Any]:
    """Return step and values of the newest checkpoint; a damaged one raises."""
    loaded = load_sharded(into, root, optimizer=optimizer)
    return loaded.step, values(into, optimizer)


def killed_everywhere(root: Path, *, over: bool) -> int:
    """Kill a save at every step, over the same step number or beside it; return their number."""
    backup = root.parent / f"{root.name}-backup"
    old, new, into = trained(0), trained(1), trained(2)
    save_sharded(old[0], backup, optimizer=old[1], step=1)
    before, after = values(*old), values(*new)
    steps, seen = 0, set()
    while True:
        steps += 1
        shutil.rmtree(root / "step-00000001", ignore_errors=True)
        shutil.rmtree(root / "step-00000002", ignore_errors=True)
        shutil.copytree(backup / "step-00000001", root / "step-00000001")

        def run(n: int = steps) -> None:
            act = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
            Steps(n, root, act, SyncedFile).install(setattr, audit=True)
            save_sharded(new[0], root, optimizer=new[1], step=1 if over else 2)

        status = victim(run)
        step, got = found_at(root, *into)
        if same(got, after):
            assert step == (1 if over else 2)
            seen.add("new")
        else:
            assert step == 1
            assert same(got, before)
            seen.add("old")
        if status == 0:
            break
        assert status == -signal.SIGKILL, status
    assert seen == {"old", "new"}
    kept = {path.name for path in root.iterdir()}
    assert kept <= {"step-00000001", "step-00000002"}, f"leftovers of killed saves: {kept}"
    return steps


def out_of_space(root: Path) -> int:
    """Limit the size of files; return the number of failures."""
    old, new, into = trained(0), trained(1), trained(2)
    save_sharded(old[0], root, optimizer=old[1], step=1)
    failures = 0
    for limit in (0, 1, 100, 3_000, 6_000):

        def run(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            save_sharded(new[0], root, optimizer=new[1], step=2)

        failures += victim(run)
        assert same(found_at(root, *into)[1], values(*old))
        assert [path.name for path in root.iterdir()] == ["step-00000001"]
    return failures


def main(root: Path) -> None:
    torch.set_num_threads(1)
    counts = {}
    for name, over in (("beside", False), ("over", True)):
        (root / name).mkdir()
        counts[name] = killed_everywhere(root / name, over=over)
    counts["full"] = out_of_space(root / "full")
    sys.stdout.write(json.dumps(counts))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and counts on Linux")
def test_killed_or_out_of_space_at_every_step(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(Path(mf.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout)
    assert counts["beside"] > 30, counts
    assert counts["over"] > counts["beside"], counts
    assert counts["full"] == 5, counts


# -- ranks


def ranks_in_trouble(rank: int, root: Path) -> str:
    """A full disk on one rank, then a rank that is killed in the midst of its file."""
    model, optimizer = trained(0, expert=2)
    save_sharded(model, root, optimizer=optimizer, step=1)
    write = SyncedFile.write

    def full(file: SyncedFile, data: Any) -> None:
        if rank == 1 and file.size > 1000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyncedFile, "write", full)
        with pytest.raises(CheckpointError, match=r"rank 1 could not save .*No space left"):
            save_sharded(model, root, optimizer=optimizer, step=2)
    dist.barrier()  # the first rank cleans up
    assert [path.name for path in root.iterdir()] == ["step-00000001"]
    before = [t.to_local() if hasattr(t, "to_local") else t for t in values(model)]
    if rank == 1:  # on one rank alone: the others must not be left half loaded
        optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(1)))
    with pytest.raises(CheckpointError, match="is not of this model"):
        load_sharded(model, root, optimizer=optimizer)
    if rank == 1:
        optimizer.param_groups[0]["params"].pop()
    now = [t.to_local() if hasattr(t, "to_local") else t for t in values(model)]
    assert same(before, now)

    def die(file: SyncedFile, data: Any) -> None:
        if file.size > 1000:
            os.kill(os.getpid(), signal.SIGKILL)
        write(file, data)

    if rank == 1:
        SyncedFile.write = die  # type: ignore[method-assign]
    with pytest.raises(CheckpointError, match="a peer died or stalled") as caught:
        save_sharded(model, root, optimizer=optimizer, step=2)
    return str(caught.value)


def test_ranks_in_trouble(tmp_path: Path) -> None:
    told = run_ranks(ranks_in_trouble, 2, tmp_path, dies=(1,))
    assert told[0].startswith("rank 0 could not save")
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    model, optimizer = trained(5)
    assert load_sharded(model, tmp_path, optimizer=optimizer).step == 1


# -- damage


def saved_by_two(rank: int, root: Path) -> None:
    model, optimizer = trained(0, expert=2)
    save_sharded(model, root, optimizer=optimizer, step=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    run_ranks(saved_by_two, 2, root)
    return root


FILE = "moeify-rank-0000{}.safetensors"


def edit(change: Callable[[dict[str, Any]], None], *, sign: bool = True) -> Callable[[Path], None]:
    """Change the manifest as an attacker would: with its digest."""

    def apply(path: Path) -> None:
        data = json.loads((path / NAME).read_text())
        change(data)
        if sign:
            del data["sha256"]
            data["sha256"] = canonical_digest(data)
        (path / NAME).write_text(json.dumps(data))

    return apply


def first(data: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = data["tensors"]["model.norm.weight"]["pieces"][0]
    return found


def flip(path: Path) -> None:
    data = json.loads((path / NAME).read_text())
    file = path / data["files"][first(data)["file"]]["file"]
    raw = bytearray(file.read_bytes())
    raw[first(data)["begin"]] ^= 1
    file.write_bytes(raw)


def swap(path: Path) -> None:
    one, other = path / FILE.format(0), path / FILE.format(1)
    one.rename(path / "x")
    other.rename(one)
    (path / "x").rename(other)


def link(path: Path) -> None:
    shutil.move(path / FILE.format(0), path / "else")
    (path / FILE.format(0)).symlink_to(path / "else")


def fifo(path: Path) -> None:
    (path / FILE.format(0)).unlink()
    os.mkfifo(path / FILE.format(0))


def truncate(path: Path) -> None:
    with (path / FILE.format(0)).open("r+b") as file:
        file.truncate(1000)


def twice(path: Path) -> None:
    text = (path / NAME).read_text()
    (path / NAME).write_text(text.replace('"step": 1', '"step": 1, "step": 1', 1))


def renamed(name: str) -> Callable[[Path], None]:
    return edit(lambda data: data["files"][0].update(file=name))


DAMAGE = {
    "missing file": (lambda p: (p / FILE.format(1)).unlink(), "00001.safetensors: is missing"),
    "flipped bit": (flip, "the SHA-256 of its piece at .* nothing was loaded"),
    "truncated": (truncate, "has 1000 bytes instead of"),
    "swapped files": (swap, "bytes instead of|SHA-256"),
    "symbolic link": (link, "is a symbolic link"),
    "FIFO": (fifo, "is not a regular file"),
    "parent folder": (
        renamed("../moeify-rank-00000.safetensors"),
        "is not the name of a data file",
    ),
    "absolute": (renamed("/etc/passwd"), "is not the name of a data file"),
    "key twice": (twice, "step: appears twice"),
    "changed": (edit(lambda d: d.update(step=9), sign=False), "it was changed"),
    "half a manifest": (
        lambda p: (p / NAME).write_text((p / NAME).read_text()[:999]),
        "is not JSON",
    ),
    "unknown key": (edit(lambda d: d.update(more=1)), "more: "),
    "version": (edit(lambda d: d.update(version=3)), "version: 3 cannot be read"),
    "older version": (edit(lambda d: d.update(version=1)), "version: 1 cannot be read"),
    "no piece": (
        edit(lambda d: d["tensors"]["model.norm.weight"].update(pieces=[])),
        "model.norm.weight: pieces: 0 of 8 elements are there",
    ),
    "overlap": (
        edit(lambda d: d["tensors"]["model.norm.weight"].update(pieces=[first(d)] * 2)),
        "16 of 8 elements",
    ),
    "outside": (edit(lambda d: first(d).update(at=[1])), "is outside"),
    "huge": (
        edit(lambda d: d["tensors"]["model.norm.weight"].update(shape=[2**62])),
        "8 of 4611686018427387904 elements",
    ),
    "behind the end": (edit(lambda d: first(d).update(begin=2**40)), "after the end"),
    "no such file": (edit(lambda d: first(d).update(file=7)), "there is no file number 7"),
    "another place": (edit(lambda d: first(d).update(begin=0)), "share bytes|SHA-256"),
    "dtype": (
        edit(lambda d: d["tensors"]["model.norm.weight"].update(dtype="object")),
        "'object' is unknown",
    ),
    "generator": (
        edit(lambda d: d["tensors"].update({"rng.0.python": d["tensors"].pop("rng.0.numpy")})),
        "rng: python: is not a generator state",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(damage: str, checkpoint: Path, tmp_path: Path) -> None:
    change, message = DAMAGE[damage]
    shutil.copytree(checkpoint / "step-00000001", tmp_path / "step-00000001")
    shutil.copytree(checkpoint / "step-00000001", tmp_path / "step-00000002")
    change(tmp_path / "step-00000002")
    model, optimizer = into()
    before, draw = values(model, optimizer), torch.get_rng_state()
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    with pytest.raises(CheckpointError, match=message):
        load_sharded(model, tmp_path, optimizer=optimizer)
    assert same(values(model, optimizer), before)
    assert torch.equal(torch.get_rng_state(), draw)
    assert options == {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    assert load_sharded(model, tmp_path, optimizer=optimizer, step=1).step == 1
    assert not same(values(model, optimizer), before)


_INTO: list[Any] = []


def into() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model to load into, made once and set back for each test."""
    if not _INTO:
        model, optimizer = trained(7)
        _INTO.append((model, optimizer, values(model, optimizer)))
    model, optimizer, start = _INTO[0]
    with torch.no_grad():
        for tensor, value in zip(live(model, optimizer), start, strict=True):
            tensor.copy_(value)
    return model, optimizer


def live(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    states = [t for state in optimizer.state.values() for t in state.values()]
    return [*model.state_dict().values(), *states]


OTHERS = {
    "experts": ({"experts": 2}, "4 experts in the checkpoint, 2 in the model"),
    "width": ({"hidden": 32}, "hidden width 16 in the checkpoint, 32 in the model"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model(other: str, checkpoint: Path) -> None:
    changes, message = OTHERS[other]
    model, optimizer = trained(1, **changes)
    before = values(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        load_sharded(model, checkpoint, optimizer=optimizer)
    assert same(values(model, optimizer), before)


def test_other_tensors(checkpoint: Path) -> None:
    model = converted(1)
    model.norm.weight = nn.Parameter(torch.ones(9))
    with pytest.raises(CheckpointError, match=r"norm.weight: was saved with shape \[8\], but .*9"):
        load_sharded(model, checkpoint)
    with pytest.raises(CheckpointError, match=r"norm.weight: was saved with shape"):
        load_sharded(model, checkpoint, strict=False)
    model = converted(1)
    model.norm.bias = nn.Parameter(torch.ones(8).bfloat16())
    with pytest.raises(CheckpointError, match=r"norm.bias: was saved as float32.*bfloat16: cast"):
        load_sharded(model, checkpoint)
    model = converted(1)
    model.more = nn.Parameter(torch.ones(2))
    with pytest.raises(CheckpointError, match="more: the model needs it, but it was not saved"):
        load_sharded(model, checkpoint)
    assert load_sharded(model, checkpoint, strict=False).step == 1
    model.norm.bias = None
    del model.more
    with pytest.raises(CheckpointError, match=r"norm.bias: was saved, but the model has no place"):
        load_sharded(model, checkpoint)
    model, optimizer = trained(1)
    mixed = [{"params": [p], "lr": 0.1 * (i + 1)} for i, p in enumerate(model.parameters())]
    mixed = torch.optim.AdamW(mixed)
    load_sharded(model, checkpoint, optimizer=mixed)  # one group each fits, whatever they were
    assert {group["lr"] for group in mixed.param_groups} == {0.01}
    mixed.param_groups[1]["lr"] = 0.5
    for number, (given, message) in enumerate(
        (
            (optimizer, "parameters of group 0 were saved with different lr"),
            (torch.optim.SGD(model.parameters()), "was saved from AdamW, but this is SGD"),
            (torch.optim.AdamW([model.norm.weight]), "is not optimised here"),
        )
    ):
        root = checkpoint.parent / f"groups-{number}"
        save_sharded(model, root, optimizer=mixed)
        before = values(model, given)
        with pytest.raises(CheckpointError, match=message):
            load_sharded(model, root, optimizer=given)
        assert same(values(model, given), before)


class Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {os.environ['MOEIFY_PAYLOAD']}",)


def test_pickles_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    import torch.distributed.checkpoint as dcp

    ran = tmp_path / "ran"
    monkeypatch.setenv("MOEIFY_PAYLOAD", str(ran))
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / ".metadata").write_bytes(pickle.dumps(Payload()))
    model, _ = trained(0)
    for trust, message in ((False, "pickle.*runs any code"), (True, "cannot be read")):
        with pytest.raises(CheckpointError, match=message):
            load_sharded(model, tmp_path / "evil", trust=trust)
        assert ran.exists() == trust
    want = values(model)
    with pytest.warns(UserWarning, match="single process"):
        dcp.save(model.state_dict(), checkpoint_id=tmp_path / "plain")
    other, optimizer = trained(1)
    with pytest.raises(CheckpointError, match="load without optimizer"):
        load_sharded(other, tmp_path / "plain", trust=True, optimizer=optimizer)
    assert load_sharded(other, tmp_path / "plain", trust=True).step == 0
    assert same(values(other), want)


def test_places_that_are_taken(tmp_path: Path) -> None:
    model, optimizer = trained(0)
    (tmp_path / "step-00000001").mkdir()
    (tmp_path / "step-00000001" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not a checkpoint; nothing was changed"):
        save_sharded(model, tmp_path, step=1)
    assert (tmp_path / "step-00000001" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="could not save"):
        save_sharded(model, tmp_path / "file", step=1)
    living = tmp_path / f".step-00000002.staging-{os.getppid()}-00000000"
    dead = tmp_path / ".step-00000002.staging-999999999-00000000"
    for folder in (living, dead):
        folder.mkdir()
    save_sharded(model, tmp_path, optimizer=optimizer, step=2)
    assert living.exists()
    assert not dead.exists()
    assert latest(tmp_path) == tmp_path / "step-00000002"
    for bad in ({"a": {1: 2}}, {"a": float("nan")}, {"a": [torch.ones(1)]}, [1]):
        with pytest.raises(CheckpointError, match="extra"):
            save_sharded(model, tmp_path, step=3, extra=bad)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
