"""`moeify convert`: a dense folder in, a converted one out, one layer in memory at a time."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from moeify import api
from moeify.cli.calibration import texts_as_inputs
from moeify.cli.convert_check import Verdict, auto_class, verify
from moeify.cli.convert_hash import hashing
from moeify.cli.convert_report import print_done, print_dry, print_job, progress
from moeify.cli.inspect import dense_folder
from moeify.convert.replay import versions
from moeify.convert.verify import is_exact
from moeify.errors import MoeifyError
from moeify.formats.choose import FormatChoice, choose_format
from moeify.formats.manifest import read_format_manifest
from moeify.formats.model_card import model_card
from moeify.formats.reader import is_converted, is_save
from moeify.formats.streaming import stream
from moeify.formats.streaming_reverse import dense_files
from moeify.hf.local_folder import files_beside, folder_bytes, load_dense
from moeify.plan.layer_description import describe_layer
from moeify.plan.layer_plan import ResolvedPlan
from moeify.plan.plan import Plan
from moeify.storage.atomic_folder import MANIFEST, Folder
from moeify.storage.folder_reader import CheckpointReader
from moeify.storage.resumable_writer import (
    bytes_to_write,
    free_bytes,
    partial_path,
    write_resumable,
)
from moeify.storage.strict_json import canonical_digest
from moeify.storage.tensor_source import LiveTensors, ModelFiles, TensorSource
from moeify.units import dtype_from_name

_OR_REVERSE = ", or --reverse"
_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h


@dataclass(frozen=True, slots=True)
class Options:
    """How to convert; each field is the option of the command line with its name."""

    dtype: str | None = None  # as the source has it if None
    max_shard_size: str = "5GB"
    export: FormatChoice = "auto"
    verify: int = 2  # number of random inputs; 0 compares nothing
    force: bool = False
    resume: bool = False
    dry_run: bool = False
    in_memory: bool = False
    calibration: Path | None = None  # needs `in_memory`


@dataclass(slots=True)
class _Job:
    """What is to be written, and what is known about it."""

    model_files: ModelFiles
    digest: str  # of the source's files
    resolved: ResolvedPlan | None  # None when converting back
    promised: bool  # whether the outputs must equal the source's
    source_bytes: int
    missing: list[str] = field(default_factory=list)  # parameters that the source lacks
    notes: list[str] = field(default_factory=list)
    folders: list[CheckpointReader] = field(default_factory=list)  # all that is read, SRC first

    @property
    def files(self) -> list[str]:
        """Names of the source's tensor files."""
        return sorted({entry.file for folder in self.folders[:1] for entry in folder.keys.values()})


def convert(
    source: str, out: str, plan: Plan | None, console: Console, options: Options
) -> dict[str, Any]:
    """Convert a Hugging Face folder, print a report and return it as data.

    Without a plan, turn a converted folder back into a dense one. An error leaves `out` as it was.
    """
    folder, target = Path(source), Path(out)
    _check_places(folder, target, options.force)
    start = time.perf_counter()
    if plan is None:
        job = _reversed(folder)
    elif options.in_memory:
        job = _in_memory(dense_folder(folder, _OR_REVERSE), plan, options)
    else:
        job = _streamed(dense_folder(folder, _OR_REVERSE), plan, options)
    texts = {**files_beside(folder), **job.model_files.texts}
    job.model_files = dataclasses.replace(job.model_files, texts=texts)
    prepared = time.perf_counter()
    report: dict[str, Any] = {
        "source": str(folder),
        "out": str(target),
        "kind": job.model_files.kind,
        "dry_run": options.dry_run,
        "bytes": bytes_to_write(job.model_files, options.max_shard_size),
        "free_bytes": free_bytes(target),
        "not_in_source": job.missing,
        "notes": [*job.notes, *job.model_files.notes],
        "warnings": list(job.model_files.warnings),
        "resolved": None if job.resolved is None else job.resolved.to_dict(),
    }
    print_job(job.resolved, report, console)
    if options.dry_run:
        print_dry(report, console)
        return report
    verdict, checked = _write(job, folder, target, options)
    report |= {
        "bytes": folder_bytes(target),
        "verified": verdict.difference is not None,
        "difference": verdict.difference,
        "verification": dataclasses.asdict(verdict),
        "seconds": {
            "prepare": prepared - start,
            "write": time.perf_counter() - prepared - checked,
            "verify": checked,
        },
        "peak_memory": peak_memory(),
    }
    print_done(report, verdict, console)
    return report


def give_memory_back() -> None:
    """Make the C library return large blocks to the system as they are freed."""
    # glibc keeps blocks of up to 32 MiB once it has seen one freed; a layer's would pile up.
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20)


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held so far."""
    try:  # on Linux `ru_maxrss` would include the peak of the process that started this one
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _check_places(source: Path, target: Path, force: bool) -> None:
    """Refuse folders that contain each other, and targets that moeify may not replace."""
    if not source.is_dir():
        raise MoeifyError(f"{source}: no such folder; give a local one, moeify downloads nothing")
    try:
        inner, outer = target.resolve(), source.resolve()
    except (OSError, RuntimeError) as error:
        raise MoeifyError(f"{target}: is not a usable path: {error}") from error
    if inner == outer or (target.exists() and os.path.samefile(source, target)):
        raise MoeifyError(f"{target}: is the source itself; give another folder")
    if inner.is_relative_to(outer):
        raise MoeifyError(f"{target}: is inside the source; give another folder")
    if outer.is_relative_to(inner):
        raise MoeifyError(f"{target}: contains the source; give another folder")
    if not inner.parent.is_dir():
        raise MoeifyError(f"{inner.parent}: is not a folder; create it first")
    if not os.access(inner.parent, os.W_OK | os.X_OK):
        raise MoeifyError(f"{inner.parent}: is not writable; give another folder")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise MoeifyError(f"{target}: is a file; give a folder")
    if any(target.iterdir()):
        if not is_save(target):
            raise MoeifyError(f"{target}: was not written by moeify; give another folder")
        if not force:
            raise MoeifyError(f"{target}: already exists; --force replaces it")


def _streamed(folder: Path, plan: Plan, options: Options) -> _Job:
    dtype = None if options.dtype is None else dtype_from_name(options.dtype)
    model, tensor_source = stream(folder, plan, dtype)
    return _job(model, tensor_source, tensor_source.resolved, tensor_source.folder, options, [])


def _in_memory(folder: Path, plan: Plan, options: Options) -> _Job:
    files = CheckpointReader(folder)
    model, missing = load_dense(folder, options.dtype)
    inputs = None
    if options.calibration is not None:
        inputs = texts_as_inputs(folder, options.calibration, model)
    resolved = plan.resolve(model, inputs)
    api.moeify(model, plan, example_inputs=inputs, verify=False)
    return _job(model, LiveTensors(model), resolved, files, options, missing)


def _job(
    model: nn.Module,
    tensor_source: TensorSource,
    resolved: ResolvedPlan,
    files: CheckpointReader,
    options: Options,
    missing: list[str],
) -> _Job:
    others = dict.fromkeys(
        os.path.join(layer.folder, folder) for layer in resolved for folder in layer.init.from_
    )
    folders = [files, *map(CheckpointReader, others)]
    made_of = files.fingerprint()
    if others:
        made_of["experts"] = [folder.fingerprint() for folder in folders[1:]]
    return _Job(
        choose_format(model, tensor_source, options.export, source=made_of),
        canonical_digest(made_of),
        resolved,
        all(is_exact(layer) for layer in resolved),
        sum(entry.end - entry.begin for entry in files.keys.values()),
        missing,
        list(files.notes),
        folders,
    )


def _reversed(folder: Path) -> _Job:
    if not is_converted(folder):
        raise MoeifyError(f"{folder}: was not converted by moeify, so it cannot be converted back")
    model_files = dense_files(folder)
    digest = hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()
    return _Job(model_files, digest, None, False, model_files.nbytes)


def _card(job: _Job, folder: Path, sha256: Mapping[str, str]) -> dict[str, bytes]:
    """Return the model card; none when converting back."""
    if job.resolved is None:
        return {}
    model_files = job.model_files
    config = json.loads(model_files.texts.get("config.json", b"{}"))
    text = model_card(
        kind=model_files.kind,
        plan=job.resolved.plan.data(),
        layers=[(describe_layer(layer), is_exact(layer)) for layer in job.resolved],
        source=folder,
        sha256=sha256,
        total=job.resolved.parameters,
        active=job.resolved.active_parameters,
        auto=auto_class(config, model_files.kind),
        notes=model_files.notes,
        warnings=model_files.warnings,
    )
    return {"README.md": text}


def _write(job: _Job, folder: Path, target: Path, options: Options) -> tuple[Verdict, float]:
    """Write, verify and move into place; return the verdict and the seconds that it took."""
    found: list[tuple[Verdict, float]] = []
    model_files = job.model_files

    def check(staged: Path) -> None:
        for opened in job.folders:
            opened.unchanged()
        start = time.perf_counter()
        verdict = verify(
            folder,
            staged,
            model_files.kind,
            source_kind="dense" if job.resolved is not None else _kind_of(folder),
            inputs=options.verify,
            promised=job.promised,
            dtype=options.dtype,
            needed=max(job.source_bytes, model_files.nbytes),
            shown_as=target,
        )
        found.append((verdict, time.perf_counter() - start))

    made_of = {
        "plan": None if job.resolved is None else job.resolved.plan.digest(),
        "source": job.digest,
        "export": model_files.kind,
        "dtype": options.dtype,
        "versions": versions(),
    }
    files = [folder / name for name in job.files]
    with progress(model_files.nbytes) as advance, hashing(files) as sha256:
        try:
            write_resumable(
                model_files,
                target,
                made_of=made_of,
                max_shard_size=options.max_shard_size,
                resume=options.resume,
                advance=advance,
                late=lambda: _card(job, folder, sha256()),
                check=check,
            )
        except KeyboardInterrupt:
            kept = partial_path(target)
            if kept.exists():
                sys.stderr.write(f"\n{kept} holds what is finished; continue with --resume\n")
            raise
    return found[0]


def _kind_of(folder: Path) -> str:
    with Folder(folder) as opened:
        manifest = read_format_manifest(opened)
    return "moeify" if manifest is None else manifest.kind
