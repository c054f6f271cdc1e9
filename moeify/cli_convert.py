"""`moeify convert`: a dense folder in, a converted one out, the whole model in memory."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from moeify import api, checkpoint
from moeify.cli_models import copy_beside, folder_bytes, is_save, load_dense, model_folder
from moeify.cli_output import say, size
from moeify.errors import MoeifyError
from moeify.hf import example_inputs_for
from moeify.plan import Plan
from moeify.resolve import ResolvedPlan
from moeify.selection import shorten
from moeify.verification import Difference, check, coarsest, compare, snapshot

if TYPE_CHECKING:
    from rich.console import Console


def convert(
    source: str,
    out: str,
    plan: Plan,
    console: Console,
    *,
    dtype: str | None = None,
    verify: bool = True,
    force: bool = False,
) -> dict[str, Any]:
    """Convert a Hugging Face folder, print a report and return it as data.

    Args:
        source: Folder with `config.json` and safetensors.
        out: Folder to write; must not exist, but for an older save with `force`.
        plan: The plan.
        console: Where to print.
        dtype: Torch dtype to load in; the config's if None.
        verify: Compare with the dense model before anything is written.
        force: Replace an older save.

    Raises:
        MoeifyError: On a wrong folder or plan, or a failed check; nothing is written then.
    """
    folder, target = Path(source), Path(out)
    if is_save(folder):
        raise MoeifyError(f"{folder}: is converted already; give the dense model's folder")
    folder = model_folder(folder)
    _check_target(target, force)
    start = time.perf_counter()
    model, missing = load_dense(folder, dtype)
    loaded = time.perf_counter()
    resolved, difference = _convert(model, plan, verify)
    converted = time.perf_counter()
    checkpoint.save(model, target)
    copied = copy_beside(folder, target)
    saved = time.perf_counter()
    report = {
        "source": str(folder),
        "out": str(target),
        "verified": difference is not None,
        "difference": asdict(difference) if difference is not None else None,
        "seconds": {
            "load": loaded - start,
            "convert": converted - loaded,
            "save": saved - converted,
        },
        "bytes": folder_bytes(target),
        "copied": copied,
        "not_in_source": missing,
        "resolved": resolved.to_dict(),
    }
    _print(report, resolved, difference, console)
    return report


def _check_target(target: Path, force: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not is_save(target):
        raise MoeifyError(f"{target}: exists and is no save of moeify; give another folder")
    if not force:
        raise MoeifyError(f"{target}: exists; --force replaces this older save")


def _convert(model: nn.Module, plan: Plan, verify: bool) -> tuple[ResolvedPlan, Difference | None]:
    """Convert in place; compare like `moeify(verify=True)`, but keep the measured difference."""
    inputs = example_inputs_for(model)
    resolved = plan.resolve(model, inputs)
    if not verify:
        api.moeify(model, plan, example_inputs=inputs, verify=False)
        return resolved, None
    inside: set[str | None] = set()
    for layer in resolved:
        for projection in (*layer.site.up, layer.site.down):
            inside |= {projection.weight, projection.bias}
        inside |= set(layer.site.inner)
    outside = [name for name, _ in model.named_parameters() if name not in inside]
    dense = snapshot(model, inputs, outside)
    api.moeify(model, plan, example_inputs=inputs, verify=False)
    difference = compare(dense, snapshot(model, inputs, outside), resolved.layers)
    check(difference, coarsest(p.dtype for p in model.parameters()))
    return resolved, difference


def _print(
    report: dict[str, Any], resolved: ResolvedPlan, difference: Difference | None, console: Console
) -> None:
    console.print(resolved)
    if difference is None:
        say(console, "step 0: not compared (--no-verify)")
    else:
        word = "" if difference.promised else "; this plan does not promise the dense numbers"
        say(
            console,
            f"step 0: outputs differ by {difference.outputs:.1e}, gradients by "
            f"{difference.gradients:.1e} (relative to the dense model{word})",
        )
    if report["not_in_source"]:
        names = shorten(report["not_in_source"], 4)
        say(console, f"warning: the source does not hold {names}; drawn at random")
    seconds = report["seconds"]
    say(
        console,
        f"load {seconds['load']:.1f} s, convert {seconds['convert']:.1f} s, "
        f"save {seconds['save']:.1f} s; {size(report['bytes'])} in {report['out']}",
    )
