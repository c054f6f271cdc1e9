"""The gate alone: time and memory from tokens or logits to the routing table.

    python -m benchmarks.gate --quick --out results-gate.json
    python -m benchmarks.gate --memory --out results-gate.json

Peers are given the logits, and run once more with the router's linear. Ours computes the logits
inside; `moeify` without the linear is its time less that of the linear alone, round by round, and
notes where little is left of the difference. It also returns balance loss, z-loss, entropy and
counts, as DeepSpeed's gates return loss and counts; transformers' and the plain sort return none of
these. All times are relative to the plain sort: softmax, top-k, stable argsort, bincount.

Memory is the peak of one call with the linear, beyond tokens and weights, each contestant in a
process of its own. The logits are T x E floats; all else should grow with T x K.

Shapes: T tokens, D model width, E experts, K top-k, C capacity.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import machine, race
from benchmarks.case import CAPACITY_FACTOR, DTYPES, MIN_CAPACITY, Case, Weights, draw_tokens
from benchmarks.peers import Refused, einsum_gate, start_deepspeed

LINEAR = " + linear"
BASELINE = "sort"
LEAST_REST = 0.1

Gate = Callable[[Tensor], tuple[Any, Callable[[], Tensor]]]
"""Runs on the logits [T, E], or on the tokens [T, D], and returns its result, and how to count the
routes that it keeps."""


def _choose(case: Case, logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, ids = logits.float().softmax(-1).topk(case.top_k, -1)
    return (weights / weights.sum(-1, keepdim=True) if case.top_k > 1 else weights), ids


def _sort(case: Case, weights: Weights) -> Gate:
    def gate(logits: Tensor) -> tuple[Any, Callable[[], Tensor]]:
        chosen, ids = _choose(case, logits)
        order = ids.flatten().argsort(stable=True)
        counts = torch.bincount(ids.flatten(), minlength=case.experts)
        return (chosen, order, counts), counts.sum

    return gate


def _transformers(case: Case, weights: Weights) -> Gate:
    """Router of transformers, and what its grouped_mm experts do before the first matmul."""

    def gate(logits: Tensor) -> tuple[Any, Callable[[], Tensor]]:
        chosen, ids = _choose(case, logits)
        experts, order = ids.flatten().sort()
        values = experts.float() if case.device == "cpu" else experts.int()
        counts = torch.histc(values, bins=case.experts, min=0, max=case.experts - 1)
        offsets = counts.cumsum(0, dtype=torch.int32)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return (chosen.to(logits.dtype), order, offsets, back), counts.sum

    return gate


def _einsum(case: Case, weights: Weights) -> Gate:
    """GShard's combine tensor and mask [T, E, C]."""
    _fits(3 * 4.0 * case.tokens * case.experts * case.capacity, case)

    def gate(logits: Tensor) -> tuple[Any, Callable[[], Tensor]]:
        combine = einsum_gate(*_choose(case, logits), case.experts, case.capacity)
        mask = combine.bool()
        return (combine, mask), mask.sum

    return gate


def _deepspeed(case: Case, weights: Weights, sparse: bool) -> Gate:
    """DeepSpeed's gate functions: gather tables (0.19), or masks [T, E, C] (all versions)."""
    try:
        start_deepspeed(case.device)
        moe = importlib.import_module("deepspeed.moe.sharded_moe")
    except ImportError as error:
        raise Refused(f"deepspeed is not installed or does not load: {error}") from None
    options: dict[str, Any] = {}
    if hasattr(moe, "_route_slots"):
        options["sparse_routes"] = sparse
    elif sparse:
        raise Refused(f"DeepSpeed {machine.versions().get('deepspeed')} has no gather tables")
    if not sparse:
        _fits(3 * 4.0 * case.tokens * case.experts * case.capacity, case)
    if case.top_k == 2:
        options["top2_2nd_expert_sampling"] = False
    limits = (CAPACITY_FACTOR, MIN_CAPACITY)

    def gate(logits: Tensor) -> tuple[Any, Callable[[], Tensor]]:
        if case.top_k == 1:
            found = moe.top1gating(logits.float(), *limits, **options)
        elif case.top_k == 2:
            found = moe.top2gating(logits.float(), *limits, **options)
        else:
            found = moe.topkgating(logits.float(), case.top_k, *limits, **options)
        if not sparse:
            return found, found[2].sum
        _, capacity, experts, indices, locations, *_ = found
        slots = moe._route_slots(indices, locations, experts, int(capacity))
        table = slots.new_full((experts * int(capacity) + 1,), case.tokens)
        source = torch.arange(case.tokens, device=slots.device).expand_as(slots)
        table.scatter_(0, slots.reshape(-1), source.reshape(-1))
        return (found, table), (indices >= 0).sum

    return gate


def _moeify(case: Case, weights: Weights, capacity: bool, kernel: str) -> Gate:
    from moeify.kernels.registry import reference_only
    from moeify.nn.router import Router

    router = Router(
        case.width,
        experts=case.experts,
        top_k=case.top_k,
        combine="normalized" if case.top_k > 1 else "probability",
        capacity_factor=CAPACITY_FACTOR if capacity else None,
        min_capacity=MIN_CAPACITY,
        drop="random" if case.top_k == 1 else "position",
        device=case.device,
        dtype=case.torch_dtype,
    )
    router.weight.data = weights.router

    def gate(tokens: Tensor) -> tuple[Any, Callable[[], Tensor]]:
        routing = router(tokens)
        return routing, lambda: routing.offsets[-1]

    def by_reference(tokens: Tensor) -> tuple[Any, Callable[[], Tensor]]:
        with reference_only():
            return gate(tokens)

    return by_reference if kernel == "reference" else gate


def _fits(size: float, case: Case) -> None:
    free = machine.available_bytes(case.device)
    if size > 0.5 * free:
        raise Refused(f"its masks take about {size / 1e9:.0f} GB; {free / 1e9:.0f} GB are free")


PEERS: dict[str, Callable[[Case, Weights], Gate]] = {
    "sort": _sort,
    "transformers": _transformers,
    "einsum": _einsum,
    "deepspeed": lambda case, weights: _deepspeed(case, weights, sparse=True),
    "deepspeed_masks": lambda case, weights: _deepspeed(case, weights, sparse=False),
}
OURS: dict[str, Callable[[Case, Weights], Gate]] = {
    "moeify": lambda case, weights: _moeify(case, weights, False, "auto"),
    "moeify_capacity": lambda case, weights: _moeify(case, weights, True, "auto"),
    "moeify_reference": lambda case, weights: _moeify(case, weights, False, "reference"),
}
WITH_CAPACITY = ("einsum", "deepspeed", "deepspeed_masks", "moeify_capacity")


def entries(case: Case, weights: Weights, name: str) -> dict[str, Gate]:
    """Return a contestant's gates on the tokens [T, D], by name; peers also on the logits."""
    if name in OURS:
        return {name + LINEAR: OURS[name](case, weights)}
    gate = PEERS[name](case, weights)
    return {name: gate, name + LINEAR: lambda x: gate(F.linear(x, weights.router))}


def run_case(case: Case, weights: Weights, names: Sequence[str], budget: float) -> dict[str, Any]:
    """Check and time contestants; return `contestants` and `skipped`."""
    x = draw_tokens(case, weights, 0)
    with torch.no_grad():
        logits = F.linear(x, weights.router)
        ids = logits.float().topk(case.top_k).indices
        counts = torch.bincount(ids.flatten(), minlength=case.experts)
        under_capacity = int(counts.clamp_max(case.capacity).sum())
        clock = machine.stopwatch(case.device)
        steps: dict[str, race.Step] = {"linear": lambda: clock(lambda: F.linear(x, weights.router))}
        facts: dict[str, dict[str, Any]] = {"linear": {}}
        skipped: dict[str, str] = {}
        for name in names:
            try:
                for entry, gate in entries(case, weights, name).items():
                    given = x if entry.endswith(LINEAR) else logits
                    kept = int(gate(given)[1]())
                    want = under_capacity if name in WITH_CAPACITY else case.rows
                    if kept != want:
                        raise AssertionError(f"wrong: keeps {kept} routes, not {want}")
                    facts[entry] = {"kept_routes": kept}
                    steps[entry] = lambda gate=gate, given=given: clock(  # type: ignore[misc]
                        lambda: gate(given)
                    )
            except (Refused, AssertionError) as refusal:
                skipped[name] = str(refusal)
        samples = race.race(steps, budget)
    for name in OURS:
        if name + LINEAR in samples:
            pairs = zip(samples[name + LINEAR], samples["linear"], strict=True)
            samples[name] = [[a - b for a, b in zip(*pair, strict=True)] for pair in pairs]
            facts[name] = dict(facts[name + LINEAR])
            if min(race.medians(samples[name])) < LEAST_REST * min(race.medians(samples["linear"])):
                facts[name]["note"] = "within the noise of the linear"
    contestants = {}
    for entry, times in samples.items():
        base = BASELINE + LINEAR if entry.endswith(LINEAR) else BASELINE
        contestants[entry] = {
            **facts[entry],
            "ms": race.medians(times),
            "over_sort": race.ratios(times, samples[base]),
            "rounds": len(times[0]),
        }
    return {"contestants": contestants, "skipped": skipped}


def peak_of(name: str, case: Case) -> dict[str, Any]:
    """Return the peak memory of one call with the linear, in this process."""
    machine.pin(case.threads)
    weights = Weights.drawn(case)
    x = draw_tokens(case, weights, 0)
    try:
        gate = entries(case, weights, name)[name + LINEAR]
    except Refused as refusal:
        return {"refused": str(refusal)}
    with torch.no_grad():
        gate(x)
        peak = race.peak_bytes(lambda: gate(x), case.device)
    return {"peak_mb": peak / 1e6, "bytes_per_route": peak / case.rows}


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Yield the cases; experts have no width here."""
    axes = (options.threads, options.dtype, options.experts, options.top_k, options.tokens)
    for threads, dtype, experts, top_k, tokens in itertools.product(*axes):
        yield Case(options.device, "gate", dtype, threads, options.width, 1, experts, top_k, tokens)


def table(case: Case, found: dict[str, Any]) -> str:
    """Return the results of a case as text, the fastest first."""
    lines = [f"\n{case.key}"]
    rows = found.get("contestants", {})
    for name in sorted(rows, key=lambda name: min(rows[name]["ms"])):
        row = rows[name]
        over = " ".join(f"{ratio:7.2f}" for ratio in row["over_sort"])
        note = f"  {row['note']}" if "note" in row else ""
        lines.append(f"  {name:34}{min(row['ms']):10.3f} ms  x sort {over}{note}")
    for name, row in found.get("memory", {}).items():
        peak = row.get("refused") or (
            f"{row['peak_mb']:10.1f} MB, {row['bytes_per_route']:.0f} bytes a route"
        )
        lines.append(f"  {name:34} peak {peak}")
    lines += [f"  {name:34} skipped: {why}" for name, why in found.get("skipped", {}).items()]
    return "\n".join(lines)


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
    for case in cases(options):
        names = options.contestants or [*PEERS, *OURS]
        missing = names if options.again else results.missing(case.key, names, options.memory)
        if not missing:
            continue
        if options.memory:
            found = race.memory_of("benchmarks.gate", case, missing, options.deepspeed)
        else:
            machine.pin(case.threads)
            run = [BASELINE, *(name for name in missing if name != BASELINE)]
            found = run_case(case, Weights.drawn(case), run, options.budget)
        print(table(case, results.add(case.key, case=dataclasses.asdict(case), **found)))
        reasons = found.get("skipped", {})
        wrong |= any(name in OURS and why.startswith("wrong") for name, why in reasons.items())
    return int(wrong)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    text, formatter = __doc__, argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gate", description=text, formatter_class=formatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, nargs="+", default=[1])
    add("--dtype", nargs="+", choices=list(DTYPES), default=["fp32"])
    add("--tokens", type=int, nargs="+", help="T; default 4096 8192 16384 32768")
    add("--experts", type=int, nargs="+", help="E; default 64 128 256 512")
    add("--top-k", type=int, nargs="+", default=[1, 2])
    add("--width", type=int, default=1024, help="D")
    add("--contestants", nargs="+", choices=[*PEERS, *OURS])
    add("--quick", action="store_true", help="the corners only, in about two minutes")
    add("--memory", action="store_true", help="peak memory of a call instead of its time")
    add("--budget", type=float, help="seconds of timing per case; default 10, quick 4")
    add("--again", action="store_true", help="measure also what --out holds already")
    add("--deepspeed", type=Path, help="folder of another DeepSpeed, put first on the path")
    add("--out", type=Path, help="JSON of results, added to if it is there")
    add("--peak", choices=[*PEERS, *OURS], help=argparse.SUPPRESS)
    add("--case", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quick = options.quick
    options.tokens = options.tokens or ([4096, 32768] if quick else [4096, 8192, 16384, 32768])
    options.experts = options.experts or ([64, 512] if quick else [64, 128, 256, 512])
    options.budget = options.budget or (4.0 if quick else 10.0)
    return options


if __name__ == "__main__":
    sys.exit(main())
