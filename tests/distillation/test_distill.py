"""Distillation: the loss by hand, schedules at their edges, any loop, `Trainer`, and the cache."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import moeify as mf
from moeify.distillation.divergence import distillation, top_k
from moeify.distillation.teacher_cache import CacheMissError, TeacherCache
from moeify.plan.student import DistillSpec
from moeify.sites.record import routers_of
from tests.zoo_models import ZOO

PLAN = {
    "layers": [{"select": "all", "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None, "aux_loss": 0.5, "bias_update": 0.01},
    "init": {"router_std": 0.3},
}
IGNORE = -100


def by_hand(student, teacher, labels, alpha=1.0, temperature=1.0):
    """CE + alpha T^2 KL, means over the labels that count; logits are flat."""
    log_q, log_p = (x.div(temperature).log_softmax(-1) for x in (student, teacher))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[labels != IGNORE].mean()
    return F.cross_entropy(student, labels) + alpha * temperature**2 * kl


def drawn(*shape: int, vocab: int = 37, dtype=torch.float64):
    student = torch.randn(*shape, vocab, dtype=dtype, requires_grad=True)
    return student, torch.randn(*shape, vocab, dtype=dtype), torch.randint(vocab, shape)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_is_the_definition(masked, temperature):
    student, teacher, labels = drawn(3, 7)
    if masked:
        labels[1, 2:] = IGNORE
        labels[2] = IGNORE
    teacher.requires_grad_()
    loss = mf.DistillationLoss(0.7, temperature)(student, teacher, labels)
    got = torch.autograd.grad(loss, student, retain_graph=True)[0]
    flat = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    want = by_hand(*flat, 0.7, temperature)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    want = torch.autograd.grad(want, student)[0]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
    again = torch.autograd.grad(loss, student)[0]  # a second backward of one graph
    assert torch.equal(again, got)
    assert torch.autograd.grad(
        mf.DistillationLoss()(student, teacher, labels), teacher, allow_unused=True
    ) == (None,)
    if not masked:
        assert torch.autograd.gradcheck(
            lambda x: mf.DistillationLoss(0.7, temperature)(x, teacher[:2], labels[:2]),
            (student[:2].detach().requires_grad_(),),
        )


def test_chunks_dtypes_and_no_labels():
    student, teacher, labels = drawn(11)
    labels[3] = IGNORE
    options = {"alpha": 1.0, "temperature": 2.0, "vocab": 37}
    scale = torch.tensor(0.1, dtype=torch.float64)
    found = []
    for chunk in (1, 37 * 4, 1 << 20):
        sums = distillation(student, teacher, labels, scale, **options, chunk=chunk)
        found.append((sums.loss, torch.autograd.grad(sums.loss, student)[0]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-15)
    half = student.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = mf.DistillationLoss(shift=False)(half, teacher.float(), labels)
    want = by_hand(half.detach().double(), teacher.float().double(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), want, rtol=1e-6, atol=0)
    loss.backward()
    assert half.grad.dtype == torch.bfloat16
    nothing = mf.DistillationLoss(shift=False)(student, teacher, torch.full_like(labels, IGNORE))
    assert nothing == 0
    assert not torch.autograd.grad(nothing, student)[0].any()
    teacher[:, 5] = -torch.inf  # a word that is switched off
    loss = mf.DistillationLoss(shift=False)(student, teacher, labels)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, student)[0]).all()


class Wide(TorchDispatchMode):
    """Counts the float32 tensors of some size that ops make."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.found = size, []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(out):
            wide = isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32
            if wide and leaf.numel() >= self.size:
                self.found.append(str(op))
        return out


def test_nothing_wide_is_made_whole():
    student, teacher, labels = drawn(64, dtype=torch.bfloat16)
    options = {"alpha": 1.0, "temperature": 2.0, "vocab": 37, "chunk": 37 * 8}
    for target in (teacher, top_k(teacher, 5, 2.0)):
        with Wide(37 * 9) as wide:
            distillation(student, target, labels, torch.ones(()), **options).loss.backward()
        assert wide.found == []
    with Wide(37 * 8) as wide:
        distillation(student, teacher, labels, torch.ones(()), **options).loss.backward()
    assert wide.found  # chunks there are


def test_top_k_lumps_the_rest():
    student, teacher, labels = drawn(9, vocab=12)
    labels[2] = IGNORE
    loss = mf.DistillationLoss(0.5, 2.0, shift=False)
    kept = top_k(teacher, 4, 2.0)
    got = loss(student, kept, labels)
    log_p, log_q = (x.div(2).log_softmax(1) for x in (teacher, student))
    chosen = log_p.topk(4, 1).indices
    p, q = log_p.exp().gather(1, chosen), log_q.exp().gather(1, chosen)
    r, s = 1 - p.sum(1), 1 - q.sum(1)
    kl = (p * (p.log() - q.log())).sum(1) + r * (r.log() - s.log())
    want = F.cross_entropy(student, labels) + 0.5 * 4 * kl[labels != IGNORE].mean()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, student)[0] for x in (got, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)
    whole = loss(student, teacher, labels)
    assert got < whole
    all_of_it = loss(student, top_k(teacher, 12, 2.0), labels)
    pairs = [torch.autograd.grad(x, student)[0] for x in (all_of_it, whole)]
    torch.testing.assert_close(all_of_it, whole, rtol=1e-12, atol=0)
    torch.testing.assert_close(*pairs, rtol=0, atol=1e-14)


def test_padded_vocabularies():
    student, teacher, labels = drawn(6, vocab=104)
    shared = mf.DistillationLoss(shift=False)
    got = shared(student, teacher[:, :100], labels.clamp_max(99))
    want = F.cross_entropy(student, labels.clamp_max(99))
    want = want + by_hand(student[:, :100], teacher[:, :100], labels.clamp_max(99))
    want = want - F.cross_entropy(student[:, :100], labels.clamp_max(99))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(x, student)[0] for x in (got, want)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)
    with pytest.raises(mf.MoeifyError, match=r"104 words and the teacher 50.*vocab="):
        shared(student, teacher[:, :50], labels)
    known = mf.DistillationLoss(shift=False, vocab=50)
    assert torch.isfinite(known(student, teacher[:, :50], labels))
    with pytest.raises(mf.MoeifyError, match="keep them with vocab=100"):
        shared(student[:, :100], top_k(teacher, 4, 1.0), labels.clamp_max(99))
    with pytest.raises(mf.MoeifyError, match="other positions"):
        shared(student, teacher[:3], labels)

    class Words:
        def __init__(self, *words: str) -> None:
            self.words = words

        def get_vocab(self) -> dict[str, int]:
            return {word: i for i, word in enumerate(self.words)}

    pair = nn.Embedding(8, 8), nn.Embedding(8, 8)
    kd = mf.distill(*pair, tokenizers=(Words("a", "b"), Words("a", "b", "c")))
    assert kd.loss.vocab == 2
    with pytest.raises(mf.MoeifyError, match="'b' as word 1 and the teacher's 'x'"):
        mf.distill(*pair, tokenizers=(Words("a", "b"), Words("a", "x")))


def test_schedules_at_their_edges():
    staged = mf.AlphaSchedule("staged", alpha=2.0, stop=3)
    assert [staged(s) for s in range(5)] == [2, 2, 2, 0, 0]
    share = mf.AlphaSchedule("staged", stop=0.1, total=30)
    assert [share(s) for s in (2, 3)] == [1, 0]
    odd = mf.AlphaSchedule("staged", stop=0.5, total=7)  # 3.5: step 3 is before it
    assert [odd(s) for s in (3, 4)] == [1, 0]
    linear = mf.AlphaSchedule("linear", alpha=2.0, stop=1.0, total=4)
    assert [linear(s) for s in range(6)] == [2, 1.5, 1, 0.5, 0, 0]
    cosine = mf.AlphaSchedule("cosine", alpha=2.0, stop=4)
    want = [1 + math.cos(math.pi * s / 4) for s in range(4)]
    assert [cosine(s) for s in range(6)] == pytest.approx([*want, 0, 0], abs=1e-15)
    assert cosine(4) == 0
    assert mf.AlphaSchedule(alpha=0.3)(10**9) == 0.3
    for options, why in (
        ({"kind": "step"}, "unknown"),
        ({"stop": 0}, "neither"),
        ({"stop": 1.5}, "neither"),
        ({"alpha": math.nan}, "not a number"),
        ({"patience": 0}, "at least 1"),
        ({"baseline": {1: math.inf}}, "finite"),
    ):
        with pytest.raises(mf.PlanError, match=why):
            mf.AlphaSchedule(**options)
    with pytest.raises(mf.PlanError, match="length is not known"):
        mf.AlphaSchedule("staged", stop=0.5)(0)
    student, teacher, labels = drawn(4)
    with pytest.raises(mf.MoeifyError, match="step="):
        mf.DistillationLoss(schedule=staged, shift=False)(student, teacher, labels)


def test_ahead_stops_when_it_no_longer_helps():
    made = lambda: mf.AlphaSchedule("ahead", alpha=2.0, patience=2)  # noqa: E731
    plain = made()
    goes = [plain.observe(10 * i, v) for i, v in enumerate((3, 2, 2.1, 1.9, 1.9, 2.5, 1.0))]
    assert goes == [True, True, True, True, True, False, False]
    assert plain.stopped_at == 50
    assert plain(60) == 0
    broken = made()
    assert [broken.observe(i, math.nan) for i in range(2)] == [True, False]
    behind = mf.AlphaSchedule("ahead", patience=1, baseline={10: 3.0, 20: 2.0})
    assert behind.observe(5, 9.0)  # the curve does not reach: an improvement on nothing
    assert behind.observe(15, 2.4)  # 2.5 there
    assert behind(16) == 1
    assert not behind.observe(20, 2.0)  # better than its own, not than the reference
    first, second = made(), made()
    for i, value in enumerate((3.0, 3.5)):
        first.observe(i, value)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.observe(1, 9.9)  # recorded already
    assert not second.observe(2, 3.5)
    with pytest.raises(mf.CheckpointError, match="'ahead' and this one 'constant'"):
        mf.AlphaSchedule().load_state_dict(first.state_dict())
    with pytest.raises(mf.CheckpointError, match="damaged"):
        made().load_state_dict({"kind": "ahead"})


def llama(seed: int = 0, plan: Any = None) -> nn.Module:
    torch.manual_seed(seed)
    model = ZOO["llama"].build()
    return mf.moeify(model, plan, verify=False) if plan else model


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    return llama(1, PLAN).train()


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    tokens = torch.randint(3, 98, (rows, 12), generator=torch.Generator().manual_seed(1))
    labels = tokens.clone()
    labels[1, :5] = IGNORE
    labels[4:, 3:] = IGNORE
    return {"input_ids": tokens, "labels": labels}


def test_a_plain_loop(teacher):
    """Router losses once, of the student; the teacher is as if it had not run."""
    data = batch()
    teacher(**data).loss.backward()
    before = copy.deepcopy(teacher.state_dict())
    stats = mf.router_stats(teacher)
    aux, modes = mf.aux_loss(teacher), [m.training for m in teacher.modules()]
    teacher.zero_grad()
    student = llama(0, PLAN).train()
    kd = mf.distill(student, teacher, alpha=0.5, temperature=2.0, schedule="staged", stop=2)
    assert kd.loss.shift
    loss = kd(data)
    want_router = mf.aux_loss(student)
    logits = student(input_ids=data["input_ids"]).logits
    with torch.no_grad():
        theirs = copy.deepcopy(teacher).eval()(input_ids=data["input_ids"]).logits
    flat = [x[:, :-1].flatten(0, 1) for x in (logits, theirs)]
    want = by_hand(*flat, data["labels"][:, 1:].flatten(), 0.5, 2.0) + want_router
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=0)
    assert want_router > 0.1
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.requires_grad for p in teacher.parameters())
    assert [m.training for m in teacher.modules()] == modes
    assert mf.aux_loss(teacher) is aux or torch.equal(mf.aux_loss(teacher), aux)
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, layer in mf.router_stats(teacher).items():
        assert torch.equal(layer["counts"], stats[name]["counts"])
    for _, router in routers_of(student):
        assert float(router.weight.grad.abs().sum()) > 0
    assert kd.last["kd"] > 0
    calls = []
    hook = teacher.register_forward_hook(lambda *_: calls.append(1))
    assert [kd(data) is not None and kd.last["alpha"] for _ in range(3)] == [0.5, 0, 0]
    assert len(calls) == 1  # it does not run where alpha is 0
    hook.remove()
    assert kd.calls == 4
    student.eval()
    plain = student(**data).loss
    torch.testing.assert_close(kd(data), plain, rtol=1e-5, atol=0)
    assert kd.calls == 4
    state = json.loads(json.dumps(kd.state_dict()))
    other = mf.distill(student, teacher, schedule="staged", stop=2)
    other.load_state_dict(state)
    assert other.calls == 4


def test_other_models_and_what_does_not_fit(teacher):
    """Widths, dtypes, kinds: masked words, pairs, and a model of one's own classes."""
    data = batch()
    wide = ZOO["gpt2"].build().bfloat16()
    student = llama().train()
    assert torch.isfinite(mf.distill(student, wide)(data))
    bert, big = ZOO["bert"].build().train(), ZOO["bert"].build()
    kd = mf.distill(bert, big)
    assert not kd.loss.shift
    bert.eval()
    torch.testing.assert_close(kd(data), bert(**data).loss, rtol=1e-5, atol=0)
    assert torch.isfinite(mf.distill(bert.train(), big)(data))
    t5 = ZOO["t5"].build().eval()
    torch.testing.assert_close(
        mf.distill(t5, ZOO["t5"].build())(data), t5(**data).loss, rtol=1e-5, atol=0
    )
    own = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 20))
    x = torch.randint(20, (2, 5))
    kd = mf.distill(own, copy.deepcopy(own), accumulate=2, schedule="linear", stop=2)
    alphas = []
    for _ in range(5):
        loss = kd((x, x))
        torch.testing.assert_close(loss, F.cross_entropy(own(x).flatten(0, 1), x.flatten()))
        alphas.append(kd.last["alpha"])
    assert alphas == [1, 1, 0.5, 0.5, 0]
    parts = [kd((x[i : i + 1], x[i : i + 1]), step=0, num_items=10) for i in range(2)]
    torch.testing.assert_close(sum(parts), kd((x, x), step=0))
    for make, why in (
        (lambda: mf.distill(own, own), "one model"),
        (lambda: mf.distill(own, None), "neither a teacher nor a cache"),
        (lambda: mf.distill(student, wide)({"input_ids": x}), "no labels"),
        (lambda: mf.distill(own, nn.Embedding(99, 99))((x, x)), "more than padding"),
        (lambda: mf.distill(own, wide, temperature=0.0), "not positive"),
        (lambda: mf.distill(own, wide, spec={"alpa": 1}), "alpa"),
    ):
        with pytest.raises(mf.MoeifyError, match=why):
            make()
    spec = DistillSpec(alpha=0.25, temperature=3.0, schedule="staged", stop=0.5, top_k=4)
    kd = mf.distill(own, wide, spec=spec, steps=10)
    assert [kd.schedule(4), kd.schedule(5), kd.loss.temperature] == [0.25, 0, 3]
    assert mf.distill(own, wide, spec=spec, alpha=0.5, steps=10).schedule(0) == 0.5


def test_compiled_student(teacher):
    data = batch()
    student = llama(0, PLAN).train()
    eager = mf.distill(student, teacher)(data)
    torch._dynamo.reset()
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    kd = mf.distill(compiled, teacher)
    for _ in range(2):
        loss = kd({**data, "use_cache": False})
        loss.backward()
    # the bias has moved on in between; nothing else has
    torch.testing.assert_close(loss, eager, rtol=2e-2, atol=0)


def test_cache(tmp_path, teacher):
    data, folder = batch(6), tmp_path / "cache"
    make = lambda rows: {name: value[rows] for name, value in data.items()}  # noqa: E731
    student = llama().train()
    live = mf.distill(student, teacher, temperature=2.0)
    options = {"top_k": 99, "temperature": 2.0}
    with TeacherCache(folder, **options, shard_bytes=20_000) as cache:
        kd = mf.distill(student, teacher, temperature=2.0, cache=cache)
        kd(make(slice(0, 3)))
        assert kd.fill([make(slice(2, 5))]) == cache.nbytes > 0
        torch.testing.assert_close(kd(make([4, 0])), live(make([4, 0])), rtol=1e-5, atol=0)
    names = sorted(path.name for path in folder.iterdir())
    assert names[:2] == ["teacher-00001.safetensors", "teacher-00002.safetensors"]
    assert not [name for name in names if name.endswith(".new")]
    assert sum((folder / name).stat().st_size for name in names[:2]) == cache.nbytes

    again = TeacherCache(folder, **options)
    again.verify()
    assert again.rows == 5
    kd = mf.distill(student, None, temperature=2.0, cache=again)
    got, want = kd(make([3, 1])), live(make([3, 1]))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    with pytest.raises(CacheMissError, match="1 of 2 rows"):
        kd(make([3, 5]))
    masked = {**make([3, 1]), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    with pytest.raises(CacheMissError):  # other inputs, other logits
        kd(masked)
    for other, why in (
        (lambda: TeacherCache(folder, top_k=8, temperature=2.0), "is a cache of"),
        (lambda: TeacherCache(folder, top_k=99), "is a cache of"),
        (lambda: mf.distill(student, teacher, cache=again), "at temperature 2.0"),
        (
            lambda: mf.distill(student, llama(5), temperature=2.0, cache=again),
            "other weights",
        ),
        (lambda: TeacherCache(tmp_path), "is not a cache"),
    ):
        with pytest.raises(mf.MoeifyError, match=why):
            other()

    few = mf.distill(student, teacher, temperature=2.0, cache=tmp_path / "few", top_k=8)
    lower, whole = few(make([0, 1])), live(make([0, 1]))
    assert lower < whole
    all_logits = mf.distill(student, teacher, temperature=2.0, cache=tmp_path / "all")
    torch.testing.assert_close(all_logits(make([0, 1])), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(all_logits(make([0, 1])), whole, rtol=1e-6, atol=0)
    rival = TeacherCache(tmp_path / "few", top_k=8, temperature=2.0)
    with pytest.raises(mf.CheckpointError, match="another process writes"):
        mf.distill(student, teacher, temperature=2.0, cache=rival)(make([2]))


def test_cache_after_a_crash_and_damage(tmp_path, teacher, monkeypatch):
    data, folder = batch(4), tmp_path / "cache"
    make = lambda rows: {name: value[rows] for name, value in data.items()}  # noqa: E731
    student = llama().train()
    cache = TeacherCache(folder, top_k=8)
    kd = mf.distill(student, teacher, cache=cache)
    kd.fill([make([0, 1])])
    from moeify.distillation import store

    replace = store.replace_file

    def dies(path, content):  # between a shard and its manifest
        if path.name == store.MANIFEST:
            raise OSError("the power is gone")
        replace(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(store, "replace_file", dies)
        with pytest.raises(mf.CheckpointError, match="the power is gone"):
            kd.fill([make([2, 3])])
    left = TeacherCache(folder, top_k=8)  # what another process would find
    assert left.rows == 2
    kd(make([2, 3]))
    cache.close()
    with TeacherCache(folder, top_k=8) as whole:
        assert whole.rows == 4
        whole.verify()
        mf.distill(student, None, cache=whole)(make([3, 0]))
    shard = folder / "teacher-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    at = raw.index(b'"00001.log_probs"')
    head = 8 + int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8:head])["00001.log_probs"]["data_offsets"][0]
    assert at < head
    raw[head + begin + 3] ^= 0x40
    shard.write_bytes(raw)
    damaged = TeacherCache(folder, top_k=8)
    with pytest.raises(mf.CheckpointError, match="not hold probabilities"):
        mf.distill(student, None, cache=damaged)(make([0, 1]))
    with pytest.raises(mf.CheckpointError, match="SHA-256"):
        damaged.verify()
    shard.write_bytes(raw[:-1])
    with pytest.raises(mf.CheckpointError, match="truncated"):
        TeacherCache(folder, top_k=8)
    (folder / "teacher_cache.json").write_text('{"format": "pickle"}')
    with pytest.raises(mf.CheckpointError, match="not a manifest"):
        TeacherCache(folder, top_k=8)


def trained(folder, kd, *callbacks, **options):
    from transformers import TrainingArguments

    data = batch(8)
    rows = [{name: value[i] for name, value in data.items()} for i in range(8)]
    arguments = TrainingArguments(
        str(folder),
        **{"per_device_train_batch_size": 8, "max_steps": 4, "logging_steps": 1} | options,
        use_cpu=True,
        optim="sgd",
        learning_rate=1e-12,
        max_grad_norm=0.0,
        save_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )
    run = mf.DistillationTrainer(
        kd.student,
        arguments,
        distiller=kd,
        train_dataset=rows,
        eval_dataset=rows[:4],
        callbacks=list(callbacks),
    )
    run._get_train_sampler = lambda *_: None  # in order
    run.train()
    return run


@pytest.mark.parametrize("loss_kwargs", [True, False])
def test_trainer(tmp_path, teacher, loss_kwargs):
    """Staged over the run; one micro-batch or four, the same loss up to the routers' own means."""
    z_loss = 0.01 if loss_kwargs else 0.0
    plan = {**PLAN, "router": {"capacity_factor": None, "aux_loss": 0.0, "z_loss": z_loss}}
    logs = []
    for parts in (1, 4):
        student = llama(0, plan)
        student.accepts_loss_kwargs = loss_kwargs
        kd = mf.distill(student, teacher, schedule="staged", stop=0.5)
        run = trained(
            tmp_path,
            kd,
            gradient_accumulation_steps=parts,
            per_device_train_batch_size=8 // parts,
            eval_strategy="steps",
            eval_steps=4,
        )
        logs.append([entry for entry in run.state.log_history if "loss" in entry])
        evaluated = next(e["eval_loss"] for e in run.state.log_history if "eval_loss" in e)
        with torch.no_grad():
            half = {name: value[:4] for name, value in batch(8).items()}
            assert evaluated == pytest.approx(float(student.eval()(**half).loss), rel=1e-5)
    assert [entry["alpha"] for entry in logs[0]] == [1, 1, 0, 0]
    for one, four in zip(*logs, strict=True):
        for key in ("ce", "kd", "loss", "grad_norm"):
            if not z_loss or key != "grad_norm":  # a router loss weighs the micro-batches
                rel = 1e-3 if z_loss and key == "loss" else 1e-5
                assert four[key] == pytest.approx(one[key], rel=rel, abs=1e-9), key
        own = one["loss"] - one["ce"] - one["alpha"] * one["kd"]
        assert 0.05 < own < 0.2 if z_loss else abs(own) < 1e-5  # once
    assert logs[0][0]["kd"] > 0
    assert logs[0][-1]["kd"] == 0


def test_trainer_ahead_and_refusals(tmp_path, teacher):
    student = llama()
    schedule = mf.AlphaSchedule("ahead", patience=2)
    kd = mf.distill(student, teacher, schedule=schedule)
    run = trained(tmp_path, kd, eval_strategy="steps", eval_steps=1, max_steps=5)
    alphas = [entry["alpha"] for entry in run.state.log_history if "alpha" in entry]
    assert alphas == [1, 1, 1, 0, 0]  # the rate is so low that nothing improves after the first
    assert schedule.stopped_at == 3
    with pytest.raises(mf.MoeifyError, match="label smoothing"):
        trained(tmp_path, mf.distill(student, teacher), label_smoothing_factor=0.1)
    with pytest.raises(mf.MoeifyError, match="another student"):
        mf.DistillationTrainer(llama(), run.args, distiller=kd, eval_dataset=[])


def test_words_are_shifted_only_where_the_model_does(teacher):
    import transformers

    small = {"n_layer": 1, "n_embd": 8, "n_head": 2, "vocab_size": 20}
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small)).eval()
    words = torch.randint(0, 20, (2, 7))
    batch = {"input_ids": words, "labels": words}
    kd = mf.distill(gpt2, copy.deepcopy(gpt2))
    assert kd.loss.shift  # its class does not say so, but it asks transformers for its loss
    torch.testing.assert_close(kd(batch), gpt2(**batch).loss)
    small = {"n_layers": 1, "emb_dim": 8, "n_heads": 2, "n_words": 20}
    strange = transformers.XLMWithLMHeadModel(transformers.XLMConfig(**small))
    with pytest.raises(mf.MoeifyError, match="shift=True"):
        mf.distill(strange, teacher)
    assert mf.distill(strange, teacher, shift=True).loss.shift


def test_a_spec_is_a_plan_or_a_part_of_one(tmp_path):
    distill = {"alpha": 0.25, "temperature": 3.0, "schedule": "linear", "stop": 7}
    section = {"depth": 2, "distill": distill}
    plan = mf.Plan.of({**PLAN, "student": section})
    plan.save(tmp_path / "plan.yaml")
    specs = [plan, plan.data(), tmp_path / "plan.yaml", section, plan.student, distill]
    for spec in [*specs, plan.student.distill]:
        kd = mf.distill(nn.Embedding(5, 5), nn.Embedding(5, 5), spec=spec)
        assert (kd.schedule.kind, kd.schedule.alpha, kd.schedule.stop) == ("linear", 0.25, 7)
        assert kd.loss.temperature == 3.0
    for spec, reason in (
        ({"alhpa": 1.0}, "did you mean `alpha`"),
        ({**section, "detph": 2}, "unknown key `detph`"),
        (PLAN, "the plan has no student"),
    ):
        with pytest.raises(mf.PlanError, match=reason):
            mf.distill(nn.Embedding(5, 5), nn.Embedding(5, 5), spec=spec)
