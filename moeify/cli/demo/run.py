"""`moeify demo`: convert, verify, compile, train, save and reload a pretrained model.

Every number that it prints is measured in that run. A failed check raises `MoeifyError`.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich import progress as bars
from rich.console import Console
from torch import Tensor, fx, nn

from moeify import api
from moeify.checkpoint import single
from moeify.cli.demo.data import Text, check_weights, find_weights, load_text
from moeify.cli.demo.embed import (
    contrastive,
    embed,
    embed_in_new_process,
    measure,
    pooled,
    tokenize,
)
from moeify.errors import MoeifyError
from moeify.hf.local_folder import copy_beside, folder_bytes, load_dense, transformers_offline
from moeify.plan.plan import Plan
from moeify.sites.discovery import find_mlps
from moeify.train.losses import aux_loss

PAIRS = 32
ENOUGH_STEPS = 10  # after fewer steps no improvement is expected


@dataclass(slots=True)
class Demo:
    """One run."""

    folder: Path  # a Hugging Face folder with an encoder and its tokenizer
    text: Text
    out: Path
    console: Console
    plan: Plan
    steps: int = 20  # of the optimizer
    compile: bool = True  # with inductor; otherwise with aot_eager
    numbers: dict[str, Any] = field(default_factory=dict)  # what was measured, JSON-able

    def run(self) -> dict[str, Any]:
        """Run all steps and return `numbers`."""
        torch.manual_seed(0)
        random.seed(0)
        start = time.perf_counter()
        model, tokenizer = self._load()
        dense = embed(model, tokenizer, self.text.sentences)
        self._convert(model)
        self._compare(dense, embed(model, tokenizer, self.text.sentences))
        self._compile(model, tokenizer)
        self._train(model, tokenizer)
        self._save(model, tokenizer)
        self.numbers["seconds"] = time.perf_counter() - start
        self._say(f"\nAll checks passed in {self.numbers['seconds']:.0f} s. The model is in:")
        self._say(f"  {self.out}", soft_wrap=True)
        return self.numbers

    def _say(self, text: str, **options: Any) -> None:
        self.console.print(text, highlight=False, markup=False, **options)

    def _heading(self, text: str) -> None:
        self.console.print(f"\n{text}", style="bold", highlight=False, markup=False)

    def _load(self) -> tuple[nn.Module, Any]:
        self._heading("1. The dense model and the MLPs found in its graph")
        transformers = transformers_offline()
        model, missing = load_dense(self.folder)
        _require(not missing, f"{self.folder}: the weights lack {missing[:3]}")
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(self.folder), local_files_only=True
        )
        sites = find_mlps(model)
        self.numbers["parameters_dense"] = sum(p.numel() for p in model.parameters())
        self.numbers["sites"] = [str(site) for site in sites]
        for site in sites:
            self._say(f"  {site}")
        return model, tokenizer

    def _convert(self, model: nn.Module) -> None:
        self._heading("2. What the plan makes of them")
        resolved = self.plan.resolve(model)
        self.console.print(resolved)
        self.numbers["parameters"] = resolved.parameters
        self.numbers["active_parameters"] = resolved.active_parameters
        self._heading("3. model = moeify(model, plan)")
        start = time.perf_counter()
        api.moeify(model, self.plan)
        self.numbers["convert_seconds"] = time.perf_counter() - start
        self._say(f"  converted and verified in {self.numbers['convert_seconds']:.2f} s")
        found = sum(p.numel() for p in model.parameters())
        _require(
            found == resolved.parameters,
            f"the plan promised {resolved.parameters} parameters, the model has {found}",
        )

    def _compare(self, dense: Tensor, moe: Tensor) -> None:
        difference = float((dense - moe).abs().max())
        cosine = float((dense * moe).sum(-1).min())
        self.numbers["step0_difference"], self.numbers["step0_cosine"] = difference, cosine
        self._say(
            f"  embeddings of {len(dense)} sentences against the dense model: "
            f"largest difference {difference:.1e}, smallest cosine {cosine:.7f}"
        )
        _require(difference < 1e-5, f"the embeddings differ by {difference:.1e} at step 0")

    def _compile(self, model: nn.Module, tokenizer: Any) -> None:
        self._heading("4. torch.compile(model, fullgraph=True)")
        batch = tokenize(tokenizer, self.text.sentences)
        graphs: list[fx.GraphModule] = []

        def keep(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
            graphs.append(gm)
            return gm.forward

        backend, why = _backend() if self.compile else ("aot_eager", "--no-compile")
        with torch.no_grad():
            eager = pooled(model, batch)
            torch.compile(model, backend=keep, fullgraph=True)(**batch)
            torch.compiler.reset()
            start = time.perf_counter()
            compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
            difference = float((pooled(compiled, batch) - eager).abs().max())
            seconds = time.perf_counter() - start
            times = _interleaved(lambda: compiled(**batch), lambda: model(**batch))
        ops = [str(node.target) for graph in graphs for node in graph.graph.nodes]
        ours = sum(name.startswith("moeify.") for name in ops)
        self.numbers["compile"] = {
            "backend": backend,
            "graphs": len(graphs),
            "nodes": len(ops),
            "moeify_nodes": ours,
            "seconds": seconds,
            "difference": difference,
            "milliseconds": times[0],
            "eager_milliseconds": times[1],
        }
        note = f" ({why})" if why else ""
        breaks = len(graphs) - 1
        self._say(
            f"  {len(graphs)} graph, {breaks} breaks, {len(ops)} nodes, {ours} of them moeify's "
            f"ops\n  backend {backend}{note}: ready in {seconds:.1f} s, embeddings differ from "
            f"eager ones by {difference:.1e}\n"
            f"  {times[0]:.1f} ms compiled, {times[1]:.1f} ms eager "
            f"(median, {len(batch['input_ids'])} sentences)"
        )
        _require(len(graphs) == 1, f"compiled to {len(graphs)} graphs instead of one")
        _require(difference < 1e-5, f"compiled and eager differ by {difference:.1e}")
        torch.compiler.reset()

    def _train(self, model: nn.Module, tokenizer: Any) -> None:
        if self.steps < 1:
            return
        self._heading(f"5. Training: {self.steps} steps of AdamW, contrastive, signature to text")
        example = next(pair for pair in self.text.held_out if pair[1].startswith("Return"))
        self._say(f"  such as: find {example[1]!r} for {example[0]}", soft_wrap=True)
        before = measure(model, tokenizer, self.text.held_out)
        losses = self._steps(model, tokenizer)
        after = measure(model, tokenizer, self.text.held_out)
        self.numbers["train"] = {"losses": losses, "before": before, "after": after}
        self._say(f"  on {len(self.text.held_out)} held-out pairs, before -> after:")
        self._say(f"    loss                 {before['loss']:.3f} -> {after['loss']:.3f}")
        self._say(f"    found at first rank  {before['top1']:.1%} -> {after['top1']:.1%}")
        for name, load in before["load"].items():
            self._say(f"    load of {name}: {_percent(load)} -> {_percent(after['load'][name])}")
        self._say(
            f"    busiest expert       {before['busiest']:.2f}x -> {after['busiest']:.2f}x an even "
            "share (mean over layers)"
        )
        if self.steps >= ENOUGH_STEPS:
            _require(after["loss"] < before["loss"], "the held-out loss did not fall")
            _require(after["busiest"] < before["busiest"], "the balance did not improve")

    def _steps(self, model: nn.Module, tokenizer: Any) -> list[float]:
        named = dict(model.named_parameters())
        routers = [p for name, p in named.items() if name.endswith("router.weight")]
        rest = [p for name, p in named.items() if not name.endswith("router.weight")]
        groups = [{"params": rest, "lr": 1e-4}, {"params": routers, "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        generator, losses = random.Random(1), []
        model.train()
        with self._progress() as progress:
            task = progress.add_task("  training", total=self.steps, loss=float("nan"))
            for _ in range(self.steps):
                pairs = generator.sample(self.text.train, PAIRS)
                loss = contrastive(model, tokenizer, pairs)
                torch.autograd.backward(loss + aux_loss(model))
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss.detach()))
                progress.update(task, advance=1, loss=losses[-1])
        model.eval()
        _require(all(map(math.isfinite, losses)), "the training loss is not finite")
        return losses

    def _progress(self) -> bars.Progress:
        return bars.Progress(
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TextColumn("loss {task.fields[loss]:.3f}"),
            bars.TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def _save(self, model: nn.Module, tokenizer: Any) -> None:
        self._heading("6. Save, and load in a fresh process")
        saved = embed(model, tokenizer, self.text.sentences)
        start = time.perf_counter()
        self.out.parent.mkdir(parents=True, exist_ok=True)
        single.save(model, self.out)
        seconds = time.perf_counter() - start
        copy_beside(self.folder, self.out)
        loaded = embed_in_new_process(self.out, self.text.sentences)
        size = folder_bytes(self.out)
        same = torch.equal(saved, loaded)
        self.numbers["save"] = {"bytes": size, "seconds": seconds, "bitwise_equal": same}
        self.numbers["out"] = str(self.out)
        word = "equal bit for bit" if same else "NOT equal"
        self._say(f"  saved {size / 2**20:.0f} MiB in {seconds:.2f} s; embeddings after: {word}")
        _require(same, f"reloaded embeddings differ by {float((saved - loaded).abs().max()):.1e}")


def run_demo(
    out: Path, *, steps: int = 20, compile: bool = True, console: Console | None = None
) -> dict[str, Any]:
    """Run the demo on the packaged weights and return everything that was measured."""
    console = console or Console()
    _leave_busy_cores_alone()
    folder = find_weights()
    digest = check_weights(folder)
    text = load_text()
    threads, version = torch.get_num_threads(), torch.__version__
    console.print(
        f"all-MiniLM-L6-v2 (sha256 {digest[:12]}..., as expected), {len(text.train):,} pairs of "
        f"text from Python's own library, torch {version}, threads: {threads}",
        highlight=False,
        soft_wrap=True,
    )
    plan = Plan.preset("pr-moe", experts=4, last=8, aux_loss=0.02)
    demo = Demo(folder, text, out.resolve(), console, plan, steps=steps, compile=compile)
    demo.numbers |= {"sha256": digest, "torch": version, "threads": threads}
    return demo.run()


def _leave_busy_cores_alone() -> None:
    """Use one thread per idle core: threads that wait for each other cost most of all."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if hasattr(os, "getloadavg"):
        idle = max(1, round((cores or 1) - os.getloadavg()[0]))
        torch.set_num_threads(min(torch.get_num_threads(), idle))


def _backend() -> tuple[str, str]:
    """Return the backend to compile with, and the reason if it is not inductor."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(2))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return "aot_eager", f"inductor cannot compile here: {reason[:100]}"
    return "inductor", ""


def _interleaved(*calls: Callable[[], object], rounds: int = 9) -> list[float]:
    """Return the median milliseconds of each call, taken in turns."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, milliseconds in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            milliseconds.append(1000 * (time.perf_counter() - start))
    return [statistics.median(milliseconds) for milliseconds in times]


def _percent(load: Sequence[float]) -> str:
    return "/".join(f"{100 * share:.0f}" for share in load) + " %"


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise MoeifyError(f"demo check failed: {message}")
