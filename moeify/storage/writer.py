"""Write a `ModelFiles`: shards while their tensors are read, then small files and the manifest."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moeify.atomic_file import HashedFile, write_new
from moeify.errors import CheckpointError
from moeify.storage.atomic_folder import MANIFEST, replace_folder
from moeify.storage.manifest import FileRecord, Manifest
from moeify.storage.safetensors_file import bytes_of, file_head
from moeify.storage.strict_json import encode_manifest
from moeify.storage.tensor_source import ModelFiles, Output, Written, describe
from moeify.units import dtype_name, parse_bytes

INDEX = "model.safetensors.index.json"
Advance = Callable[[int], None]


def write_model_files(
    model_files: ModelFiles, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> Written:
    """Write a folder, all or nothing, as `replace_folder` does.

    `max_shard_size` is in bytes, or such as "5GB"; a larger tensor gets a file to itself.
    """
    limit = parse_bytes(max_shard_size, "max_shard_size")
    done: list[Written] = []
    replace_folder(
        directory, lambda folder: done.append(write_files_into(model_files, folder, limit))
    )
    return done[0]


def write_files_into(model_files: ModelFiles, folder: Path, limit: int) -> Written:
    """Write all files into an existing folder, with at most `limit` bytes of tensors in each."""
    groups = split(model_files.tensors, limit)
    names = model_files.shard_names(len(groups))
    shards = [write_shard(folder / n, group) for n, group in zip(names, groups, strict=True)]
    return finish(model_files, folder, groups, shards)


def finish(
    model_files: ModelFiles,
    folder: Path,
    groups: Sequence[Sequence[Output]],
    shards: list[FileRecord],
) -> Written:
    """Write everything but the shards."""
    names = [record.file for record in shards]
    place = {o.name: n for n, group in zip(names, groups, strict=True) for o in group}
    texts = dict(model_files.texts)
    if model_files.kind != "moeify" and len(groups) > 1:
        texts[INDEX] = index_text(model_files, place)
    files = [_write_text(folder / name, text) for name, text in texts.items()]
    written = Written(shards, files, place)
    _write_text(folder / MANIFEST, model_files.manifest(written))
    return written


def manifest_writer(draft: Manifest) -> Callable[[Written], bytes]:
    """Return what completes a manifest once the files, and the shard of each tensor, are known."""

    def complete(written: Written) -> bytes:
        tensors = {
            name: record.model_copy(update={"shard": written.place[name]})
            for name, record in draft.tensors.items()
        }
        more = {"tensors": tensors, "shards": written.shards, "files": written.files}
        return encode_manifest(draft.model_copy(update=more))

    return complete


def split(outputs: Sequence[Output], limit: int) -> list[list[Output]]:
    """Spread tensors over files of at most `limit` bytes, in their order."""
    groups: list[list[Output]] = [[]]
    room = limit
    for output in outputs:
        if groups[-1] and output.nbytes > room:
            groups.append([])
            room = limit
        groups[-1].append(output)
        room -= output.nbytes
    return groups


def write_shard(
    path: Path, outputs: Sequence[Output], advance: Advance | None = None
) -> FileRecord:
    """Write a safetensors file piece by piece, and call `advance` with the bytes of each."""
    ordered = sorted(outputs, key=lambda o: -o.spec.dtype.itemsize)  # so that all are aligned
    with HashedFile(path) as file:
        file.write(header(ordered))
        for output in ordered:
            for piece in _checked(output):
                data = bytes_of(piece)
                file.write(data)
                if advance is not None:
                    advance(len(data))
        return FileRecord(file=path.name, sha256=file.sha256(), bytes=file.size)


def header(ordered: Sequence[Output]) -> bytes:
    """Return the head of a safetensors file with these tensors."""
    return file_head((o.name, o.spec.dtype, o.spec.shape) for o in ordered)


def index_text(model_files: ModelFiles, place: dict[str, str]) -> bytes:
    """Return the index that transformers reads when there are several files."""
    index = {
        "metadata": {"total_size": model_files.nbytes},
        "weight_map": dict(sorted(place.items())),
    }
    return json.dumps(index, indent=2).encode() + b"\n"


def _checked(output: Output) -> Iterator[Tensor]:
    count = 0
    for piece in output.pieces():
        if piece.dtype != output.spec.dtype:
            raise CheckpointError(
                f"{output.name}: got {dtype_name(piece.dtype)} for {describe(output.spec)}"
            )
        count += piece.numel()
        yield piece
    if count != torch.Size(output.spec.shape).numel():
        raise CheckpointError(f"{output.name}: got {count} elements for {describe(output.spec)}")


def _write_text(path: Path, data: bytes) -> FileRecord:
    path.unlink(missing_ok=True)  # carried over from an older folder
    return FileRecord(file=path.name, sha256=write_new(path, data), bytes=len(data))


__all__ = [
    "INDEX",
    "Advance",
    "finish",
    "manifest_writer",
    "split",
    "write_files_into",
    "write_model_files",
    "write_shard",
]
