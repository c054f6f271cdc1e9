"""Compare a written folder with its source in a fresh process, which loads it as a reader would.

The process loads the source, runs it on random inputs, frees it, loads the folder with the software
that is to read it (transformers alone, transformers with the folder's code, or `moeify.load`), and
runs it. Run as a module, this file is that process: a JSON question on standard input, a JSON
answer on standard output.
"""

from __future__ import annotations

import json
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
from moeify.cli.child_process import run_python
from moeify.convert.verify import TOLERANCE, Snapshot, coarsest, compare
from moeify.errors import MoeifyError, VerificationError
from moeify.formats.folder_class import custom_class
from moeify.hf.detect import example_inputs_for
from moeify.hf.local_folder import load_dense, transformers_offline
from moeify.nn.router import lifted_capacity

_OVERHEAD = 500 * 10**6  # bytes that a process needs besides a model


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a comparison."""

    difference: float | None  # largest, relative to the largest value; None if not compared
    inputs: int  # number of inputs
    tolerance: float  # for plans that promise the dense model's numbers
    promised: bool  # whether the plan does
    reason: str = ""  # why nothing was compared


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
    """Compare in a fresh process; raise `VerificationError` if the folder does not pass.

    Args:
        source: Folder that the written one was made from.
        folder: What was written.
        kind: Its kind, see `ModelFiles`.
        source_kind: Kind of the source: a converted one when converting back.
        inputs: Number of random inputs; 0 compares nothing.
        promised: Whether the numbers must be the same.
        dtype: Name of the torch dtype to load the dense model in; the config's if None.
        needed: Bytes of the larger of the two models.
        shown_as: What to call `folder` in messages.
    """
    if inputs == 0:
        return Verdict(None, 0, 0.0, promised, "--verify 0")
    free = available_memory()
    if free is not None and free < needed + _OVERHEAD:
        reason = f"it needs {needed + _OVERHEAD:,} bytes of memory, and {free:,} are free"
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
            f"(relative; {tolerance:.0e} is allowed), but this plan promises the same; the "
            "result was not moved into place. Please report this with the plan and the model"
        )
    return Verdict(difference, int(answer["inputs"]), tolerance, promised)


def _ask(question: dict[str, Any], shown: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moeify-") as scratch:
        done = run_python(
            "-m",
            "moeify.cli.convert_check",
            stdin=json.dumps(question),
            HF_HUB_OFFLINE="1",
            HF_MODULES_CACHE=scratch,  # where transformers copies a folder's code to
            TRANSFORMERS_VERBOSITY="error",
        )
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode < 0:
        raise VerificationError(
            f"{shown}: the process that compares it was killed by signal {-done.returncode} "
            "(out of memory?); --verify 0 skips the comparison"
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
    """Return the bytes of memory that are available, None if the system does not say."""
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


# -- the fresh process


def random_inputs(model: nn.Module, count: int) -> list[dict[str, Any]]:
    """Make `count` inputs of several lengths for a Hugging Face model.

    Floats and token ids are drawn; special tokens, which mark where an image goes, are kept.
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
    """Return a model's floating-point outputs by name, in evaluation mode, without capacities."""
    model.eval()
    for module in model.modules():
        compat.disable_fused_encoder(module)
    found = []
    with torch.no_grad(), lifted_capacity(model):
        for arguments in inputs:
            torch.manual_seed(0)
            outputs = model(**arguments)
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


def load_source(folder: Path, kind: str, dtype: str | None = None) -> nn.Module:
    """Load what a folder was made from. It may come from anywhere: its code is not run."""
    if kind != "custom":
        return load_as_reader(folder, kind, dtype)
    transformers_offline()
    loaded: nn.Module = custom_class(folder).from_pretrained(
        str(folder), dtype="auto", local_files_only=True, use_safetensors=True
    )
    return loaded


def load_as_reader(folder: Path, kind: str, dtype: str | None = None) -> nn.Module:
    """Load a folder of a kind of `ModelFiles` with what is to read it; every tensor must match."""
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
    """Return the largest relative difference over all outputs that the dense model has."""
    largest = 0.0
    for wanted, found in zip(dense, moe, strict=True):
        missing = [key for key in wanted if key not in found]
        if missing:
            raise VerificationError(f"its model does not return {missing[0].rpartition('.')[0]}")
        pair = [Snapshot(tuple(outputs[key] for key in wanted), {}) for outputs in (wanted, found)]
        largest = max(largest, compare(pair[0], pair[1], ()).outputs)
    return largest


def answer(question: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a question of `verify`."""
    kinds, dtype = question["kinds"], question["dtype"]
    before = load_source(Path(question["source"]), kinds[0], dtype)
    coarse = coarsest(p.dtype for p in before.parameters())
    inputs = random_inputs(before, question["inputs"])
    wanted = run_all(before, inputs)
    del before
    after = load_as_reader(Path(question["folder"]), kinds[1], dtype)
    difference = difference_of(wanted, run_all(after, inputs))
    return {"difference": difference, "inputs": len(inputs), "tolerance": TOLERANCE[coarse]}


def main() -> None:
    """Answer the question on standard input."""
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
