"""Time and memory of finding, planning and converting; conversion against a plain copy.

Every case runs several times, each in a process of its own, so that the peak memory is its own; the
table has medians. A conversion that copies must write its experts, so its cost is compared with
`copy_` of as many bytes into fresh memory, measured alternately in the same process.
"""

from __future__ import annotations

import copy
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

ROUNDS = 3


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _gpt2_350m() -> Any:
    import transformers as hf

    config = hf.GPT2Config(n_layer=24, n_embd=1024, n_head=16)
    return hf.GPT2LMHeadModel(config)


def _llama_8b() -> Any:
    import transformers as hf

    config = hf.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    return hf.LlamaForCausalLM(config)


def plan_on_meta(build: Callable[[], Any]) -> dict[str, float]:
    """Find the MLPs of a model on `meta` and resolve a pr-moe plan."""
    import torch

    from moeify.hf.detect import example_inputs_for
    from moeify.plan.plan import Plan
    from moeify.plan.resolve import resolve_sites
    from moeify.sites.discovery import discover

    with torch.device("meta"):
        model = build()
    base = _peak_mb()
    started = time.perf_counter()
    found = discover(model, example_inputs_for(model))
    captured = found.capture.seconds
    resolved = resolve_sites(
        Plan.preset("pr-moe", experts=32, last=64),
        found.sites,
        parameters=found.parameters,
        parameter_bytes=found.parameter_bytes,
    )
    total = time.perf_counter() - started
    return {
        "sites": len(found.sites),
        "layers": len(resolved),
        "capture_s": captured,
        "all_s": total,
        "peak_mb": _peak_mb(),
        "over_imports_mb": _peak_mb() - base,
    }


def convert_against_copy() -> dict[str, float]:
    """Convert a 24-layer GPT-2 with 8 experts in every other layer, against copying its bytes."""
    import torch

    import moeify as mf
    from moeify.hf.detect import example_inputs_for

    torch.set_num_threads(2)
    plan = mf.Plan.preset("moe", experts=8)
    ratios, seconds, verified = [], [], []
    source = _gpt2_350m().eval()
    for _ in range(ROUNDS):
        model = copy.deepcopy(source)
        inputs = example_inputs_for(model)
        started = time.perf_counter()
        mf.moeify(model, plan, example_inputs=inputs, verify=False)
        took = time.perf_counter() - started
        made = [p for n, p in model.named_parameters() if ".experts." in n]
        started = time.perf_counter()
        copies = [torch.empty_like(p).copy_(p) for p in made]
        copied = time.perf_counter() - started
        ratios.append(took / copied)
        seconds.append(took)
        size = sum(p.numel() * p.element_size() for p in made)
        del copies, made, model
        model = copy.deepcopy(source)
        started = time.perf_counter()
        mf.moeify(model, plan, example_inputs=inputs)
        verified.append(time.perf_counter() - started)
        del model
    return {
        "bytes_gb": size / 1e9,
        "convert_s": statistics.median(seconds),
        "over_copy": statistics.median(ratios),
        "with_verification_s": statistics.median(verified),
        "peak_mb": _peak_mb(),
    }


CASES: dict[str, Callable[[], dict[str, float]]] = {
    "plan GPT-2 350M on meta": lambda: plan_on_meta(_gpt2_350m),
    "plan Llama 8B on meta": lambda: plan_on_meta(_llama_8b),
    "convert GPT-2 350M, 8 experts": convert_against_copy,
}


def run() -> dict[str, dict[str, float]]:
    """Run every case in fresh processes and return medians."""
    results = {}
    for name in CASES:
        runs = [_in_process(name) for _ in range(1 if name.startswith("convert") else 3)]
        results[name] = {key: statistics.median(r[key] for r in runs) for key in runs[0]}
    return results


def _in_process(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.conversion", name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    print(json.dumps(CASES[sys.argv[1]]()))
