"""Convert the single folder of `mf.save` into a sharded checkpoint, and back, tensor by tensor.

Optimizer state and random generators exist in a sharded checkpoint only.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from moeify.capture.on_meta import default_device_cpu
from moeify.checkpoint.rebuild import build, convert_again
from moeify.checkpoint.sharded.api import find_checkpoint
from moeify.checkpoint.sharded.manifest import (
    DataFile,
    PieceRecord,
    ShardedManifest,
    StoredTensor,
    check,
    read,
)
from moeify.checkpoint.sharded.storage_reader import PieceReader
from moeify.checkpoint.sharded.storage_writer import PieceFile, entry_name, put
from moeify.convert.replay import layer_records
from moeify.distributed.mesh import alone
from moeify.errors import CheckpointError
from moeify.plan import strict_yaml
from moeify.plan.plan import Plan
from moeify.storage.atomic_folder import Folder, resolve_target, staged_folder
from moeify.storage.manifest import (
    MAX_BYTES,
    VERSION,
    LayerRecord,
    Manifest,
    TensorRecord,
    read_manifest,
)
from moeify.storage.safetensors_file import DTYPES, check_shard, read_shard
from moeify.storage.strict_json import parse_json
from moeify.storage.tensor_source import ModelFiles, Output, TensorSpec
from moeify.storage.writer import manifest_writer, write_model_files
from moeify.units import parse_bytes

__all__ = ["to_sharded", "to_single"]

log = logging.getLogger("moeify")

_COMMON = ("versions", "plan", "plan_sha256", "layers", "model", "inputs", "ledger", "aliases")


def to_sharded(
    folder: str | os.PathLike[str], directory: str | os.PathLike[str], *, step: int = 0
) -> Path:
    """Convert what `mf.save` wrote into a sharded checkpoint, which any layout can load.

    Args:
        folder: A folder of `mf.save`.
        directory: Where the checkpoints are; `step-00000000` is made in it.
        step: Number of the step.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: The folder is damaged, or the checkpoint cannot be written.
    """
    path = resolve_target(directory) / f"step-{step:08d}"
    with Folder(folder) as source:
        manifest = read_manifest(source)
        texts = {}
        for record in manifest.files:
            if record.file != "plan.yaml":
                data = source.read(record.file, limit=MAX_BYTES, size=record.bytes)
                texts[record.file] = data.decode()

        def write(staging: Path) -> ShardedManifest:
            pieces: dict[str, PieceRecord] = {}
            files = []
            for number, shard_record in enumerate(manifest.shards):
                expected = manifest.of_shard(shard_record.file)
                shard = check_shard(source, shard_record, expected)
                entries = [
                    (
                        entry_name(f"model.{name}", [0] * len(expected[name].shape)),
                        DTYPES[expected[name].dtype],
                        expected[name].shape,
                    )
                    for name in shard.names
                ]
                path = staging / f"moeify-rank-{number:05d}.safetensors"
                with PieceFile(path, entries) as file:
                    for name, tensor in read_shard(source, shard, expected):
                        pieces[name] = file.write(number, [0] * tensor.ndim, tensor)
                files.append(DataFile(file=file.name, bytes=file.size))
            return _sharded(manifest, pieces, files, texts, step)

        _staged(path, write)
    return path


def _sharded(
    manifest: Manifest,
    pieces: dict[str, PieceRecord],
    files: list[DataFile],
    texts: dict[str, str],
    step: int,
) -> ShardedManifest:
    tensors = {
        f"model.{name}": StoredTensor(
            dtype=record.dtype,
            shape=record.shape,
            role=record.role,
            requires_grad=record.requires_grad,
            pieces=[pieces[name]] if pieces[name].bytes else [],
        )
        for name, record in manifest.tensors.items()
    }
    made = ShardedManifest(
        format="moeify-sharded",
        version=2,
        step=step,
        world=1,
        layout={"tensor": 1, "expert": 1, "experts_in_tp": "replicate"},
        texts=texts,
        tensors=tensors,
        optimizer=None,
        extra={},
        files=files,
        **_common(manifest),
    )
    check(made, "the new checkpoint")
    return made


def _common(manifest: Manifest | ShardedManifest) -> dict[str, Any]:
    """Return what both formats keep."""
    return {key: getattr(manifest, key) for key in _COMMON}


def _staged(path: Path, write: Callable[[Path], ShardedManifest]) -> None:
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: exists already; nothing was changed")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_folder(path) as staging:
            put(staging, path, write(staging))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be saved: {error}") from error


def to_single(
    checkpoint: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Convert a sharded checkpoint into the folder of `mf.save`, which one process loads.

    One process does it by itself: of several ranks, call it on one.

    Args:
        checkpoint: The checkpoint, or a folder of them: the newest.
        target: As for `mf.save`.
        model: Only for a checkpoint of several ranks of a model that is not of transformers: an
            instance of its dense class, which is converted. Its weights do not matter.
        max_shard_size: As for `mf.save`.

    Raises:
        CheckpointError: The checkpoint is damaged or not described well enough, or the folder
            cannot be written.
    """
    limit = parse_bytes(max_shard_size, "max_shard_size")
    with Folder(find_checkpoint(checkpoint, None)) as source, default_device_cpu():
        manifest = read(source)
        where = source.path
        if manifest.optimizer is not None:
            log.info("%s: optimizer state and random generators are left out", where)
        draft = _draft(manifest)
        if manifest.world > 1 or "parallel" in manifest.plan or "zero" in manifest.plan:
            draft = _in_one_process(draft, manifest, model, where)
        reader = PieceReader(source, manifest)
        try:
            write_model_files(_files(draft, manifest, reader), target, max_shard_size=limit)
        finally:
            reader.close()


def _draft(manifest: ShardedManifest) -> Manifest:
    """Return the manifest of a single folder, without its files."""
    kept = manifest.of_model()
    counts: dict[str, int] = {}
    for record in kept.values():
        if record.role == "parameter":
            counts[record.dtype] = counts.get(record.dtype, 0) + math.prod(record.shape)
    tensors = {
        name: record.model_dump(exclude={"pieces"}) | {"shard": ""} for name, record in kept.items()
    }
    return Manifest.model_validate(
        {
            "format": "moeify",
            "version": VERSION,
            "dtype": max(counts, key=lambda dtype: counts[dtype], default="float32"),
            "parameters": sum(counts.values()),
            "tensors": tensors,
            "shards": [],
            "files": [],
            **_common(manifest),
        }
    )


def _in_one_process(
    draft: Manifest, manifest: ShardedManifest, model: nn.Module | None, where: str
) -> Manifest:
    """Return the manifest with the plan and graphs of one process, found by converting on meta."""
    plan = Plan.of({k: v for k, v in manifest.plan.items() if k not in ("parallel", "zero")})
    draft = draft.model_copy(update={"plan": plan.data(), "plan_sha256": plan.digest()})
    if manifest.world == 1:
        return draft
    texts = {name: parse_json(text.encode(), name) for name, text in manifest.texts.items()}
    if model is None:
        config = texts.get("source_config.json", {})
        model = build(draft.model, config, texts.get("generation_config.json"), where)
    with alone():  # other ranks may do something else
        conversion = convert_again(model, draft, where, prove=False)
    layers: list[LayerRecord] = layer_records(model, conversion)
    return draft.model_copy(update={"layers": layers})


def _files(draft: Manifest, manifest: ShardedManifest, reader: PieceReader) -> ModelFiles:
    """Return the files of a single folder, whose tensors are read one at a time."""

    def output(name: str, record: TensorRecord) -> Output:
        spec = TensorSpec(tuple(record.shape), DTYPES[record.dtype])
        return Output(name, spec, lambda: iter([reader.values(f"model.{name}")]))

    texts = {"plan.yaml": strict_yaml.dump(draft.plan, "plan.yaml"), **manifest.texts}
    return ModelFiles(
        kind="moeify",
        tensors=tuple(output(name, record) for name, record in sorted(draft.tensors.items())),
        texts={name: text.encode() for name, text in texts.items()},
        manifest=manifest_writer(draft),
    )
