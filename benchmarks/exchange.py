"""One MoE layer whose experts are spread over four processes, against DeepSpeed's and plain torch.

    python -m benchmarks.exchange --quick --out results.json
    python -m benchmarks.exchange --out results.json
    python -m benchmarks.exchange --contestants moeify moeify_hierarchical moeify_overlap

A step is forward and backward of the layer in float32, on T tokens of each rank. Every contestant
is checked first: output and gradient of the tokens against a layer in one process, and if nothing
is dropped, the gradients of the experts against those of `plain`. Then all take turns; a round's
time is that of its slowest rank, and times are compared within rounds. Bytes and collectives are
counted in an additional step, below autograd: what rank 0 sends to other ranks if each part goes
directly to its rank.

This shows what a layer computes and copies around its exchange, how many bytes it sends, and in how
many collectives. Two contestants are not rivals but show what there is to gain: `moeify_local` runs
a rank's own rows on the experts that it keeps, and sends none; `wire` sends them and has no layer.
It does not show how an exchange behaves on a network: the processes of one machine send through its
memory, by gloo, and with fewer cores than ranks they compute in turns, so that nothing overlaps.
For the same reason chunks that overlap, or two nodes of two ranks (`moeify_hierarchical`), can only
add cost here.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import race
from benchmarks.case import TOLERANCES, Case, Truth, Weights, compare, draw_tokens, truth
from benchmarks.exchange_peers import CONTESTANTS, Contestant, Layer
from benchmarks.layer import gradient_of
from benchmarks.peers import Refused

BASELINE = "plain"
TIMEOUT = timedelta(seconds=120)
T = TypeVar("T")


class Runner:
    """A contestant on this rank; a call runs one step and returns the slowest rank's seconds."""

    def __init__(self, contestant: Contestant, case: Case, weights: Weights, x: Tensor) -> None:
        self.contestant, self.case, self.x = contestant, case, x
        self.layer: Layer = contestant.build(case, weights)
        self.gradient = gradient_of(case)

    def step(self) -> tuple[Tensor, Tensor]:
        """Run forward and backward; return the output and the gradient of the tokens."""
        x = self.x.detach().requires_grad_()
        out = self.layer(x)
        out.backward(self.gradient)
        assert x.grad is not None
        return out, x.grad

    def check(self, want: Truth, experts: tuple[Tensor, ...]) -> dict[str, float]:
        """Return the error, and the tokens of this rank that lost a route.

        `experts` are the gradients of the experts from the baseline; none if this is the baseline.
        """
        self.layer.zero_grad()
        out, grad = self.step()
        if not self.contestant.is_layer:
            return {}
        assert want.grad is not None
        may_differ = want.dropped if self.contestant.drops else 0
        error, dropped = compare(out, want.out, self.case, may_differ)
        error = max(error, compare(grad, want.grad, self.case, may_differ)[0])
        if self.contestant.drops:
            return {"error": error, "dropped_tokens": dropped}
        for got, expected in zip(self.layer.expert_gradients(), experts, strict=False):
            gap = float((got - expected).abs().max() / expected.abs().max())
            if not gap <= TOLERANCES[self.case.dtype]:
                raise AssertionError(f"gradients of the experts are wrong by up to {gap:.2g}")
            error = max(error, gap)
        return {"error": error}

    def __call__(self) -> float:
        self.layer.zero_grad()
        dist.barrier()
        started = time.perf_counter()
        result = self.step()
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        del result
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return float(taken)

    def traffic(self) -> dict[str, Any]:
        """Return what one step sends: bytes of rank 0, and collectives by kind."""
        from moeify.simulate.counter import count

        self.layer.zero_grad()
        calls = count(self.step)
        sent = sum(call.per_peer * (len(call.ranks) - 1) for call in calls)
        return {"sent_mb": sent / 1e6, "collectives": dict(Counter(call.kind for call in calls))}


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run `action` on all ranks; if it fails on one, raise `Refused` on each, so none waits."""
    reason: str | None = None
    result: Any = None
    try:
        result = action()
    except Refused as refusal:
        reason = str(refusal)
    except AssertionError as error:
        reason = f"wrong: {error}"
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    reasons: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(reasons, reason)
    for rank, failure in enumerate(reasons):
        if failure is not None:
            raise Refused(failure if rank == 0 else f"{failure} (rank {rank})")
    done: T = result
    return done


def run_case(case: Case, names: Sequence[str], budget: float) -> dict[str, Any]:
    """Check, count and time contestants; ranks differ only in the errors that they return."""
    weights = Weights.drawn(case)
    x = draw_tokens(case, weights, seed=dist.get_rank())
    want = truth(case, weights, x, gradient_of(case))
    runners: dict[str, Runner] = {}
    contestants: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    experts: tuple[Tensor, ...] = ()
    for name in names:
        try:
            runner = run_on_all_ranks(partial(Runner, CONTESTANTS[name], case, weights, x))
            facts = run_on_all_ranks(partial(runner.check, want, experts))
        except Refused as refusal:
            skipped[name] = str(refusal)
        else:
            if name == BASELINE:
                experts = tuple(grad.clone() for grad in runner.layer.expert_gradients())
            runners[name], contestants[name] = runner, facts | runner.traffic()
    once = sum(runner() for runner in runners.values())
    samples = race.race(runners, budget, once)
    for name, times in samples.items():
        contestants[name]["ms"] = race.medians(times)
        contestants[name]["over_plain"] = race.ratios(times, samples[BASELINE])
        contestants[name]["rounds"] = len(times[0])
    return {"contestants": contestants, "skipped": skipped}


def table(key: str, found: dict[str, Any]) -> str:
    """Return the results of a case as text, the fastest first."""
    lines = [f"\n{key}"]
    rows = found["contestants"]
    for name in sorted(rows, key=lambda name: min(rows[name]["ms"])):
        row = rows[name]
        plain = " ".join(f"{ratio:6.2f}" for ratio in row["over_plain"])
        calls = ", ".join(f"{n} {kind}" for kind, n in sorted(row["collectives"].items()))
        notes = f"  error {row['error']:.0e}" if "error" in row else ""
        notes += f"  {row['dropped_tokens']} tokens dropped" if "dropped_tokens" in row else ""
        lines.append(
            f"  {name:26}{min(row['ms']):9.2f} ms  x plain {plain}  {row['sent_mb']:7.2f} MB"
            f"  {calls}{notes}"
        )
    lines += [f"  {name:26} skipped: {why}" for name, why in found.get("skipped", {}).items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 1 if one of our own contestants is wrong."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _options(given)
    if "RANK" not in os.environ:
        return launch("benchmarks.exchange", options.ranks, given)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    status = _run(options)
    dist.barrier()
    dist.destroy_process_group()
    return status


def launch(module: str, ranks: int, arguments: Sequence[str], **variables: str) -> int:
    """Run a module with torchrun, with extra environment variables; return its exit status."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = [sys.executable, *torchrun, "-m", module, *arguments]
    return subprocess.run(command, env=environment).returncode


def _run(options: argparse.Namespace) -> int:
    first, ranks = dist.get_rank() == 0, dist.get_world_size()
    results = race.Results(options.out if first else None)
    wrong = False
    for tokens, top_k in itertools.product(options.tokens, options.top_k):
        sizes = (options.width, options.hidden, options.experts, top_k, tokens)
        case = Case("cpu", "train", "fp32", 1, *sizes)
        key = f"{case.key} ranks={ranks}"
        names = options.contestants or list(CONTESTANTS)
        missing = [names if options.again else results.missing(key, names)]
        dist.broadcast_object_list(missing)
        if not missing[0]:
            continue
        run = [BASELINE, *(name for name in missing[0] if name != BASELINE)]
        found = run_case(case, run, options.budget)
        reasons = found["skipped"]
        wrong |= any(n.startswith("moeify") and r.startswith("wrong") for n, r in reasons.items())
        if first:
            described = dataclasses.asdict(case) | {"ranks": ranks}
            print(table(key, results.add(key, case=described, **found)), flush=True)
    return int(wrong)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    text, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.exchange", description=text, formatter_class=formatter
    )
    add = parser.add_argument
    add("--ranks", type=int, default=4, help="processes")
    add("--tokens", type=int, nargs="+", help="T; default 256 2048, quick 256")
    add("--top-k", type=int, nargs="+", default=[1, 2], help="K")
    add("--width", type=int, default=256, help="D")
    add("--hidden", type=int, default=1024, help="F")
    add("--experts", type=int, default=16, help="E")
    add("--contestants", nargs="+", choices=list(CONTESTANTS), help="default all")
    add("--quick", action="store_true", help="a table in about a minute")
    add("--budget", type=float, help="seconds of timing per case; default 60, quick 10")
    add("--again", action="store_true", help="measure also what --out holds already")
    add("--out", type=Path, help="JSON of results, added to if it is there")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or ([256] if options.quick else [256, 2048])
    options.budget = options.budget or (10.0 if options.quick else 60.0)
    return options


if __name__ == "__main__":
    sys.exit(main())
