"""Turns the single folder of `mf.save` into a sharded checkpoint, and back, tensor by tensor.

Optimizer state and random generators exist in a sharded checkpoint only.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moeify.atomic_file import HashedFile, write_new
from moeify.capture.on_meta import default_device_cpu
from moeify.checkpoint.rebuild import build, convert_again
from moeify.checkpoint.sharded.api import find_checkpoint
from moeify.checkpoint.sharded.manifest import VERSION as SHARDED_VERSION
from moeify.checkpoint.sharded.manifest import (
    DataFile,
    PieceRecord,
    ShardedManifest,
    StoredTensor,
    check,
    read,
)
from moeify.checkpoint.sharded.storage_reader import PieceReader
from moeify.checkpoint.sharded.storage_writer import PieceFile, put
from moeify.convert.replay import layer_records
from moeify.errors import CheckpointError
from moeify.plan import strict_yaml
from moeify.plan.plan import Plan
from moeify.storage.atomic_folder import (
    MANIFEST,
    Folder,
    replace_folder,
    resolve_target,
    staged_folder,
)
from moeify.storage.manifest import (
    MAX_BYTES,
    VERSION,
    FileRecord,
    LayerRecord,
    Manifest,
    TensorRecord,
    encode,
    read_manifest,
)
from moeify.storage.safetensors_file import (
    DTYPES,
    bytes_of,
    check_shard,
    file_head,
    read_shard,
)
from moeify.storage.strict_json import parse_json
from moeify.units import parse_bytes

__all__ = ["to_sharded", "to_single"]

log = logging.getLogger("moeify")


def to_sharded(
    folder: str | os.PathLike[str], directory: str | os.PathLike[str], *, step: int = 0
) -> Path:
    """Turn what `mf.save` wrote into a sharded checkpoint, which any layout can load.

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
                where = ",".join
                entries = [
                    (
                        f"model.{name}@{where('0' for _ in expected[name].shape)}",
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
        version=SHARDED_VERSION,
        versions=manifest.versions,
        step=step,
        world=1,
        layout={"tensor": 1, "expert": 1, "experts_in_tp": "replicate"},
        plan=manifest.plan,
        plan_sha256=manifest.plan_sha256,
        layers=manifest.layers,
        model=manifest.model,
        inputs=manifest.inputs,
        ledger=manifest.ledger,
        texts=texts,
        aliases=manifest.aliases,
        tensors=tensors,
        optimizer=None,
        extra={},
        files=files,
    )
    check(made, "the new checkpoint")
    return made


def _staged(path: Path, write: Callable[[Path], ShardedManifest]) -> None:
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: is there already; nothing was touched")
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
    """Turn a sharded checkpoint into the folder of `mf.save`, which one process loads.

    Args:
        checkpoint: The checkpoint, or a folder of them: the newest.
        target: As of `mf.save`.
        model: Only for a checkpoint of several ranks of a model that is not of transformers: an
            instance of its dense class, which is converted. Its weights do not matter.
        max_shard_size: As of `mf.save`.

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
        single = _single(manifest, limit)
        if manifest.world > 1 or "parallel" in manifest.plan or "zero" in manifest.plan:
            single = _in_one_process(single, manifest, model, where)
        reader = PieceReader(source, manifest)
        try:
            replace_folder(target, lambda folder: _write(folder, single, manifest, reader))
        finally:
            reader.close()


def _single(manifest: ShardedManifest, limit: int) -> Manifest:
    """Return the manifest of a single folder, without its files' digests."""
    kept = {
        key.removeprefix("model."): record
        for key, record in manifest.tensors.items()
        if record.role in ("parameter", "buffer", "scratch")
    }
    groups: list[list[str]] = [[]]
    room = limit
    for name in sorted(kept):
        size = _size(kept[name])
        if groups[-1] and size > room:
            groups.append([])
            room = limit
        groups[-1].append(name)
        room -= size
    files = {
        name: f"moeify-{number:05d}-of-{len(groups):05d}.safetensors"
        for number, names in enumerate(groups, 1)
        for name in names
    }
    counts: dict[str, int] = {}
    for record in kept.values():
        if record.role == "parameter":
            elements = _size(record) // DTYPES[record.dtype].itemsize
            counts[record.dtype] = counts.get(record.dtype, 0) + elements
    tensors = {
        name: {
            "shard": files[name],
            "dtype": record.dtype,
            "shape": record.shape,
            "role": record.role,
            "requires_grad": record.requires_grad,
        }
        for name, record in kept.items()
    }
    return Manifest.model_validate(
        {
            "format": "moeify",
            "version": VERSION,
            "versions": manifest.versions,
            "model": manifest.model,
            "plan": manifest.plan,
            "plan_sha256": manifest.plan_sha256,
            "layers": manifest.layers,
            "inputs": manifest.inputs,
            "ledger": manifest.ledger,
            "dtype": max(counts, key=lambda dtype: counts[dtype], default="float32"),
            "parameters": sum(counts.values()),
            "tensors": tensors,
            "aliases": manifest.aliases,
            "shards": [],
            "files": [],
        }
    )


def _size(record: StoredTensor) -> int:
    return sum(piece.bytes for piece in record.pieces)


def _in_one_process(
    single: Manifest, manifest: ShardedManifest, model: nn.Module | None, where: str
) -> Manifest:
    """Return the manifest with the plan and graphs of one process, found by converting on meta.

    Raises:
        CheckpointError: The model cannot be built.
    """
    plan = Plan.of({k: v for k, v in manifest.plan.items() if k not in ("parallel", "zero")})
    single = single.model_copy(update={"plan": plan.data(), "plan_sha256": plan.digest()})
    if manifest.world == 1:
        return single
    texts = {name: parse_json(text.encode(), name) for name, text in manifest.texts.items()}
    if model is None:
        config = texts.get("source_config.json", {})
        model = build(single.model, config, texts.get("generation_config.json"), where)
    conversion = convert_again(model, single, where, prove=False)  # it was made for other ranks
    layers: list[LayerRecord] = layer_records(model, conversion)
    return single.model_copy(update={"layers": layers})


def _write(folder: Path, single: Manifest, manifest: ShardedManifest, reader: PieceReader) -> None:
    shards = []
    for name in sorted({record.shard for record in single.tensors.values()}):
        shards.append(_write_shard(folder / name, single.of_shard(name), reader))
    texts = {"plan.yaml": strict_yaml.dump(single.plan, "plan.yaml"), **manifest.texts}
    files = []
    for name, text in texts.items():
        data = text.encode()
        digest = write_new(folder / name, data)
        files.append(FileRecord(file=name, sha256=digest, bytes=len(data)))
    made = single.model_copy(update={"shards": shards, "files": files})
    write_new(folder / MANIFEST, encode(made))


def _write_shard(path: Path, records: dict[str, TensorRecord], reader: PieceReader) -> FileRecord:
    """Write one safetensors file, a tensor at a time."""
    names = sorted(records, key=lambda n: (-DTYPES[records[n].dtype].itemsize, n))
    entries = [(name, DTYPES[records[name].dtype], records[name].shape) for name in names]
    with HashedFile(path) as file:
        file.write(file_head(entries))
        for name in names:
            values: torch.Tensor = reader.values(f"model.{name}")
            file.write(bytes_of(values))
        return FileRecord(file=path.name, sha256=file.sha256(), bytes=file.size)
