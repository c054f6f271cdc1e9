"""Timing in turns, peak memory in a process of its own, and files of results.

All contestants of a case run in one process, once in every round and in a different order each
time: whatever slows the machine for a while slows all of them, and none always inherits the caches
and the heap of the same predecessor. Medians of the ratios *within* a round are compared, in two
sets; the difference between the sets is the noise.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.case import Case

SETS, FEWEST_ROUNDS, MOST_ROUNDS = 2, 3, 60

Samples = dict[str, list[list[float]]]
"""Seconds by contestant, set and round."""

Step = Callable[[], float]
"""Runs a contestant once and returns the seconds it took."""


def race(steps: Mapping[str, Step], budget: float, once: float | None = None) -> Samples:
    """Run all contestants in turn for about `budget` seconds.

    Args:
        steps: The contestants.
        budget: Seconds for all rounds; a few rounds are run in any case.
        once: Seconds of one round; measured by a round that does not count if None.
    """
    names = list(steps)
    if once is None:
        started = time.perf_counter()
        for step in steps.values():
            step()
        once = time.perf_counter() - started
    rounds = min(max(int(budget / SETS / max(once, 1e-9)), FEWEST_ROUNDS), MOST_ROUNDS)
    samples: Samples = {name: [] for name in names}
    shuffle = random.Random(0).shuffle
    for _ in range(SETS):
        for name in steps:
            samples[name].append([])
        for _ in range(rounds):
            shuffle(names)
            for name in names:
                samples[name][-1].append(steps[name]())
    return samples


def medians(times: Sequence[Sequence[float]]) -> list[float]:
    """Return the median milliseconds of each set."""
    return [1000 * statistics.median(each) for each in times]


def ratios(times: Sequence[Sequence[float]], base: Sequence[Sequence[float]]) -> list[float]:
    """Return, for each set, the median over rounds of time over the baseline's time."""
    return [
        statistics.median(a / b for a, b in zip(mine, theirs, strict=True))
        for mine, theirs in zip(times, base, strict=True)
    ]


def peak_bytes(step: Callable[[], object], device: str) -> int:
    """Return how much memory a call takes beyond what was there before it.

    On a CPU the peak of the resident set, which counts what the matmul library takes as well as
    what torch does; the kernel's high-water mark is reset first. Only meaningful where freed blocks
    go back to the system, as in the processes of `memory_of`.

    Raises:
        NotImplementedError: The system has no such mark.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    mark = Path("/proc/self/clear_refs")
    if not mark.exists():
        raise NotImplementedError("peak memory of a CPU step is read from /proc, on Linux")
    mark.write_text("5")
    before = _status("VmRSS")
    kept = step()
    peak = _status("VmHWM")
    del kept
    return peak - before


def memory_of(
    module: str, case: Case, names: Sequence[str], deepspeed: Path | None
) -> dict[str, dict[str, Any]]:
    """Return `memory`: what `python -m module --peak NAME --case CASE` says of each contestant."""
    given = ["--case", json.dumps(dataclasses.asdict(case))]
    given += ["--deepspeed", str(deepspeed)] if deepspeed else []
    return {"memory": {name: _in_process(module, "--peak", name, *given) for name in names}}


def _in_process(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module in a fresh process and return the JSON on its last line.

    The allocator returns freed memory at once, so that blocks of earlier steps do not hide in the
    resident set.
    """
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": str(2**16),
        "MALLOC_TRIM_THRESHOLD_": str(2**16),
    }
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        return {"refused": reason}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


class Results:
    """A file of cases that grows with each run; a case is measured again only on demand.

    Args:
        path: The file, or None to keep nothing.

    Raises:
        SystemExit: The file was measured on other hardware.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        here = machine.describe()
        self.data: dict[str, Any] = {"machine": here, "ceilings": {}, "cases": {}}
        if path is not None and path.exists():
            self.data = json.loads(path.read_text())
            there = self.data["machine"]
            for name in ("cpu", "cores", "gpu"):
                if there.get(name) != here.get(name):
                    raise SystemExit(
                        f"{path}: measured with {name} {there.get(name)}, here it is "
                        f"{here.get(name)}; give another --out"
                    )

    def ceilings(self, device: str, dtype: str, threads: int) -> dict[str, float]:
        """Return what the hardware does at best, measured once per file."""
        key = f"device={device} dtype={dtype} threads={threads}"
        if key not in self.data["ceilings"]:
            measured = machine.ceilings(device, getattr(torch, _LONG[dtype]))
            self.data["ceilings"][key] = measured
        found: dict[str, float] = self.data["ceilings"][key]
        return found

    def missing(self, key: str, names: Sequence[str], memory: bool = False) -> list[str]:
        """Return which contestants have neither a result nor a reason in a case."""
        case = self.data["cases"].get(key, {})
        there = case.get("memory", {}) if memory else _times_of(case)
        return [name for name in names if machine.label(name) not in there]

    def add(self, key: str, **parts: Any) -> dict[str, Any]:
        """Merge parts into a case, with date, load and versions, and write the file."""
        case: dict[str, Any] = self.data["cases"].setdefault(key, {})
        case["date"] = time.strftime("%Y-%m-%d %H:%M:%S")
        case["load"] = round(os.getloadavg()[0], 2)
        case["versions"] = case.get("versions", {}) | machine.versions()
        case["environment"] = machine.environment()
        for name, part in parts.items():
            if name in ("contestants", "skipped", "memory"):
                labelled = {machine.label(key): value for key, value in part.items()}
                case.setdefault(name, {}).update(labelled)
            else:
                case[name] = part
        for name in case.get("contestants", {}):
            case.get("skipped", {}).pop(name, None)
        if self.path is not None:
            fresh = self.path.with_suffix(".tmp")
            fresh.write_text(json.dumps(self.data, indent=1) + "\n")
            fresh.replace(self.path)
        return case


def _times_of(case: dict[str, Any]) -> dict[str, Any]:
    return {**case.get("contestants", {}), **case.get("skipped", {})}


_LONG = {"fp32": "float32", "bf16": "bfloat16"}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise NotImplementedError(f"/proc/self/status has no {field}")
