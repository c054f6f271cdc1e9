"""A converted model in Hugging Face's Trainer: losses, logs, router logits, checkpointing."""

from __future__ import annotations

import itertools
import logging
import os
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainerCallback, TrainingArguments

import moeify as mf
from moeify import RouterCallback
from moeify.sites.record import routers_of
from tests.distributed.ranks import run_ranks
from tests.zoo_models import ZOO, ids

ROWS, LENGTH = 8, 12
PLAN = {
    "layers": [{"select": "all", "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None, "aux_loss": 0.5},
    "init": {"router_std": 0.3},
}


def converted(name: str = "llama", plan: Any = PLAN) -> nn.Module:
    torch.manual_seed(0)
    return mf.moeify(ZOO[name].build(), plan, verify=False)


def rows(count: int = ROWS) -> list[dict[str, torch.Tensor]]:
    """Rows of which ever more is no label, so that a mean over rows is not one over labels."""
    drawn = torch.randint(3, 98, (count, LENGTH), generator=torch.Generator().manual_seed(1))
    made = []
    for i, tokens in enumerate(drawn):
        labels = tokens.clone()
        labels[: i % LENGTH] = -100
        made.append({"input_ids": tokens, "labels": labels})
    return made


class Gradients(TrainerCallback):
    """Keeps the gradients of the first step, and the loads that wait for it."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}
        self.pending: list[int] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.found:
            named = model.named_parameters()
            self.found = {n: p.grad.clone() for n, p in named if p.grad is not None}
            counts = [router.pending_counts for _, router in routers_of(model)]
            self.pending = [int(count.sum()) for count in counts if count is not None]


def trainer(model: nn.Module, folder: Any, *callbacks: Any, data: Any = None, **options: Any):
    options = {"per_device_train_batch_size": ROWS, "max_steps": 1, "logging_steps": 1} | options
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        disable_tqdm=True,
        **{"report_to": "none"} | options,
    )
    data = data or rows()
    sets = {"train_dataset": data, "eval_dataset": data[:4]}
    made = Trainer(model, arguments, callbacks=list(callbacks), **sets)
    made._get_train_sampler = lambda *_: None  # in order
    return made


def by_hand(model: nn.Module, parts: int, scaled: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients by the definition, all micro-batches of all ranks in turn.

    The task's loss is a mean over all labels (or, where the model cannot do that, over the means
    of the micro-batches); the router losses are the mean over the micro-batches, by the same
    weights.
    """
    model.train()
    model.zero_grad()
    data = rows()
    batches = [data[i : i + ROWS // parts] for i in range(0, ROWS, ROWS // parts)]
    counts = [sum(int(r["labels"][1:].ne(-100).sum()) for r in batch) for batch in batches]
    loss = torch.zeros(())
    for batch, count in zip(batches, counts, strict=True):
        tokens, labels = (torch.stack([r[key] for r in batch]) for key in ("input_ids", "labels"))
        share = count / sum(counts) if scaled else 1 / parts
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        task = nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
        loss = loss + share * (task + mf.aux_loss(model))
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return loss.item(), gradients


def differ(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> list[str]:
    assert got.keys() == want.keys()
    gaps = {n: float((got[n] - want[n]).abs().max() / want[n].abs().max()) for n in want}
    return [f"{name}: {gap:.1e}" for name, gap in gaps.items() if not gap <= 1e-4]


SETTINGS = list(itertools.product((1, 4), (True, False)))  # accumulation, accepts_loss_kwargs


def train_once(model: nn.Module, world: int, steps: int, scaled: bool, folder: str) -> Any:
    """Return the logged loss and the gradients of one step; the weights stay."""
    model.accepts_loss_kwargs = scaled
    seen = Gradients()
    size = ROWS // steps // world
    counts = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
    run = trainer(model, folder, seen, learning_rate=1e-12, **counts)
    run.train()
    return run.state.log_history[0]["loss"], seen.found


def on_a_rank(rank: int, world: int, saved: str, folder: str) -> list[Any]:
    """Train one step in every setting: converted before the ranks met, and on all ranks."""
    os.environ |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    found = []
    for model in (torch.load(saved, weights_only=False), converted()):
        found.append([train_once(model, world, *setting, folder) for setting in SETTINGS])
    return found


@pytest.fixture(scope="module")
def defined() -> dict[tuple[int, bool], Any]:
    """Loss and gradients by the definition, by number of micro-batches and setting."""
    model = converted()
    return {
        (parts, scaled): by_hand(model, parts, scaled)
        for parts in (1, 2, 4, 8)
        for scaled in (True, False)
    }


def test_router_losses_enter_once(defined, tmp_path):
    model = converted()
    losses = []
    for steps, scaled in SETTINGS:
        loss, gradients = train_once(model, 1, steps, scaled, str(tmp_path))
        want, want_gradients = defined[steps, scaled]
        assert loss == pytest.approx(want, rel=1e-5), (steps, scaled)
        assert differ(gradients, want_gradients) == [], (steps, scaled)
        losses.append(loss)
    assert max(losses) < 1.02 * min(losses)


def test_router_losses_enter_once_on_two_ranks(defined, tmp_path):
    saved = str(tmp_path / "model.pt")
    torch.save(converted(), saved)
    for alone, joined in run_ranks(on_a_rank, 2, 2, saved, str(tmp_path)):
        for ranks, results in ((2, alone), (1, joined)):  # joined ones balance over all tokens
            for (steps, scaled), (loss, gradients) in zip(SETTINGS, results, strict=True):
                if ranks == 1 and not scaled:
                    continue  # its task is a mean over each rank's rows
                want, want_gradients = defined[steps * ranks, scaled]
                assert loss == pytest.approx(want, rel=1e-5), (ranks, steps, scaled)
                assert differ(gradients, want_gradients) == [], (ranks, steps, scaled)
    losses = [loss for loss, _ in defined.values()]  # 1 to 8 micro-batches of the same rows
    assert max(losses) < 1.02 * min(losses)


class Stats(TrainerCallback):
    """Keeps what `router_stats` and `aux_loss` say after each micro-batch."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        self.seen.append((mf.router_stats(model), mf.aux_loss(model).item()))

    on_step_end = on_substep_end


TIGHT = {**PLAN, "router": {"capacity_factor": 0.75, "min_capacity": 1, "drop": "position"}}


def by_stats(seen: list[Any]) -> dict[str, float]:
    want = {"router/aux_loss": sum(loss for _, loss in seen) / len(seen)}
    for name in seen[0][0]:
        stats = [each[name] for each, _ in seen]
        counts = sum(each["counts"].double() for each in stats)
        want[f"router/{name}/load_max"] = float(counts.max() / counts.mean())
        want[f"router/{name}/load_min"] = float(counts.min() / counts.mean())
        for key in ("entropy", "dropped"):  # the micro-batches are equally long
            want[f"router/{name}/{key}"] = sum(each[key] for each in stats) / len(stats)
    return want


def test_the_callback_logs_what_the_routers_did(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="the event file is TensorBoard's")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    stats = Stats()
    run = trainer(
        converted(plan=TIGHT),
        tmp_path,
        stats,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=2,
        max_steps=4,
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=2,
        data=rows(16),
    )
    RouterCallback().attach(run)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 2
    assert len(stats.seen) == 8
    for entry, seen in zip(logged, (stats.seen[:4], stats.seen[4:]), strict=True):
        got = {key: value for key, value in entry.items() if key.startswith("router/")}
        assert got == pytest.approx(by_stats(seen), rel=1e-5)
        assert got["router/model.layers.0.mlp/dropped"] > 0
    assert not any("router/aux_loss" in e for e in run.state.log_history if "loss" not in e)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    written = [event.value for event in events.Scalars("train/router/model.layers.1.mlp/load_max")]
    assert written == pytest.approx(
        [entry["router/model.layers.1.mlp/load_max"] for entry in logged]
    )


def test_the_callback_warns_if_reporters_would_miss_it(tmp_path, caplog):
    pytest.importorskip("tensorboard", reason="a reporter that is there")
    late, attached = RouterCallback(), RouterCallback()
    first = trainer(converted(), tmp_path, late, report_to="tensorboard")
    with caplog.at_level(logging.WARNING, "moeify"):
        first.train()
    assert [r.message for r in caplog.records] == [
        "RouterCallback is behind the reporters (tensorboard), which will not show its values: "
        "instead of callbacks=[...], call RouterCallback().attach(trainer)"
    ]
    assert "router/aux_loss" in first.state.log_history[0]
    caplog.clear()
    second = trainer(converted(), tmp_path, attached, report_to="tensorboard")
    assert attached.attach(second) is attached  # in the list already
    assert second.callback_handler.callbacks.count(attached) == 1
    with caplog.at_level(logging.WARNING, "moeify"):
        second.train()
    assert caplog.records == []


def test_a_loss_outside_the_model_logs_a_warning(tmp_path, caplog):
    def own(outputs, labels, num_items_in_batch=None):
        flat = outputs.logits[:, :-1].flatten(0, 1)
        return nn.functional.cross_entropy(flat, labels[:, 1:].flatten())

    def both(outputs, labels, num_items_in_batch=None):
        return own(outputs, labels) + mf.aux_loss(model)

    for options, func, warned in (
        ({"label_smoothing_factor": 0.1}, None, 1),
        ({}, own, 1),
        ({}, both, 0),
        ({}, None, 0),
    ):
        model = converted()
        run = trainer(model, tmp_path, max_steps=3, data=rows(24), **options)
        run.compute_loss_func = func
        with caplog.at_level(logging.WARNING, "moeify"):
            run.train()
        assert [r.message[:31] for r in caplog.records] == [
            "the router losses of the last t"
        ] * warned
        caplog.clear()


def test_checkpointing_routes_alike_and_counts_once(tmp_path):
    router = {"capacity_factor": 0.75, "noise": "jitter", "bias_update": 0.01, "aux_loss": 0.5}
    found = []
    for checkpointing in (False, True):
        model = converted(plan={**PLAN, "router": router})
        seen, callback = Gradients(), RouterCallback()
        run = trainer(
            model,
            tmp_path,
            seen,
            callback,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
        assert not getattr(model, "is_gradient_checkpointing", False)
        run.train()
        assert model.is_gradient_checkpointing == checkpointing
        assert seen.pending == [ROWS * LENGTH * 2] * 2
        for _, router_ in routers_of(model):
            assert bool(router_.selection_bias.any())
        logged = run.state.log_history[0]
        found.append((seen.found, {k: v for k, v in logged.items() if "router" in k}))
    assert differ(found[1][0], found[0][0]) == []
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_router_logits(name):
    model = converted(name, {**PLAN, "router": {"drop": "position", "aux_loss": 0.5}})
    inputs = {"input_ids": ids(), "labels": ids()}
    plain = model.eval()(**inputs)
    assert "router_logits" not in plain
    output = model(**inputs, output_router_logits=True)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(ids().numel(), 4)] * 2
    assert isinstance(output, type(plain))
    torch.testing.assert_close(output.loss, plain.loss)
    stats = mf.router_stats(model)
    for logits, layer in zip(output.router_logits, stats.values(), strict=True):
        chosen = logits.topk(2).indices.flatten().bincount(minlength=4)
        assert chosen.tolist() == layer["counts"].tolist()
    torch.testing.assert_close(output.aux_loss, mf.aux_loss(model))
    assert not any(r.record.logits or r.record.keep_logits for _, r in routers_of(model))
    leaves, spec = torch.utils._pytree.tree_flatten(output)
    assert torch.utils._pytree.tree_unflatten(leaves, spec).keys() == output.keys()
    model.train()
    z_loss = sum(
        x.logsumexp(1).square().mean()
        for x in model(**inputs, output_router_logits=True).router_logits
    )
    z_loss.backward()
    assert all(float(r.weight.grad.abs().sum()) > 0 for _, r in routers_of(model))
    with pytest.raises(mf.MoeifyError, match="return_dict=True"):
        model(**inputs, output_router_logits=True, return_dict=False)
    model.config.output_router_logits = True
    assert len(model(**inputs).router_logits) == 2
    assert "router_logits" not in model(**inputs, output_router_logits=False)


def test_router_logits_compile_and_generate():
    model = converted().eval()
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    want = model.generate(ids(5), **options)
    model.config.output_router_logits = True
    assert torch.equal(model.generate(ids(5), **options), want)
    for asked in (True, False):
        torch._dynamo.reset()
        model.config.output_router_logits = asked
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(model.train(), fullgraph=True, backend=counter)
        for _ in range(3):
            output = compiled(input_ids=ids(), labels=ids(), use_cache=False)
            output.loss.backward()
        assert counter.frame_count == 1
        assert ("router_logits" in output) == asked
        if asked:
            eager = model(input_ids=ids(), labels=ids(), use_cache=False)
            torch.testing.assert_close(output.router_logits, eager.router_logits)
            torch.testing.assert_close(output.loss, eager.loss)
