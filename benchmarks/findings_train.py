"""One job of the study: a contestant and a seed, from its start to its last evaluation.

Shapes: B windows, L positions.
"""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeify as mf
from benchmarks.findings_study import BASELINE, DENSE, Contestant, Size, contestants
from benchmarks.findings_text import Corpus, batches, held_out_windows
from moeify.distillation.size import describe
from moeify.hf.local_folder import transformers_offline
from moeify.plan.plan import Plan
from moeify.sites.record import routers_of

Costs: TypeAlias = Mapping[str, Mapping[str, list[float]]]
"""By contestant: `seconds` of a step in each timed round, and `flops` of a token's training."""

WORDS = 256
WARMUP = 0.05
"""Share of a run in which the learning rate rises."""
FLOOR = 0.1
"""Share of the peak learning rate at the end."""


def dense_model(size: Size, seed: int) -> Any:
    """Return a GPT-2 over bytes with weights of that seed."""
    hf: Any = transformers_offline()
    config = hf.GPT2Config(
        vocab_size=WORDS,
        n_positions=size.context,
        n_embd=size.width,
        n_layer=size.layers,
        n_head=size.heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    torch.manual_seed(seed)
    return hf.GPT2LMHeadModel(config).to(size.device)


def parameters(model: nn.Module) -> tuple[int, int]:
    """Return how many parameters a model has, and how many work on one token."""
    size = describe(model)
    return size.parameters, size.active


def flops_per_token(model: nn.Module, size: Size) -> float:
    """Return the floating-point operations of a forward pass per token.

    Two per active weight (the positions' table is only read; the output layer is the input's
    table), and the scores and sums of causal attention.
    """
    positions = size.context * size.width
    depth: int = model.config.n_layer  # type: ignore[union-attr, assignment]
    attention = 2 * depth * size.context * size.width
    return 2.0 * (parameters(model)[1] - positions) + attention


def converted(contestant: Contestant, dense: nn.Module, seed: int) -> nn.Module:
    """Return the contestant before its first step; `dense` becomes part of it."""
    if contestant.plan is None:
        return dense
    init = contestant.plan["init"] | {"seed": seed}
    plan = {key: part for key, part in contestant.plan.items() if key != "student"}
    return mf.moeify(dense, plan | {"init": init})


class Run:
    """Trains a model, and keeps its curve."""

    def __init__(
        self,
        model: Any,
        size: Size,
        corpus: Corpus,
        seed: int,
        *,
        teacher: Any = None,
        plan: Plan | None = None,
    ) -> None:
        self.model, self.size, self.corpus, self.seed = model, size, corpus, seed
        self.teacher = teacher
        self.distillation = _distillation(plan, size) if teacher is not None else None
        self.windows = held_out_windows(corpus.held_out, size.context, size.held_out)
        cuda = size.device == "cuda"
        self.optimizer = torch.optim.AdamW(
            mf.param_groups(model, weight_decay=0.1), lr=size.rate, betas=(0.9, 0.95), fused=cuda
        )
        self.curve: list[dict[str, float]] = []
        self.seconds = 0.0
        self.taught = 0

    def train(self, steps: int, first: int, *, points: int, hold: int = 0) -> None:
        """Run `steps` steps from batch `first` on; the rate falls after `hold` steps."""
        size, model = self.size, self.model
        torch.manual_seed(self.seed)  # which tokens random selection keeps
        text = batches(self.corpus.train, size.context, size.batch, self.seed, first)
        at = {round(steps * point / points) for point in range(points + 1)}
        self._point(0)
        for step in range(steps):
            started = time.perf_counter()
            rate = size.rate * scheduled(step, steps, hold)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            model.train()
            loss = self.loss(next(text).to(size.device), step)
            loss.backward()
            mf.clip_grad_norm_(model, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            # Reading the loss also waits for the device.
            if step + 1 in at and not math.isfinite(loss.item()):
                raise RuntimeError(f"the loss of step {step} is {loss.item()}")
            self.seconds += time.perf_counter() - started
            if step + 1 in at:
                self._point(step + 1)

    def loss(self, ids: Tensor, step: int) -> Tensor:
        """Return the training loss of ids [B, L], router losses and distillation with it."""
        if self.distillation is None:
            with autocast(self.size):
                own: Tensor = self.model(input_ids=ids, labels=ids).loss
            return own
        answers = None
        if self.distillation.schedule(step):
            self.taught += 1
            with torch.no_grad(), autocast(self.size):
                answers = self.teacher(input_ids=ids).logits
        with autocast(self.size):
            logits = self.model(input_ids=ids).logits
        total: Tensor = self.distillation(logits, answers, ids, step=step)
        return total + mf.aux_loss(self.model)

    def held_out(self) -> float:
        """Return the mean loss per held-out token, in nats."""
        self.model.eval()
        total, count = 0.0, 0
        with torch.no_grad():
            for windows in self.windows.split(2 * self.size.batch):
                ids = windows.to(self.size.device)
                with autocast(self.size):
                    logits = self.model(input_ids=ids.clamp_min(0)).logits
                target = ids[:, 1:].flatten()
                each = logits[:, :-1].flatten(0, 1).float()
                total += F.cross_entropy(each, target, ignore_index=-1, reduction="sum").item()
                count += int((target >= 0).sum())
        return total / count

    def _point(self, step: int) -> None:
        point = {"step": float(step), "loss": self.held_out()}
        if step and any(True for _ in routers_of(self.model)):
            self.model.train()
            with torch.no_grad(), autocast(self.size):
                ids = self.windows[: self.size.batch].clamp_min(0).to(self.size.device)
                self.model(input_ids=ids)
            stats = mf.router_stats(self.model).values()
            point["dropped"] = sum(each["dropped"] for each in stats) / len(stats)
            busiest = [float(each["load"].max()) * len(each["load"]) for each in stats]
            point["busiest"] = max(busiest)
        self.curve.append(point)


@dataclass(frozen=True)
class Job:
    """A contestant, or the dense model itself, and a seed."""

    name: str
    seed: int

    @property
    def file(self) -> str:
        """Name of its files, without suffix."""
        return f"{self.name.replace(' ', '-')}-{self.seed}"

    def needs(self, size: Size) -> tuple[Job, ...]:
        """Return the jobs whose models it starts from."""
        if self.name == DENSE:
            return ()
        contestant = contestants(size)[self.name]
        if contestant.start == "fresh":
            return ()
        return (Job(contestant.after or DENSE, self.seed),)

    def steps(self, size: Size, costs: Costs) -> int:
        """Return how many steps it takes."""
        if self.name == DENSE:
            return size.dense_steps
        contestant = contestants(size)[self.name]
        if contestant.start == "fresh":
            return size.steps + size.dense_steps
        if contestant.budget == "tokens":
            return size.steps
        each = {name: statistics.median(costs[name][contestant.budget]) for name in costs}
        return max(1, min(size.steps, round(size.steps * each[BASELINE] / each[self.name])))


def run(job: Job, size: Size, corpus: Corpus, folder: Path, costs: Costs) -> dict[str, Any]:
    """Run one job; the models that others start from are kept in the folder.

    Args:
        job: What to run.
        size: The study's size.
        corpus: The text.
        folder: Where the models are that it starts from.
        costs: What a step of every contestant costs, see `step_timer`.

    Returns:
        Its curve, its parameters, operations per token, seconds, and the plan.
    """
    began = time.perf_counter()
    contestant = None if job.name == DENSE else contestants(size)[job.name]
    first = size.dense_steps
    teacher, plan = None, None
    model = dense_model(size, job.seed)
    if contestant is None or contestant.start == "fresh":
        first = 0
    else:
        _load_dense(model, folder, job.seed)
    if contestant is not None:
        model = converted(contestant, model, job.seed)
    if contestant is not None and contestant.start == "taught":
        plan = Plan.of(contestant.plan or {})
        teacher = mf.load(folder / "models" / Job(str(contestant.after), job.seed).file)
        teacher.to(size.device).requires_grad_(False).eval()
        model = mf.student(model, plan)
    one = Run(model, size, corpus, job.seed, teacher=teacher, plan=plan)
    steps = job.steps(size, costs)
    whole = steps > size.steps or contestant is None
    hold = 0 if not whole else steps if contestant is None else size.dense_steps
    one.train(steps, first, points=size.points * (3 if whole else 1), hold=hold)
    _keep(job, model, size, folder)
    total, active = parameters(model)
    forward = flops_per_token(model, size)
    taught = 0.0 if teacher is None else flops_per_token(teacher, size) * one.taught / steps
    return {
        "job": job.name,
        "seed": job.seed,
        "curve": one.curve,
        "loss": one.curve[-1]["loss"],
        "parameters": total,
        "active_parameters": active,
        "bytes": sum(p.nbytes for p in model.parameters()),
        "train_flops_per_token": 3 * forward + taught,
        "tokens": steps * size.tokens_per_step,
        "steps": steps,
        "train_seconds": one.seconds,
        "seconds": time.perf_counter() - began,
    }


def step_timer(name: str, size: Size, corpus: Corpus) -> tuple[float, Callable[[], float]]:
    """Return the FLOPs of a token's training, and what takes a step and returns its seconds."""
    contestant = contestants(size)[name]
    dense = dense_model(size, 0)
    teacher, plan = None, None
    if contestant.start == "taught":
        plan = Plan.of(contestant.plan or {})
        teacher = converted(contestant, dense, 0).requires_grad_(False).eval()
        model = mf.student(teacher, plan).requires_grad_(True)
    else:
        model = converted(contestant, dense, 0)
    one = Run(model, size, corpus, 0, teacher=teacher, plan=plan)
    text = batches(corpus.train, size.context, size.batch, 0, 0)

    def step() -> float:
        ids = next(text).to(size.device)
        model.train()
        wait(size)
        started = time.perf_counter()
        one.loss(ids, 0).backward()
        mf.clip_grad_norm_(model, 1.0)
        one.optimizer.step()
        one.optimizer.zero_grad()
        wait(size)
        return time.perf_counter() - started

    taught = 0.0 if teacher is None else flops_per_token(teacher, size)
    return 3 * flops_per_token(model, size) + taught, step


def scheduled(step: int, steps: int, hold: int) -> float:
    """Return the learning rate as a share of its peak: up, level for `hold` steps, then down."""
    up = max(1, round(WARMUP * min(steps, 1000)))
    if step < max(up, hold):
        return min(1.0, (step + 1) / up)
    part = (step - max(up, hold)) / max(1, steps - max(up, hold))
    return 1 - (1 - FLOOR) * part


def wait(size: Size) -> None:
    """Wait for the device."""
    if size.device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def autocast(size: Size) -> Iterator[None]:
    """Compute in the size's dtype; weights stay float32."""
    wanted = size.dtype == "bfloat16"
    with torch.autocast(size.device, torch.bfloat16, enabled=wanted):
        yield


def _distillation(plan: Plan | None, size: Size) -> mf.DistillationLoss:
    if plan is None or plan.student is None:
        raise ValueError("a teacher needs a plan with a `student` section")
    spec = plan.student.distill
    schedule = mf.AlphaSchedule(spec.schedule, alpha=spec.alpha, stop=spec.stop, total=size.steps)
    return mf.DistillationLoss(temperature=spec.temperature, schedule=schedule)


def _keep(job: Job, model: nn.Module, size: Size, folder: Path) -> None:
    """Save what other jobs start from, all or nothing."""
    wanted = {job.name == DENSE} | {job.name == c.after for c in contestants(size).values()}
    if True not in wanted:
        return
    (folder / "models").mkdir(parents=True, exist_ok=True)
    target = folder / "models" / job.file
    if job.name != DENSE:
        mf.save(model, target)
        return
    from safetensors.torch import save_model

    partial = target.with_suffix(".partial")
    save_model(model, str(partial))
    os.replace(partial, target.with_suffix(".safetensors"))


def _load_dense(model: nn.Module, folder: Path, seed: int) -> None:
    from safetensors.torch import load_model

    load_model(model, str(folder / "models" / f"{Job(DENSE, seed).file}.safetensors"))
