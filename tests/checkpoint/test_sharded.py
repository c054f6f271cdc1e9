"""Sharded checkpoints: saved under one layout, loaded under any other, bit for bit."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import moeify as mf
from moeify.checkpoint.sharded.api import latest, load_sharded, save_sharded
from moeify.checkpoint.sharded.chunks import Pieces, runs_of
from moeify.checkpoint.sharded.convert import to_sharded, to_single
from moeify.checkpoint.sharded.manifest import read
from moeify.distributed.dtensor import whole
from moeify.errors import CheckpointError
from moeify.train.optimizer import optimizer as optimizer_of
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import (
    WIDTH,
    Gated,
    Net,
    batches,
    mean_square,
    plan,
)

BIAS = {"bias_update": 0.01}
COUNT = 8


class Wide(Net):
    """With a dense MLP that tensor ranks slice, a gate with a bias, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.c = Gated()
        self.out = nn.Linear(WIDTH, WIDTH)
        self.again = nn.Linear(WIDTH, WIDTH, bias=False)
        self.again.weight = self.out.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = super().forward(x)
        return self.again(self.out(x + self.c(x)))


def build(**changes: Any) -> nn.Module:
    torch.manual_seed(3)
    zero = changes.pop("zero", None)
    made = plan(router=BIAS, **changes)
    made["layers"] = [{"select": {"first": 2}, "experts": 8, "top_k": 2}]
    if zero is not None:
        made["zero"] = zero
    return mf.moeify(Wide(), made, example_inputs=torch.ones(4, WIDTH)).train()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    """Two groups, so that hyperparameters are matched by name."""
    named = dict(model.named_parameters())
    small = [p for n, p in named.items() if n.endswith("bias")]
    large = [p for n, p in named.items() if not n.endswith("bias")]
    groups = [{"params": large, "weight_decay": 0.1}, {"params": small, "lr": 0.003}]
    return optimizer_of(model, torch.optim.AdamW, groups, lr=0.01, foreach=False)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    place: int,
    dp: int,
    dtype: torch.dtype = torch.float32,
) -> None:
    for number in range(steps):
        optimizer.zero_grad()
        x = torch.cat(batches((COUNT,) * (number + 1))[-1:])
        mine = x.view(dp, COUNT // dp, WIDTH)[place].to(dtype)
        (mean_square(model(mine)) + mf.aux_loss(model)).backward()
        optimizer.step()


def everything(
    model: nn.Module, optimizer: torch.optim.Optimizer, *, masters: bool = False
) -> dict[str, torch.Tensor]:
    """All tensors, gathered."""
    found = {name: whole(t.detach()).clone() for name, t in model.named_parameters()}
    found |= {name: t.clone() for name, t in model.named_buffers()}
    inner = getattr(optimizer, "inner", optimizer)
    for name, parameter in model.named_parameters():
        held = optimizer.shard_of(parameter) if hasattr(optimizer, "shard_of") else parameter
        if masters:
            found[name] = whole(held.detach()).clone()
        for key, value in inner.state[held].items():
            found[f"{name}/{key}"] = whole(value).clone()
    return found


def differ(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    odd = sorted(got.keys() ^ want.keys())
    return odd + [n for n in got.keys() & want.keys() if not torch.equal(got[n], want[n])]


def reference(root: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Train in one process, save, train on; return both states."""
    model = build()
    optimizer = adam(model)
    train(model, optimizer, 2, 0, 1)
    before = everything(model, optimizer)
    save_sharded(model, root, optimizer=optimizer, step=1, extra={"lr": [0.1, None]})
    train(model, optimizer, 2, 0, 1)
    return before, everything(model, optimizer)


def chain(
    rank: int,
    root: Path,
    layouts: list[tuple[int, dict[str, Any]]],
    before: dict[str, torch.Tensor],
    after: dict[str, torch.Tensor],
) -> list[str]:
    """Load under each layout what the one before it has saved; train on; return what differs."""
    wrong = []
    for step, layout in layouts:
        model = build(**layout)
        optimizer = adam(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # nothing may be right by chance
        loaded = load_sharded(model, root, optimizer=optimizer)
        assert (loaded.step, loaded.extra) == (step - 1, {"lr": [0.1, None]})
        wrong += [f"{layout}: {name}" for name in differ(everything(model, optimizer), before)]
        groups = optimizer.param_groups
        assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.01, 0.1), (0.003, 0.01)]
        save_sharded(model, root, optimizer=optimizer, step=step, extra=loaded.extra)
        dp = dist.get_world_size() // layout.get("tensor", 1)
        train(model, optimizer, 2, rank // layout.get("tensor", 1), dp)
        for name, got in everything(model, optimizer).items():
            gap = float((got - after[name]).abs().max())
            if not gap <= 2e-5 * max(1.0, float(after[name].abs().max())):
                wrong.append(f"{layout}: two steps later: {name}: {gap:.1e}")
    return wrong


SLICED = {"tensor": 2, "experts_in_tp": "slice"}
FOUR: list[dict[str, Any]] = [
    {"expert": 2, **SLICED},
    {"expert": 2, "zero": {"stage": 3}},
    {"expert": 2, "tensor": 2, "zero": {"stage": 2}},
    {"zero": {"stage": 3}, **SLICED},
    {"expert": 4, "zero": {"stage": 1}},
]
TWO: list[dict[str, Any]] = [{"expert": 2}, {"zero": {"stage": 3}}, SLICED, {}]


def test_every_layout_reads_what_every_other_wrote(tmp_path: Path) -> None:
    before, after = reference(tmp_path)
    four = list(enumerate(FOUR, 2))
    assert run_ranks(chain, 4, tmp_path, four, before, after) == [[]] * 4
    two = list(enumerate(TWO, 2 + len(FOUR)))
    assert run_ranks(chain, 2, tmp_path, two, before, after) == [[]] * 2
    model = build()
    optimizer = adam(model)
    load_sharded(model, tmp_path, optimizer=optimizer)
    assert not differ(everything(model, optimizer), before)
    train(model, optimizer, 2, 0, 1)
    assert not differ(everything(model, optimizer), after)
    written = {p.name for p in (tmp_path / "step-00000002").iterdir()}
    assert len(written) == 5, written  # each rank a part, and the manifest


MIXED: list[dict[str, Any]] = [
    {"stage": 1, "precision": "bf16"},
    {"stage": 3, "precision": "bf16"},
    {"stage": 1, "precision": "bf16", "offload": "optimizer"},
    {"stage": 0, "precision": "bf16"},
]


def masters(rank: int, root: Path) -> list[str]:
    """The float32 weights are what is kept, wherever they are."""
    wrong: list[str] = []
    want: dict[str, torch.Tensor] = {}
    for step, zero in enumerate(MIXED):
        model = build(expert=2, zero=zero)
        optimizer = adam(model)
        if want:
            load_sharded(model, root, optimizer=optimizer)
            got = everything(model, optimizer, masters=True)
            wrong += [f"{zero}: {name}" for name in differ(got, want)]
        train(model, optimizer, 1, rank, 2, torch.bfloat16)
        if step == 0:  # noticed before the next step
            with torch.no_grad():
                model.get_parameter("norm.weight").fill_(3.0)
        save_sharded(model, root, optimizer=optimizer, step=step)
        want = everything(model, optimizer, masters=True)
        if step == 0 and not bool((want["norm.weight"] == 3).all()):
            wrong.append("what was written into a parameter was not saved")
    return wrong


def test_master_weights(tmp_path: Path) -> None:
    assert run_ranks(masters, 2, tmp_path) == [[]] * 2


def several(rank: int, root: Path) -> list[Any]:
    """What two ranks do beside resharding; return what they draw after loading."""
    model = build(expert=2)
    optimizer = adam(model)
    train(model, optimizer, 1, rank, 2)
    torch.manual_seed(rank)
    random.seed(rank)
    saving = save_sharded(model, root / "async", optimizer=optimizer, step=5, asynchronous=True)
    before = everything(model, optimizer)
    drawn = [torch.rand(3).tolist(), random.random()]
    train(model, optimizer, 3, rank, 2)  # collectives next to those of the save
    assert saving.wait().name == "step-00000005"
    assert saving.done
    # One comes while another is under way, and the end of the process waits for the last.
    first = save_sharded(model, root / "async", step=6, asynchronous=True)
    save_sharded(model, root / "async", step=7, extra={"rank": rank})
    assert first.done
    load_sharded(model, root / "async", optimizer=optimizer, step=5)
    assert not differ(everything(model, optimizer), before)
    assert [torch.rand(3).tolist(), random.random()] == drawn
    assert load_sharded(model, root / "async").extra == {"rank": 0}
    lone = torch.optim.AdamW(model.parameters())
    if rank:  # it alone has seen a gradient
        model.norm.weight.grad = torch.ones(WIDTH)
        lone.step()
    for what, arguments in (
        ("extra.a: a set", {"extra": {"a": {1}} if rank else {}}),  # on one rank alone
        ("step: -1", {"step": -1 if rank else 1}),
        (r"on the folder \(rank 0: .*-00000000; rank 1: .*-00000001\); save to ", {"step": rank}),
        (r"disagree on optimizer.* \(rank 0: nothing; rank 1: \[", {"optimizer": lone}),
    ):
        with pytest.raises(CheckpointError, match=what):
            save_sharded(model, root / "bad", **arguments)
    assert not (root / "bad").exists()
    for made, what in (
        ({"expert": 2, "top_k": 1}, "a: top_k 2 in the checkpoint, 1 in the model"),
        ({"expert": 2, "node": {"router": {}}}, "was saved under another plan: "),
    ):
        torch.manual_seed(3)
        other = mf.moeify(Wide(), changed(made), example_inputs=torch.ones(4, WIDTH))
        kept = {n: t.clone() for n, t in other.state_dict().items()}
        with pytest.raises(CheckpointError, match=what):
            load_sharded(other, root / "async")
        now = other.state_dict()
        assert not differ(*({n: whole(t) for n, t in d.items()} for d in (now, kept)))
    load_sharded(other, root / "async", strict=False)
    return drawn


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    other = changes.pop("node", None) is not None
    top_k = changes.pop("top_k", 2)
    made = plan(router=BIAS, **changes)
    made["layers"] = [{"select": {"first": 2}, "experts": 8, "top_k": top_k}]
    if other:
        made["router"]["z_loss"] = 0.5
    return made


def derived(rank: int, root: Path) -> Any:
    load_sharded(build(), root / "async", step=5)
    return [torch.rand(3).tolist(), random.random()]


def test_generators_asynchronous_saves_and_refusals(tmp_path: Path) -> None:
    drawn = run_ranks(several, 2, tmp_path)
    assert drawn[0] != drawn[1]
    again = run_ranks(derived, 3, tmp_path)
    assert again[:2] == drawn
    assert again[2] not in drawn
    assert again == run_ranks(derived, 3, tmp_path)
    assert [p.name for p in sorted((tmp_path / "async").iterdir())] == [
        f"step-0000000{n}" for n in (5, 6, 7)
    ]


class Cut:
    """A placement as torch has it, for one dimension."""

    dim = 0

    def __init__(self, split_factor: int = 1) -> None:
        self.split_factor = split_factor

    def is_partial(self) -> bool:
        return False

    def is_replicate(self) -> bool:
        return False


@pytest.mark.parametrize("size", [8, 12, 7, 1, 3])
@pytest.mark.parametrize("kind", ["shard", "nested", "fsdp", "halves", "fsdp of halves"])
def test_indices_of_a_rank(kind: str, size: int) -> None:
    """Against what is cut from a row of numbers, in the order in which it is cut."""
    if "halves" in kind:
        size *= 2
    row = torch.arange(size)
    seen = []
    for outer in range(2):
        for inner in range(3):
            if kind == "shard":
                cuts, held = [(Cut(), 3, inner)], chunk(row, 3, inner)
            elif kind == "nested":
                cuts = [(Cut(), 2, outer), (Cut(), 3, inner)]
                held = chunk(chunk(row, 2, outer), 3, inner)
            elif kind == "fsdp":
                cuts = [(Cut(3), 2, outer), (Cut(), 3, inner)]
                held = chunk(chunk(row, 3, inner), 2, outer)
            else:
                held = torch.cat([chunk(half, 3, inner) for half in row.chunk(2)])
                cuts = [(Cut(2), 3, inner)]
                if kind == "fsdp of halves":
                    held = chunk(held, 2, outer)
                    cuts.insert(0, (Cut(3), 2, outer))
            runs = runs_of(size, 0, cuts, "x")
            assert [i for first, n in runs for i in range(first, first + n)] == held.tolist()
            seen += held.tolist()
    assert set(seen) == set(range(size))
    with pytest.raises(CheckpointError, match="does not support this layout"):
        runs_of(size, 0, [(Cut(5), 2, 0), (Cut(), 3, 0)], "x")


def chunk(row: torch.Tensor, count: int, index: int) -> torch.Tensor:
    each = -(-len(row) // count)
    return row[index * each : (index + 1) * each]


def test_single_folders_and_back(tmp_path: Path) -> None:
    model = build().eval()
    x = torch.randn(5, WIDTH)
    mf.save(model, tmp_path / "single")
    path = to_sharded(tmp_path / "single", tmp_path / "sharded", step=3)
    assert latest(tmp_path / "sharded") == path
    outputs = run_ranks(converted, 2, tmp_path, x)
    want = model(x)
    for got in outputs:
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    for source in ("sharded", "two"):
        to_single(tmp_path / source, tmp_path / f"{source}-single", model=Wide())
        again = mf.load(tmp_path / f"{source}-single", model=Wide()).eval()
        assert torch.equal(again(x), want)
        assert [n for n, _ in again.named_parameters()] == [n for n, _ in model.named_parameters()]
    with pytest.raises(CheckpointError, match=r"written by mf.save"):
        load_sharded(model, tmp_path / "single")
    with pytest.raises(CheckpointError, match="exists already"):
        to_sharded(tmp_path / "single", tmp_path / "sharded", step=3)


def converted(rank: int, root: Path, x: torch.Tensor) -> torch.Tensor:
    model = build(**SLICED).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert load_sharded(model, root / "sharded").step == 3
    save_sharded(model, root / "two", optimizer=adam(model))
    return model(x).detach()


def test_state_of_other_optimizers(tmp_path: Path) -> None:
    for number, make in enumerate(
        (
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
            lambda p: torch.optim.Adafactor(p, lr=0.1),
            lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), capturable=False),
        )
    ):
        model = build()
        model.out.weight.requires_grad_(False)
        optimizer = make(model.parameters())
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        train(model, optimizer, 1, 0, 1)
        scheduler.step()
        saved = {k: v.clone() for k, v in model.state_dict().items()}
        states = [dict(optimizer.state[p]) for p in model.parameters()]
        extra = {"scheduler": scheduler.state_dict()} if number < 2 else {}
        root = tmp_path / str(number)
        save_sharded(model, root, optimizer=optimizer, step=1, extra=extra)
        fresh = build()
        other = make(fresh.parameters())
        loaded = load_sharded(fresh, root, optimizer=other)
        assert loaded.extra == extra
        assert all(torch.equal(v, saved[k]) for k, v in fresh.state_dict().items())
        assert float(other.param_groups[0]["lr"]) == float(optimizer.param_groups[0]["lr"])
        for mine, parameter in zip(states, fresh.parameters(), strict=True):
            got = other.state.get(parameter, {})
            assert mine.keys() == got.keys()
            assert all(torch.equal(torch.as_tensor(mine[k]), torch.as_tensor(got[k])) for k in mine)
        with pytest.raises(CheckpointError, match="optimizer: was saved from"):
            load_sharded(fresh, root, optimizer=torch.optim.Adagrad(fresh.parameters()))


def test_pieces_and_manifest_of_one_process(tmp_path: Path) -> None:
    from moeify.storage.atomic_folder import Folder

    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        load_sharded(build(), tmp_path)
    path = save_sharded(build(), tmp_path, step=12)
    (tmp_path / "step-00000013").mkdir()  # of somebody else
    assert latest(str(tmp_path)) == path
    with Folder(path) as folder:
        manifest = read(folder)
    assert manifest.aliases == {"again.weight": "out.weight"}
    assert [layer.plan.experts for layer in manifest.layers] == [8, 8]
    assert manifest.tensors["model.a.router.selection_bias"].role == "buffer"
    with pytest.raises(CheckpointError, match="no checkpoint of step 3, only of 12"):
        load_sharded(build(), tmp_path, step=3)
    whole_piece = Pieces.of(torch.zeros(2, 3), "x")
    assert [part.at for part in whole_piece.parts] == [(0, 0)]
    assert Pieces.of(torch.zeros(0, 3), "x").parts == ()
    with pytest.raises(CheckpointError, match="is on meta"):
        Pieces.of(torch.zeros(2, device="meta"), "x")
