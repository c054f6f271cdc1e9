"""The papers' findings on real text: dense, upcycled, from scratch, pyramids and students.

    python -m benchmarks.findings --size tiny --out FOLDER [--minutes 8]
    python -m benchmarks.findings --page RESULTS.json

Every (contestant, seed) is a job with a file of its own; jobs that are done are not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    findings_claims,
    findings_page,
    findings_study,
    findings_text,
    findings_train,
    machine,
)
from benchmarks.findings_train import Job

COSTS = "costs.json"
ROUNDS = 7
"""Timed rounds of one step of every contestant."""


def chosen(size: findings_study.Size, only: Sequence[str] | None) -> list[str]:
    """Return the contestants to run: all, or some and those that they need.

    Raises:
        SystemExit: There is no such contestant.
    """
    known = findings_study.contestants(size)
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise SystemExit(f"--only: no contestant {unknown[0]!r}; there are {', '.join(known)}")
    wanted = set(only or known) | {findings_study.BASELINE}
    wanted |= {str(known[name].after) for name in wanted}
    return [name for name in known if name in wanted]


def jobs(names: Sequence[str], seeds: int) -> list[Job]:
    """Return all jobs, what others start from first."""
    return [Job(name, seed) for name in (findings_study.DENSE, *names) for seed in range(seeds)]


def one(job: Job, size: findings_study.Size, folder: Path) -> float:
    """Run a job, write its file, and return its seconds."""
    torch.set_num_threads(1 if size.workers > 1 else 2)
    costs = json.loads((folder / COSTS).read_text())["costs"]
    found = findings_train.run(job, size, _corpus(), folder, costs)
    write(folder / f"{job.file}.json", found | _terms(size))
    return float(found["seconds"])


def write(path: Path, content: Any) -> None:
    """Write JSON, all or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def done(job: Job, size: findings_study.Size, folder: Path) -> bool:
    """Return whether a job has run; SystemExit if it ran with other settings."""
    path = folder / f"{job.file}.json"
    return path.exists() and bool(_read(path, size))


def _terms(size: findings_study.Size) -> dict[str, Any]:
    """Return what all files of a folder must agree in."""
    return {"settings": asdict(size), "text": _corpus().facts["sha256"]}


def _read(path: Path, size: findings_study.Size) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    terms = _terms(size)
    if {name: content.get(name) for name in terms} != terms:
        raise SystemExit(f"{path} is of other settings or another text: use another --out")
    return content


def study(todo: Sequence[Job], size: findings_study.Size, folder: Path, minutes: float) -> bool:
    """Run what is missing, in this order; return False if time ran out before all was done."""
    end, longest = time.monotonic() + 60 * minutes, 0.0
    left = [job for job in todo if not done(job, size, folder)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(size.workers, mp_context=context) as pool:
        running: dict[Future[float], Job] = {}
        while left or running:
            for job in list(left):
                ready = all(done(need, size, folder) for need in job.needs(size))
                if len(running) == size.workers or time.monotonic() + longest > end:
                    break
                if ready:
                    left.remove(job)
                    running[pool.submit(one, job, size, folder)] = job
            if not running:
                return False
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                longest = max(longest, future.result())
                print(f"{job.file} {future.result():.0f} s, {len(left)} left", flush=True)
    return True


def costs(
    names: Sequence[str], size: findings_study.Size, rounds: int, folder: Path
) -> findings_train.Costs:
    """Time a step of every contestant, alone on the machine, in turn; the first is not counted.

    Once per folder: budgets of time follow from it.
    """
    path = folder / COSTS
    if path.exists():
        known: findings_train.Costs = _read(path, size)["costs"]
        missing = [name for name in names if name not in known]
        if missing:
            raise SystemExit(f"{path} has no {missing[0]!r}, timed with the others: another --out")
        return known
    torch.set_num_threads(2)
    corpus = _corpus()
    timers = {name: findings_train.step_timer(name, size, corpus) for name in names}
    table = [{name: step() for name, (_, step) in timers.items()} for _ in range(rounds + 1)]
    found = {
        name: {"seconds": [row[name] for row in table[1:]], "flops": [flops]}
        for name, (flops, _) in timers.items()
    }
    write(path, {"costs": found} | _terms(size))
    return found


@functools.cache
def _corpus() -> findings_text.Corpus:
    return findings_text.read()  # 3 s: once per process


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 2 if some jobs are left."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.findings", description=__doc__)
    parser.add_argument("--size", choices=("tiny", "small"), default="tiny")
    parser.add_argument("--out", type=Path, default=Path("findings"))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--steps", type=int, help="a rehearsal of so many steps")
    parser.add_argument("--only", nargs="+", metavar="CONTESTANT", help="these, not all")
    parser.add_argument("--minutes", type=float, default=1e6, help="start no job that ends later")
    parser.add_argument("--page", type=Path, help="write docs/findings.md from these results")
    options = parser.parse_args(arguments)
    if options.page:
        text = findings_page.page(json.loads(options.page.read_text()), options.page)
        (Path(__file__).parents[1] / "docs" / "findings.md").write_text(text)
        return 0
    size = findings_study.tiny()
    if options.size == "small":
        size = findings_study.small("cuda" if torch.cuda.is_available() else "cpu")
    size = size if options.steps is None else size.shortened(options.steps)
    names = chosen(size, options.only)
    todo = jobs(names, options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    cost = costs(names, size, ROUNDS if options.steps is None else 2, options.out)
    if not study(todo, size, options.out, options.minutes):
        print("not finished: run the same command again")
        return 2
    found = [json.loads((options.out / f"{job.file}.json").read_text()) for job in todo]
    results = {
        "size": asdict(size),
        "machine": machine.describe(),
        "text": _corpus().facts,
        "jobs": found,
        "costs": cost,
    }
    results["findings"] = findings_claims.verdicts(results)
    write(options.out / "results.json", results)
    findings_page.draw(results, options.out / "results.png")
    print(findings_page.page(results, options.out / "results.json"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
