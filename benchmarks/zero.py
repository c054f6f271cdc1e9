"""Training steps of a small MoE language model on four processes, at every stage of ZeRO.

    python -m benchmarks.zero --quick --out results.json
    python -m benchmarks.zero --out results.json
    python -m benchmarks.zero --contestants moeify_2 moeify_3 deepspeed_2

A step is forward, backward and AdamW in float32, on B sequences of each rank. Every contestant is
built and checked first: the losses of three steps at any stage against those of stage 0, and the
first loss of DeepSpeed, which starts from the same weights and routers. Then all take turns; a
round's time is that of its slowest rank, and times are compared within rounds.

The model of `fsdp2_3_dense` and `fsdp2_2_dense` is the dense one under plain FSDP2: without experts
to keep, send rows to or update, it is not a rival, but shows the minimum cost of partitioning.
AdamW has a larger share of the time here than in practice, where a step has more tokens per
parameter.

Memory is measured in a second run, in which freed blocks return to the system at once. It counts
the tensors of parameters, of optimizer states (including DeepSpeed's float32 copies of the weights)
and, after a backward pass, of gradients. `step` is the growth of the resident set during a step
beyond what stays: gradients, activations, gathered weights, buffers; `peak` is the sum of
parameters, states and `step`. The torch profiler's record of the CPU allocator would be finer, but
misses what gloo's threads release. All values are those of the rank with the most.

This does not show how an engine behaves on a network or a GPU: the processes of one machine send
through its memory, by gloo, and with fewer cores than ranks nothing overlaps; prefetching can only
add cost here.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks import race
from benchmarks.exchange import launch, run_on_all_ranks
from benchmarks.peers import Refused
from benchmarks.zero_peers import CONTESTANTS, Contestant, Sizes

BASELINES = {"over_dense": "fsdp2_3_dense", "over_stage_0": "moeify_0"}
TIMEOUT = timedelta(seconds=300)
STEPS = 3
RETURN_FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**16), "MALLOC_TRIM_THRESHOLD_": str(2**16)}
"""Environment in which the allocator returns freed memory to the system at once."""


class Runner:
    """A contestant on this rank; a call runs one step and returns the slowest rank's seconds."""

    def __init__(self, contestant: Contestant, sizes: Sizes) -> None:
        self.trainer = contestant.build(sizes)
        self.losses = [self.step() for _ in range(STEPS)]

    def step(self) -> float:
        """Run one step; return the loss."""
        self.trainer.clear()
        loss = self.trainer.gradients()
        self.trainer.update()
        return loss

    def __call__(self) -> float:
        dist.barrier()
        started = time.perf_counter()
        self.step()
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken)

    def mean_losses(self) -> list[float]:
        """Return the first losses, the means over the ranks."""
        losses = torch.tensor(self.losses, dtype=torch.float64)
        dist.all_reduce(losses)
        mean: list[float] = (losses / dist.get_world_size()).tolist()
        return mean


def measure_memory(contestant: Contestant, sizes: Sizes) -> dict[str, Any]:
    """Build a contestant and return its memory on this rank, in MB."""
    runner = Runner(contestant, sizes)
    trainer = runner.trainer
    trainer.clear()
    trainer.gradients()
    found = {
        "parameters": size_of(trainer.model.parameters()),
        "states": size_of(trainer.states()),
        "gradients": size_of(trainer.kept_gradients()),
    }
    trainer.update()
    trainer.clear()
    gc.collect()
    found["step"] = race.peak_bytes(runner.step, "cpu")
    found["peak"] = found["parameters"] + found["states"] + found["step"]
    return {name: size / 1e6 for name, size in found.items()} | {"planned": trainer.planned()}


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes behind tensors, each storage once."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in local}
    return sum(storage.nbytes() for storage in storages.values())


def memory_of(sizes: Sizes, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the memory of contestants on the rank with the most, or the reason for none."""
    memory: dict[str, dict[str, Any]] = {}
    for name in names:
        try:
            found = run_on_all_ranks(partial(measure_memory, CONTESTANTS[name], sizes))
        except Refused as refusal:
            memory[name] = {"refused": str(refusal)}
            continue
        planned = found.pop("planned")
        most = torch.tensor(list(found.values()), dtype=torch.float64)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        memory[name] = dict(zip(found, most.tolist(), strict=True))
        memory[name] |= {"planned": planned} if planned else {}
        gc.collect()
    return memory


def check(contestant: Contestant, losses: Sequence[float], known: dict[str, Any]) -> None:
    """Assert that losses equal those of the contestant that must have the same."""
    if contestant.same is None or contestant.same not in known:
        return
    wanted = known[contestant.same]["losses"]
    for step in range(contestant.steps):
        if not abs(losses[step] - wanted[step]) <= contestant.tolerance * abs(wanted[step]):
            raise AssertionError(f"loss {step} is {losses[step]:.6f}, not {wanted[step]:.6f}")


def run_case(sizes: Sizes, names: Sequence[str], budget: float) -> dict[str, Any]:
    """Check and time contestants; ranks differ only in the errors that they return."""
    runners: dict[str, Runner] = {}
    contestants: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for name in names:
        try:
            runner = run_on_all_ranks(partial(Runner, CONTESTANTS[name], sizes))
            losses = runner.mean_losses()
            run_on_all_ranks(partial(check, CONTESTANTS[name], losses, contestants))
        except Refused as refusal:
            skipped[name] = str(refusal)
        else:
            runners[name], contestants[name] = runner, {"losses": losses}
    once = sum(runner() for runner in runners.values())
    samples = race.race(runners, budget, once)
    for name, times in samples.items():
        contestants[name]["ms"] = race.medians(times)
        for key, baseline in BASELINES.items():
            if baseline in samples:
                contestants[name][key] = race.ratios(times, samples[baseline])
        contestants[name]["rounds"] = len(times[0])
    return {"contestants": contestants, "skipped": skipped}


def table(key: str, found: dict[str, Any]) -> str:
    """Return what a case has, of times and of memory, as text in the order of the contestants."""
    rows, memory = found.get("contestants", {}), found.get("memory", {})
    columns = ("parameters", "states", "gradients", "step", "peak")
    heads = "".join(f"{name:>12}" for name in columns)
    lines = [f"\n{key}", f"  {'':20}{'ms':>9}{'x dense':>16}{'x stage 0':>16}   MB:{heads}"]
    for name in {**rows, **memory}:
        row, held = rows.get(name, {}), memory.get(name, {})
        pairs = [" ".join(f"{ratio:.2f}" for ratio in row.get(key, ())) for key in BASELINES]
        times = f"{min(row['ms']):9.1f}" if row else f"{'-':>9}"
        times += "".join(f"{pair or '-':>16}" for pair in pairs)
        cells = "".join(f"{held[name]:12.1f}" if name in held else f"{'-':>12}" for name in columns)
        lines.append(f"  {name:20}{times}      {cells}  {held.get('refused', '')}".rstrip())
    lines += [f"  {name:20} skipped: {why}" for name, why in found.get("skipped", {}).items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if one of our own contestants is wrong or fails."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    if "RANK" not in os.environ:
        status = 0 if options.memory else _launch(options.ranks, given, memory=False)
        return max(status, _launch(options.ranks, given, memory=True))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    status = _run(options)
    dist.barrier()
    dist.destroy_process_group()
    return status


def _launch(ranks: int, arguments: Sequence[str], memory: bool) -> int:
    variables = {
        "DS_ACCELERATOR": "cpu",
        "PYTHONWARNINGS": "ignore::FutureWarning",  # of torch, for DeepSpeed's calls
        **(RETURN_FREED if memory else {}),
    }
    arguments = [*arguments, "--memory"] if memory else arguments
    return launch("benchmarks.zero", ranks, arguments, **variables)


def _run(options: argparse.Namespace) -> int:
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    results = race.Results(options.out if first else None)
    wrong = False
    for top_k in options.top_k:
        sizes = Sizes(
            layers=options.layers,
            width=options.width,
            hidden=options.hidden,
            vocabulary=options.vocabulary,
            sequences=options.sequences,
            length=options.length,
            experts=options.experts,
            top_k=top_k,
            expert_ranks=options.expert_ranks,
            ranks=ranks,
        )
        names = options.contestants or list(CONTESTANTS)
        known = results.missing(sizes.key, names, options.memory)
        missing = [names if options.again else known]
        dist.broadcast_object_list(missing)
        if not missing[0]:
            continue
        if options.memory:
            found: dict[str, Any] = {"memory": memory_of(sizes, missing[0])}
        else:
            run = {*BASELINES.values(), *missing[0]}
            found = run_case(sizes, [name for name in CONTESTANTS if name in run], options.budget)
        reasons = {n for n, memory in found.get("memory", {}).items() if "refused" in memory}
        wrong |= any(n.startswith("moeify") for n in reasons.union(found.get("skipped", {})))
        if first:
            case = dataclasses.asdict(sizes)
            print(table(sizes.key, results.add(sizes.key, case=case, **found)), flush=True)
    return int(wrong)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    text, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.zero", description=text, formatter_class=formatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=4, help="processes")
    add("--expert-ranks", type=int, default=2, help="ranks that share experts")
    add("--top-k", type=int, nargs="+", default=[1], help="K")
    add("--layers", type=int, default=4, help="transformer layers")
    add("--width", type=int, default=256, help="D")
    add("--hidden", type=int, default=1024, help="F")
    add("--vocabulary", type=int, default=2048, help="V")
    add("--sequences", type=int, default=4, help="B")
    add("--length", type=int, default=128, help="S")
    add("--experts", type=int, default=8, help="E")
    add("--contestants", nargs="+", choices=list(CONTESTANTS), help="default all")
    add("--memory", action="store_true", help="memory only")
    add("--quick", action="store_true", help="a table in about two minutes")
    add("--budget", type=float, help="seconds of timing per case; default 120, quick 20")
    add("--again", action="store_true", help="measure also what --out holds already")
    add("--out", type=Path, help="JSON of results, added to if it is there")
    options = parser.parse_args(arguments)
    options.budget = options.budget or (20.0 if options.quick else 120.0)
    return options


if __name__ == "__main__":
    sys.exit(main())
