"""Compares a written folder with its dense source in a process of its own, as a reader would.

The process loads the source, runs it on random inputs, lets go of it, loads the folder with what is
to read it (transformers alone, transformers with the folder's code, or `moeify.load`), and runs it.
Run as a module this file is that process: a JSON question on standard input, a JSON answer on
standard output.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify import compat
from moeify.capture.torch_calls import tensors_in
from moeify.checkpoint import single
from moeify.convert.verify import TOLERANCE, Snapshot, coarsest, compare
from moeify.errors import MoeifyError, VerificationError
from moeify.hf.detect import example_inputs_for
from moeify.hf.local_folder import load_dense, transformers_offline
from moeify.nn.router import lifted_capacity

_SPARE = 500 * 10**6
"""Bytes that a process needs beside a model."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a comparison.

    Attributes:
        difference: Largest difference of the outputs over the largest value; None if not compared.
        inputs: On how many inputs.
        tolerance: What a plan that promises the dense numbers is held to.
        promised: Whether the plan does.
        reason: Why nothing was compared, or "".
    """

    difference: float | None
    inputs: int
    tolerance: float
    promised: bool
    reason: str = ""


def verify(
    source: Path,
    folder: Path,
    kind: str,
    *,
    source_kind: str = "dense",
    inputs: int,
    promised: bool,
    dtype: str | None,
    needed: int,
    shown_as: Path | None = None,
) -> Verdict:
    """Compare in a fresh process.

    Args:
        source: Folder that it was made from.
        folder: What was written.
        kind: Its kind, see `ModelFiles`.
        source_kind: What the source is; a converted one for the way back.
        inputs: How many random inputs; 0 compares nothing.
        promised: Whether the numbers must be the same.
        dtype: Name of the torch dtype to load the dense model in; the config's if None.
        needed: Bytes of the larger of the two models.
        shown_as: What to call `folder` in messages.

    Raises:
        VerificationError: The folder cannot be loaded, or its model gives other numbers.
    """
    if inputs == 0:
        return Verdict(None, 0, 0.0, promised, "--verify 0")
    free = available_memory()
    if free is not None and free < needed + _SPARE:
        reason = f"it needs {needed + _SPARE:,} bytes of memory, and {free:,} are free"
        return Verdict(None, 0, 0.0, promised, reason)
    question = {
        "source": str(source.resolve()),
        "folder": str(folder.resolve()),
        "kinds": [source_kind, kind],
        "inputs": inputs,
        "dtype": dtype,
    }
    answer = _ask(question, folder if shown_as is None else shown_as)
    difference, tolerance = float(answer["difference"]), float(answer["tolerance"])
    if promised and not difference <= tolerance:
        raise VerificationError(
            f"the converted model's outputs differ from the dense model's by {difference:.2e} "
            f"(relative; {tolerance:.0e} is allowed), and this plan promises the same: it was not "
            "put in place. Please report this with the plan and the model"
        )
    return Verdict(difference, int(answer["inputs"]), tolerance, promised)


def _ask(question: dict[str, Any], shown: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moeify-") as scratch:
        here = str(Path(__file__).resolve().parents[1])
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "HF_MODULES_CACHE": scratch,  # where transformers copies a folder's code to
            "TRANSFORMERS_VERBOSITY": "error",
        }
        done = subprocess.run(
            [sys.executable, "-m", "moeify.cli.convert_check"],
            input=json.dumps(question),
            env=env,
            capture_output=True,
            text=True,
            check=False,
        )
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode < 0:
        raise VerificationError(
            f"{shown}: the process that compares it was killed by signal {-done.returncode} "
            "(out of memory?): --verify 0 leaves the comparison out"
        )
    try:
        answer = json.loads(last)
    except ValueError:
        tail = done.stderr.strip()[-2000:]
        raise VerificationError(f"{shown}: cannot be compared with its source: {tail}") from None
    if "error" in answer:
        raise VerificationError(f"{shown}: {answer['error']}")
    found: dict[str, Any] = answer
    return found


def available_memory() -> int | None:
    """Return the bytes of memory that may be used, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    found = free * 1024
    group = Path("/sys/fs/cgroup")
    try:  # a container's limit
        limit = int((group / "memory.max").read_text())
        found = min(found, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return found


# -- the process


def random_inputs(model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Make inputs of several lengths for a Hugging Face model.

    Token ids are drawn anew but for special ones, which mark where an image goes; so are floats.

    Args:
        model: Takes what `example_inputs_for` makes.
        count: How many.
    """
    base = example_inputs_for(model)
    vocabulary = _vocabulary(model)
    config: Any = model.config
    special = _special(config.to_dict())
    plain = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    texts = {k: v for k, v in base.items() if isinstance(v, torch.Tensor)}
    lengths = {tuple(v.shape) for v in texts.values()}
    longer = set(texts) <= {"input_ids", "attention_mask"} and len(lengths) == 1
    made = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 + number)
        inputs = dict(base)
        for key, value in texts.items():
            if longer and number:
                value = value.repeat(1, 2)[:, : value.shape[1] + 3 * (number % 3)]
            if value.is_floating_point():
                value = torch.randn(value.shape, generator=generator).to(value.dtype)
            elif key in ("input_ids", "decoder_input_ids"):
                drawn = plain[torch.randint(len(plain), value.shape, generator=generator)]
                marks = torch.isin(value, torch.tensor(sorted(special) or [-1]))
                value = torch.where(marks, value, drawn)
            inputs[key] = value
        made.append(inputs)
    return made


def _vocabulary(model: Any) -> int:
    sizes = [m.num_embeddings for m in model.modules() if hasattr(m, "num_embeddings")]
    try:
        return int(model.get_input_embeddings().num_embeddings)
    except (AttributeError, NotImplementedError):
        return int(max(sizes, default=1))


def _special(config: Mapping[str, Any]) -> set[int]:
    """Return every token id that a config names."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= _special(value)
        elif str(key).endswith(("_token_id", "_token_index")):
            values = value if isinstance(value, list) else [value]
            found |= {v for v in values if isinstance(v, int) and v >= 0}
    return found


def run_all(model: nn.Module, inputs: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    """Return the floating-point outputs of a model by name, in evaluation, without capacities."""
    model.eval()
    for module in model.modules():
        compat.disable_fused_encoder(module)
    found = []
    with torch.no_grad(), lifted_capacity(model):
        for one in inputs:
            torch.manual_seed(0)
            outputs = model(**one)
            parts = outputs if isinstance(outputs, Mapping) else {"": outputs}
            flat = {}
            for key, part in parts.items():
                for i, tensor in enumerate(tensors_in(part)):
                    if tensor.is_floating_point() and tensor.numel():
                        flat[f"{key}.{i}"] = tensor.detach().clone()
            found.append(flat)
    return found


def auto_class(config: Mapping[str, Any], kind: str) -> str:
    """Return the class of transformers that loads a folder with this `config.json`."""
    named = [n for n in config.get("auto_map") or {} if n.startswith("AutoModel")]
    if kind == "custom":
        return next((name for name in named if name != "AutoModel"), "AutoModel")
    architecture = str((config.get("architectures") or ["AutoModel"])[0])
    return "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else architecture


def load_as_reader(folder: Path, kind: str, dtype: str | None = None) -> nn.Module:
    """Load a folder with what is to read it.

    Args:
        folder: The folder.
        kind: Its kind, see `ModelFiles`.
        dtype: Name of the torch dtype to load a dense model in; the config's if None.

    Raises:
        MoeifyError: It leaves something unread, or lacks something.
    """
    if kind == "dense":
        return load_dense(folder, dtype)[0]
    if kind == "moeify":
        return single.load(folder)
    transformers = transformers_offline()
    config = json.loads((folder / "config.json").read_bytes())
    reader = getattr(transformers, auto_class(config, kind))
    model, info = reader.from_pretrained(
        str(folder),
        dtype="auto",
        trust_remote_code=kind == "custom",
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[what]:
            raise MoeifyError(f"{what.replace('_', ' ')}: {sorted(map(str, info[what]))[:3]}")
    loaded: nn.Module = model
    return loaded


def difference_of(dense: list[dict[str, Tensor]], moe: list[dict[str, Tensor]]) -> float:
    """Return the largest relative difference over all outputs that the dense model has.

    Raises:
        VerificationError: One is missing, or has another shape.
    """
    largest = 0.0
    for one, other in zip(dense, moe, strict=True):
        lost = [key for key in one if key not in other]
        if lost:
            raise VerificationError(f"its model does not return {lost[0].rpartition('.')[0]}")
        pair = [Snapshot(tuple(t[key] for key in one), {}) for t in (one, other)]
        largest = max(largest, compare(pair[0], pair[1], ()).outputs)
    return largest


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a question of `verify`."""
    kinds, dtype = question["kinds"], question["dtype"]
    before = load_as_reader(Path(question["source"]), kinds[0], dtype)
    coarse = coarsest(p.dtype for p in before.parameters())
    inputs = random_inputs(before, question["inputs"])
    wanted = run_all(before, inputs)
    del before
    after = load_as_reader(Path(question["folder"]), kinds[1], dtype)
    difference = difference_of(wanted, run_all(after, inputs))
    return {"difference": difference, "inputs": len(inputs), "tolerance": TOLERANCE[coarse]}


def main() -> None:
    """Answer on standard output."""
    question = json.load(sys.stdin)
    try:
        found = answer(question)
    except MoeifyError as error:
        found = {"error": str(error)}
    except Exception as error:  # whatever a loader raises is the answer
        found = {"error": f"{type(error).__name__}: {error}"}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
