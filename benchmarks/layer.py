"""One MoE layer against the dense MLP of equal active size and against other implementations.

    python -m benchmarks.layer --quick --out results.json
    python -m benchmarks.layer --threads 1 --dtype fp32 --mode forward --out results.json
    python -m benchmarks.layer --memory --mode train --tokens 4096 --out results.json
    python -m benchmarks.layer --device cuda --out results-gpu.json

A run measures what `--out` lacks, so a long table can be filled in pieces. Every contestant is
checked against a float32 layer (output, and the gradient of the tokens) before it is timed, and
one that cannot run a case is listed with the reason. With up to eight tokens the inputs take turns
and so do copies of the weights, so that weights come from memory as they do in decoding.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, race
from benchmarks.case import DTYPES, Case, Truth, Weights, cold_copies, compare, draw_tokens, truth
from benchmarks.peers import CONTESTANTS, Contestant, Layer, Refused

SHAPES: dict[str, tuple[int, int, tuple[int, ...], tuple[int, ...]]] = {
    "base": (512, 2048, (8, 32, 128), (1, 2)),
    "mixtral": (4096, 14336, (8,), (2,)),
    "qwen3-30b": (2048, 768, (128,), (8,)),
    "olmoe": (2048, 1024, (64,), (8,)),
    "pr-moe-350m": (1024, 4096, (32, 64, 128), (1,)),
    "pr-moe-1.3b": (2048, 8192, (32, 64, 128), (1,)),
}
"""D, F, E and K. All experts are gated (SwiGLU), the only kind that every peer has."""

TOKENS = {"cpu": (1, 8, 64, 1024, 4096), "cuda": (1, 8, 64, 512, 4096, 16384, 32768)}
FEW_TOKENS, FEW_CALLS, COLD_BYTES = 8, 8, 2**30
BASELINE = "dense"
SLOW_TO_COMPILE = ("dense_compiled", "hf_grouped_compiled", "moeify_reference")


class Runner:
    """A checked contestant of a case; a call runs one step and returns its seconds."""

    def __init__(
        self, contestant: Contestant, case: Case, copies: list[Weights], inputs: list[Tensor]
    ) -> None:
        self.case, self.copies, self.inputs = case, copies, inputs
        self.layer = contestant.layer(case, copies[0])
        self.parameters = [p for p in self.layer.parameters() if p.requires_grad]
        self.gradient = gradient_of(case)
        self.forward: Callable[[Tensor], Tensor] = self.layer
        if contestant.compiled:
            self.forward = torch.compile(self.layer, dynamic=False)
        if contestant.graphed:
            self.forward, self.copies = _graphed(self.layer, inputs[0]), copies[:1]
        self.clock = machine.stopwatch(case.device)
        self.calls = FEW_CALLS if len(inputs) > 1 else 1
        self.turn = 0

    def step(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run forward, and backward if the case trains; return output and gradients."""
        if not self.case.trains:
            with torch.no_grad():
                return (self.forward(x),)
        x = x.detach().requires_grad_()
        out = self.forward(x)
        needed = (x, *self.parameters)
        return out, *torch.autograd.grad(out, needed, self.gradient, allow_unused=True)

    def check(self, want: Truth, drops: bool, is_moe: bool) -> dict[str, float]:
        """Return the error against the truth, and the tokens that lost a route."""
        out, *gradients = self.step(self.inputs[0])
        if not is_moe:
            return {}
        may_differ = want.dropped if drops else 0
        error, dropped = compare(out, want.out, self.case, may_differ)
        if want.grad is not None:
            error = max(error, compare(gradients[0], want.grad, self.case, may_differ)[0])
        return {"error": error} | ({"dropped_tokens": dropped} if drops else {})

    def __call__(self) -> float:
        taken = 0.0
        for _ in range(self.calls):
            if len(self.copies) > 1:
                self.layer.bind(self.copies[self.turn % len(self.copies)])
            x = self.inputs[self.turn % len(self.inputs)]
            self.turn += 1
            taken += self.clock(lambda x=x: self.step(x))  # type: ignore[misc]
        return taken / self.calls


def gradient_of(case: Case) -> Tensor:
    """Return the gradient of the output [T, D] that every backward starts from."""
    generator = torch.Generator(case.device).manual_seed(99)
    shape = (case.tokens, case.width)
    drawn = torch.randn(shape, device=case.device, generator=generator)
    return drawn.to(case.torch_dtype)


def run_case(
    case: Case, weights: Weights, names: Sequence[str], budget: float, patience: float
) -> dict[str, Any]:
    """Check and time contestants; return `contestants`, `skipped` and what describes the load."""
    few = case.tokens <= FEW_TOKENS and not case.trains
    inputs = [draw_tokens(case, weights, seed) for seed in range(FEW_CALLS if few else 1)]
    copies = cold_copies(weights, COLD_BYTES) if few else [weights]
    wants = [truth(case, weights, x, gradient_of(case)) for x in inputs]
    torch.compiler.reset()
    runners: dict[str, Runner] = {}
    contestants: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    once = 0.0
    for name in names:
        contestant = CONTESTANTS[name]
        try:
            runner = Runner(contestant, case, copies, inputs)
            facts = runner.check(wants[0], contestant.drops, not name.startswith(BASELINE))
            taken = runner()
        except Refused as refusal:
            skipped[name] = str(refusal)
        except AssertionError as error:
            skipped[name] = f"wrong: {error}"
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            if taken > patience and name != BASELINE:
                skipped[name] = f"slow: one step takes {taken:.1f} s"
            else:
                runners[name], contestants[name] = runner, facts
                once += taken * runner.calls
    samples = race.race(runners, budget, once)
    for name, times in samples.items():
        contestants[name]["ms"] = race.medians(times)
        contestants[name]["rounds"] = len(times[0])
        if BASELINE in samples:
            contestants[name]["over_dense"] = race.ratios(times, samples[BASELINE])
    load = {
        "used_experts": sum(want.used for want in wants) / len(wants),
        "busiest": max(want.busiest for want in wants),
        "over_capacity": wants[0].dropped,
    }
    return {"contestants": contestants, "skipped": skipped, "load_of_experts": load}


def add_rates(case: Case, found: dict[str, Any], ceilings: dict[str, float]) -> None:
    """Add rates to the results, and the time over the ideal one.

    Ideal is what the best matmul rate and the rate of reading allow, whichever takes longer; the
    dense MLP has fewer weights to read.
    """
    fastest = max(ceilings["linear_gflops"], ceilings.get("onednn_gflops", 0.0)) * 1e9
    used = found["load_of_experts"]["used_experts"]
    for name, facts in found["contestants"].items():
        dense = name.startswith(BASELINE)
        moved = case.moved_bytes(
            case.top_k if dense else used, case.top_k if dense else case.experts
        )
        ideal = max(case.flops / fastest, moved / (ceilings["read_gbs"] * 1e9))
        seconds = min(facts["ms"]) / 1000
        facts["gflops"] = case.flops / seconds / 1e9
        facts["gbs"] = moved / seconds / 1e9
        facts["over_ideal"] = seconds / ideal


def peak_of(name: str, case: Case) -> dict[str, Any]:
    """Return the peak memory of one step beyond weights and inputs, in this process."""
    machine.pin(case.threads)
    weights = Weights.drawn(case)
    try:
        runner = Runner(CONTESTANTS[name], case, [weights], [draw_tokens(case, weights, 0)])
    except Refused as refusal:
        return {"refused": str(refusal)}
    x = runner.inputs[0]
    for _ in range(2):  # compiled and tuned; gradients are freed again
        runner.step(x)
    return {"peak_mb": race.peak_bytes(lambda: runner.step(x), case.device) / 1e6}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases, those with the same weights one after the other."""
    for threads, dtype, shape in itertools.product(options.threads, options.dtype, options.shape):
        width, hidden, experts, top_k = SHAPES[shape]
        width, hidden = options.width or width, options.hidden or hidden
        for e, k in itertools.product(options.experts or experts, options.top_k or top_k):
            for mode, tokens in itertools.product(options.mode, options.tokens):
                yield Case(options.device, mode, dtype, threads, width, hidden, e, k, tokens)


def field(options: argparse.Namespace, case: Case) -> list[str]:
    """Return the contestants of a case, the baseline first."""
    names = options.contestants or [
        name
        for name, contestant in CONTESTANTS.items()
        if case.device in contestant.devices
        and not (options.quick and name in SLOW_TO_COMPILE)
        and not (name.startswith("hf_batched") and case.tokens > 64)  # a copy of weights per row
    ]
    return [BASELINE, *(name for name in names if name != BASELINE)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if one of our own contestants is wrong."""
    options = _options(arguments)
    if options.deepspeed:
        sys.path.insert(0, str(options.deepspeed))
    if options.peak:
        print(json.dumps(peak_of(options.peak, Case(**json.loads(options.case)))))
        return 0
    machine.require(options.device)
    results = race.Results(options.out)
    wrong = False
    weights: tuple[Any, Weights] | None = None
    for case in cases(options):
        names = field(options, case)
        missing = names if options.again else results.missing(case.key, names, options.memory)
        if not missing:
            continue
        if options.memory:
            found = race.memory_of("benchmarks.layer", case, missing, options.deepspeed)
        else:
            machine.pin(case.threads)
            ceilings = results.ceilings(case.device, case.dtype, case.threads)
            like = dataclasses.replace(case, mode="", tokens=0, threads=0)
            if weights is None or weights[0] != like:
                weights = None  # the former ones are freed first
                weights = like, Weights.drawn(case)
            run = [BASELINE, *(name for name in missing if name != BASELINE)]
            found = run_case(case, weights[1], run, options.budget, options.patience)
            add_rates(case, found, ceilings)
        print(table(case, results.add(case.key, case=dataclasses.asdict(case), **found)))
        reasons = found.get("skipped", {})
        wrong |= any(n.startswith("moeify") and r.startswith("wrong") for n, r in reasons.items())
    if options.png:
        from benchmarks import picture

        picture.draw(results.data, options.png)
    return int(wrong)


def table(case: Case, found: dict[str, Any]) -> str:
    """Return the results of a case as text, the fastest first."""
    load = found.get("load_of_experts", {})
    lines = [f"\n{case.key}  {' '.join(f'{k} {v:g}' for k, v in load.items())}"]
    rows = found.get("contestants", {})
    for name in sorted(rows, key=lambda name: min(rows[name]["ms"])):
        row = rows[name]
        dense = " ".join(f"{ratio:7.2f}" for ratio in row.get("over_dense", ()))
        rates = f"{row['gflops']:8.1f} GFLOP/s  {row['gbs']:6.1f} GB/s"
        notes = f"  error {row['error']:.0e}" if "error" in row else ""
        notes += f"  {row['dropped_tokens']} tokens dropped" if "dropped_tokens" in row else ""
        lines.append(
            f"  {name:26}{min(row['ms']):10.3f} ms  x dense {dense}  x ideal"
            f" {row['over_ideal']:6.2f}  {rates}{notes}"
        )
    for name, row in found.get("memory", {}).items():
        peak = f"{row['peak_mb']:.1f} MB" if "peak_mb" in row else row["refused"]
        lines.append(f"  {name:26} peak {peak}")
    lines += [f"  {name:26} skipped: {why}" for name, why in found.get("skipped", {}).items()]
    return "\n".join(lines)


def _graphed(layer: Layer, x: Tensor) -> Callable[[Tensor], Tensor]:
    """Capture the forward on inputs like `x`; a call copies its input in and replays."""
    held = x.clone()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            layer(held)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        out: Tensor = layer(held)

    def replay(x: Tensor) -> Tensor:
        held.copy_(x)
        graph.replay()
        return out

    return replay


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    text, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.layer", description=text, formatter_class=formatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, nargs="+", help="CPU threads; default 1 2")
    add("--dtype", nargs="+", choices=list(DTYPES), help="default fp32 bf16; bf16 on a GPU")
    add("--mode", nargs="+", choices=("forward", "train"), default=["forward", "train"])
    add("--shape", nargs="+", choices=list(SHAPES), help="default base; all others on a GPU")
    add("--tokens", type=int, nargs="+", help="T")
    add("--experts", type=int, nargs="+", help="E instead of the shape's")
    add("--top-k", type=int, nargs="+", help="K instead of the shape's")
    add("--width", type=int, help="D instead of the shape's")
    add("--hidden", type=int, help="F instead of the shape's")
    add("--contestants", nargs="+", choices=list(CONTESTANTS), help="default all that fit")
    add("--quick", action="store_true", help="a table in about five minutes")
    add("--memory", action="store_true", help="peak memory of a step instead of its time")
    add("--budget", type=float, help="seconds of timing per case; default 15, quick 5")
    add(
        "--patience", type=float, default=6.0, help="skip contestants with steps over these seconds"
    )
    add("--again", action="store_true", help="measure also what --out holds already")
    add("--deepspeed", type=Path, help="folder of another DeepSpeed, put first on the path")
    add("--out", type=Path, help="JSON of results, added to if it is there")
    add("--png", type=Path, help="picture of all results in --out")
    add("--peak", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    add("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    gpu, quick = options.device == "cuda", options.quick
    options.threads = options.threads or ([1] if quick or gpu else [1, 2])
    options.dtype = options.dtype or (["bf16"] if gpu else ["fp32"] if quick else ["fp32", "bf16"])
    options.shape = options.shape or ([s for s in SHAPES if s != "base"] if gpu else ["base"])
    options.tokens = options.tokens or ([1, 64, 1024] if quick else list(TOKENS[options.device]))
    options.budget = options.budget or (5.0 if quick else 15.0)
    if quick and not gpu:
        options.experts, options.top_k = options.experts or [8, 32], options.top_k or [2]
    return options


if __name__ == "__main__":
    sys.exit(main())
