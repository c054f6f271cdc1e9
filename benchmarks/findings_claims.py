"""The papers' findings as differences of two contestants, and the test of each.

A finding is `reproduced` if the 95% t interval of the differences, paired by seed, lies on its
side; `not reproduced` if it lies wholly on the other; else `within noise`. "On par" means that the
interval's upper end is below a margin of 1% of the second contestant's mean.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

MARGIN = 0.01


@dataclass(frozen=True)
class Claim:
    """`first` has less of `metric` than `second`, or at most as much if `par`."""

    text: str
    source: str
    first: str
    second: str
    metric: str = "loss"
    par: bool = False


UP, DS, DROP = "Sparse upcycling", "DeepSpeed-MoE", "Drop-Upcycling"
CLAIMS = (
    Claim("Upcycling beats training the dense model on", UP, "copy", "continued"),
    Claim("Upcycling beats MoE from scratch at equal tokens", UP, "copy", "scratch"),
    Claim("Copies are on par with noisy copies", UP, "copy", "noise", par=True),
    Claim("Re-drawing half of the neurons beats copies", DROP, "drop", "copy"),
    Claim("MoE from scratch beats dense at equal tokens", DS, "scratch", "continued"),
    Claim("Second half beats first half", DS, "second half", "first half"),
    Claim("Every other layer beats the first half", DS, "copy", "first half"),
    Claim("Residual is on par with top-2", DS, "residual", "top-2", par=True),
    Claim("A step of residual is faster than of top-2", DS, "residual", "top-2", "step_seconds"),
    Claim("PR-MoE is on par with standard MoE", DS, "pr-moe", "copy", par=True),
    Claim("PR-MoE has fewer parameters", DS, "pr-moe", "copy", "parameters"),
    Claim("Staged KD beats KD to the end", DS, "student staged", "student KD"),
    Claim("Staged KD beats no KD", DS, "student staged", "student"),
    Claim(
        "A student with staged KD is on par with its teacher",
        DS,
        "student staged",
        "pr-moe",
        par=True,
    ),
    Claim("Random selection beats position", "DeepSpeed", "tight random", "tight position"),
    Claim("Straight-through starts lower", "moeify", "copy", "probability", "first_loss"),
    Claim("Straight-through ends lower", "moeify", "copy", "probability"),
    Claim("MoE beats dense at equal active FLOPs", DS, "copy, equal FLOPs", "continued"),
    Claim("MoE beats dense at equal time on this machine", DS, "copy, equal time", "continued"),
)


def judge(claim: Claim, first: list[float], second: list[float]) -> dict[str, Any]:
    """Return mean difference, half width of its 95% interval and the verdict, paired by place."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if claim.metric == "parameters":  # counted, not drawn: there is no noise
        gap = differences[0]
        return {"difference": gap, "verdict": "reproduced" if gap < 0 else "not reproduced"}
    if len(differences) < 2:
        return {"verdict": "too few seeds"}
    from scipy.stats import t

    mean, count = statistics.mean(differences), len(differences)
    half = float(t.ppf(0.975, count - 1)) * statistics.stdev(differences) / math.sqrt(count)
    bar = MARGIN * statistics.mean(second) if claim.par else 0.0
    verdict = "within noise"
    if mean + half < bar:
        verdict = "reproduced"
    elif mean - half > bar:
        verdict = "not reproduced"
    means = {"first": statistics.mean(first), "second": statistics.mean(second)}
    return {"difference": mean, "half_width": half, "n": count, "verdict": verdict} | means


def values(results: dict[str, Any], name: str, metric: str) -> list[float]:
    """Return a contestant's metric by seed (by timed round for `step_seconds`)."""
    if metric == "step_seconds":
        return list(results["costs"].get(name, {}).get("seconds", []))
    runs = sorted((r for r in results["jobs"] if r["job"] == name), key=lambda r: r["seed"])
    if metric == "first_loss":
        return [run["curve"][0]["loss"] for run in runs]
    return [float(run[metric]) for run in runs]


def verdicts(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Judge every claim; those without runs are `not run`."""
    found = []
    for claim in CLAIMS:
        pair = [values(results, name, claim.metric) for name in (claim.first, claim.second)]
        whole = all(pair) and len(pair[0]) == len(pair[1])
        said = judge(claim, *pair) if whole else {"verdict": "not run"}
        found.append(
            {
                "claim": claim.text,
                "source": claim.source,
                "metric": claim.metric,
                "pair": [claim.first, claim.second],
            }
            | said
        )
    return found
