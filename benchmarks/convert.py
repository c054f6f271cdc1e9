"""`moeify convert` on disk: time, CPU time and peak memory, next to a plain write and mergekit-moe.

    python -m benchmarks.convert --mergekit PATH/TO/mergekit-moe --out convert.json

A Llama-like checkpoint of random bfloat16 weights is made in the scratch folder (2.2 GB; removed at
the end). There are two jobs:

* `alternate`: 8 experts in every second layer, which mergekit-moe cannot do;
* `mixtral`: 4 experts in every layer, as a Mixtral, which both can do.

Every contestant is a process of its own, so that its peak memory is its own; rounds are
interleaved, because disks vary, with a pause before each run: a virtual machine returns freed
memory to its host after some seconds, and writing into memory that must be fetched again takes
three times as long, so a contestant that ran right after another's files were deleted would win.
`plain` writes as many bytes as the job's result has, with one `fsync` per file. Ratios are within
rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

SIZES = {
    "2GB": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22},
    "tiny": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
}
PLANS: dict[str, dict[str, Any]] = {
    "alternate": {"layers": [{"select": {"every": 2, "start": 1}, "experts": 8}]},
    "mixtral": {"layers": [{"select": "all", "experts": 4, "top_k": 2}]},
}
REST = 10
"""Seconds before each run."""

# A small process starts the contestant: a new process inherits the peak of the one before it.
LAUNCH = """
import json, os, subprocess, sys, time
started = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps({
    "seconds": time.perf_counter() - started,
    "cpu_seconds": usage.ru_utime + usage.ru_stime,
    "peak_mb": usage.ru_maxrss / 1024,
}))
sys.exit(os.waitstatus_to_exitcode(status))
"""
WRITE = """
import os, sys
path, left, shard = sys.argv[1], int(sys.argv[2]), 5 * 10**9
os.mkdir(path)
block, number = os.urandom(1 << 24), 0
while left:
    with open(f"{path}/{number}", "xb", buffering=0) as file:
        room = min(left, shard)
        while room:
            count = file.write(block[:room])
            room, left = room - count, left - count
        os.fsync(file.fileno())
    number += 1
"""


def make_source(folder: Path, size: str) -> None:
    """Write a random Llama and a tokenizer of bytes."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    vocabulary = 32000 if size != "tiny" else 256
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        num_attention_heads=SIZES[size]["hidden_size"] // 16 if size == "tiny" else 32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        **SIZES[size],
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<{i}>": i for i in range(3, 256)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def measure(command: list[str]) -> dict[str, float]:
    """Run a process and return its wall and CPU seconds and its peak memory."""
    time.sleep(REST)
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    launcher = [sys.executable, "-I", "-c", LAUNCH, *command]
    done = subprocess.run(launcher, capture_output=True, text=True, env=env)
    if done.returncode:
        text = (done.stdout + done.stderr)[-3000:]
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{text}")
    numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def commands(
    job: str, scratch: Path, source: Path, out: Path, mergekit: str | None, in_memory: bool
) -> dict[str, list[str]]:
    """Return what each contestant runs."""
    plan = scratch / f"{job}.json"
    plan.write_text(json.dumps({"version": 1, **PLANS[job]}))
    kind = "native" if job == "mixtral" else "custom"
    ours = [sys.executable, "-m", "moeify.cli.main", "convert", str(source), str(out)]
    ours += ["--plan", str(plan), "--export", kind, "--verify", "0"]
    found = {"moeify": ours}
    if in_memory:
        found["moeify in memory"] = [*ours, "--in-memory"]
    if job == "mixtral" and mergekit:
        experts = [{"source_model": str(source), "positive_prompts": [""]}] * 4
        config = scratch / "mergekit.json"  # YAML reads JSON
        common = {"base_model": str(source), "gate_mode": "random", "dtype": "bfloat16"}
        config.write_text(json.dumps({**common, "experts": experts}))
        found["mergekit-moe"] = [mergekit, str(config), str(out)]
    return found


def run(
    scratch: Path,
    size: str,
    rounds: int,
    mergekit: str | None,
    jobs: list[str],
    in_memory: bool = False,
) -> dict[str, Any]:
    """Make the checkpoint, run all jobs, and return the figures."""
    source, out = scratch / "source", scratch / "out"
    code = "import sys, pathlib; from benchmarks.convert import make_source"
    code += f"; make_source(pathlib.Path(sys.argv[1]), {size!r})"
    subprocess.run([sys.executable, "-c", code, str(source)], check=True)
    weights = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    results: dict[str, Any] = {"source_bytes": weights, "rounds": rounds, "jobs": {}}
    for job in jobs:
        contestants = commands(job, scratch, source, out, mergekit, in_memory)
        found: dict[str, list[dict[str, float]]] = {name: [] for name in (*contestants, "plain")}
        written = 0
        for _ in range(rounds):
            for name, command in contestants.items():
                numbers = measure(command)
                size_of = sum(p.stat().st_size for p in out.glob("*.safetensors"))
                if name == "moeify":
                    written = size_of
                found[name].append({**numbers, "bytes": size_of})
                shutil.rmtree(out)
            bare = measure([sys.executable, "-c", WRITE, str(out), str(written)])
            found["plain"].append({**bare, "bytes": written})
            shutil.rmtree(out)
        results["jobs"][job] = {
            name: _summary(runs, found["plain"]) for name, runs in found.items()
        }
    return results


def _summary(runs: list[dict[str, float]], plain: list[dict[str, float]]) -> dict[str, float]:
    """Return medians, and the median of the ratios to the plain write of the same round."""
    medians = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    pairs = list(zip(runs, plain, strict=True))
    for key in ("seconds", "cpu_seconds"):
        ratios = [one[key] / other[key] for one, other in pairs]
        medians[f"{key}_over_plain"] = statistics.median(ratios)
    return medians


def _versions(python: Path) -> dict[str, str]:
    """Return the versions in mergekit's environment."""
    names = ("mergekit", "torch", "transformers")
    code = f"import importlib.metadata as m; print(*(m.version(n) for n in {names}))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return {
        name if name == "mergekit" else f"mergekit's {name}": version
        for name, version in zip(names, done.stdout.split(), strict=True)
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convert", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--mergekit", help="mergekit-moe of an environment that has mergekit")
    parser.add_argument("--size", choices=SIZES, default="2GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--in-memory", action="store_true", help="run --in-memory as well")
    parser.add_argument("--scratch", type=Path, help="where 25 GB fit; the system's if not given")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    about = machine.describe()
    if options.mergekit:
        about |= _versions(Path(options.mergekit).parent / "python")
    for key, value in about.items():
        print(f"{key:13} {value}")
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        chosen = options.size, options.rounds, options.mergekit, options.jobs
        results = run(Path(folder), *chosen, options.in_memory)
    print(f"source: {results['source_bytes'] / 1e9:.2f} GB")
    for job, contestants in results["jobs"].items():
        print(f"\n{job}: seconds, CPU seconds, peak MB, GB written, seconds over a plain write")
        for name, n in contestants.items():
            print(
                f"  {name:18} {n['seconds']:7.1f} {n['cpu_seconds']:7.1f} {n['peak_mb']:8.0f} "
                f"{n['bytes'] / 1e9:6.2f} {n['seconds_over_plain']:6.2f}"
            )
    if options.out:
        options.out.write_text(json.dumps({"machine": about, **results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
