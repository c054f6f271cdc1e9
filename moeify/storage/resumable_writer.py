"""Write a `ModelFiles` so that an interrupted write can be resumed: finished shards are kept.

A folder `.NAME.partial` beside the target holds the staged folder and a journal of the finished
shards, each with its digest. An error, Ctrl-C or a kill leaves it for `resume`; a new start
removes it. A lock on it, which ends with its process, keeps a second writer out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from moeify.atomic_file import replace_file, sync_folder
from moeify.errors import CheckpointError
from moeify.plan.selection import Strict
from moeify.storage.atomic_folder import (
    CHUNK,
    Folder,
    carry_over,
    holds_save,
    locked_folder,
    publish,
    resolve_target,
)
from moeify.storage.manifest import FileRecord
from moeify.storage.strict_json import parse_json, validated
from moeify.storage.tensor_source import ModelFiles, Output, Written
from moeify.storage.writer import Advance, finish, header, split, write_shard
from moeify.units import parse_bytes

log = logging.getLogger("moeify")

_JOURNAL: Final = "journal.json"
_STAGED: Final = "folder"
_MAX_JOURNAL: Final = 1 << 26


class Journal(Strict):
    """What a partial folder holds."""

    format: Literal["moeify-journal"]
    version: Literal[1]
    made_of: dict[str, Any]  # what the bytes depend on, by a name for the user
    shards: list[FileRecord]  # the finished ones


def partial_path(directory: str | os.PathLike[str]) -> Path:
    """Return the folder that an unfinished write leaves."""
    path = resolve_target(directory)
    return path.with_name(f".{path.name}.partial")


def bytes_to_write(model_files: ModelFiles, max_shard_size: int | str = "5GB") -> int:
    """Return the bytes of all files."""
    groups = split(model_files.tensors, parse_bytes(max_shard_size, "max_shard_size"))
    heads = sum(len(header(group)) for group in groups)
    return model_files.nbytes + heads + sum(map(len, model_files.texts.values()))


def free_bytes(directory: str | os.PathLike[str]) -> int:
    """Return the bytes that may be written beside a folder."""
    found = os.statvfs(resolve_target(directory).parent)
    return found.f_bavail * found.f_frsize


def write_resumable(
    model_files: ModelFiles,
    directory: str | os.PathLike[str],
    *,
    made_of: Mapping[str, Any],
    max_shard_size: int | str = "5GB",
    resume: bool = False,
    advance: Advance | None = None,
    late: Callable[[], Mapping[str, bytes]] | None = None,
    check: Callable[[Path], None] | None = None,
) -> Written:
    """Write a folder; finished shards survive any interruption.

    Args:
        model_files: What is to be in it.
        directory: A folder that does not exist, is empty, or holds an older save.
        made_of: What the bytes depend on (digests of plan and source, options), as JSON.
        max_shard_size: Bytes per file, or such as "5GB"; a larger tensor gets a file to itself.
        resume: Keep the finished shards of an earlier write of the same.
        advance: Called with the bytes of data that were written, or found, since the last call.
        late: Makes further small files when all tensors are written.
        check: Inspects the finished folder before it is put in place, and raises to refuse it.

    Raises:
        CheckpointError: It cannot be written, another process is writing it, or `resume` finds a
            write of something else. The target is unchanged.
    """
    limit = parse_bytes(max_shard_size, "max_shard_size")
    path = resolve_target(directory)
    partial = partial_path(path)
    old = holds_save(path)
    journal = Journal(
        format="moeify-journal",
        version=1,
        made_of={**made_of, "max_shard_size": limit, "tensors": _digest(model_files.tensors)},
        shards=[],
    )
    try:
        with locked_folder(partial):
            staged = partial / _STAGED
            groups = split(model_files.tensors, limit)
            names = model_files.shard_names(len(groups))
            done = _finished(partial, journal, set(names)) if resume else {}
            _clear(partial, done)
            staged.mkdir(exist_ok=True)
            _check_room(model_files, path, limit, sum(record.bytes for record in done.values()))
            named = dict(zip(names, groups, strict=True))
            shards = _write_shards(partial, journal, named, done, advance)
            if old:
                carry_over(path, staged)
            if late is not None:
                texts = {**model_files.texts, **late()}
                model_files = dataclasses.replace(model_files, texts=texts)
            written = finish(model_files, staged, groups, shards)
            if check is not None:
                check(staged)
            publish(staged, path, exists=old)
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        kept = f"; {partial} keeps what is finished, for --resume" if partial.exists() else ""
        raise CheckpointError(f"{path}: cannot be written: {error}{kept}") from error
    return written


def _write_shards(
    partial: Path,
    journal: Journal,
    groups: Mapping[str, Sequence[Output]],
    done: Mapping[str, FileRecord],
    advance: Advance | None,
) -> list[FileRecord]:
    """Write the shards that are not done, in order, and record each in the journal."""
    staged = partial / _STAGED
    shards: list[FileRecord] = []
    for name, group in groups.items():
        if name not in done:
            shards.append(write_shard(staged / name, group, advance))
            sync_folder(staged)
        else:
            shards.append(done[name])
            if advance is not None:
                advance(sum(output.nbytes for output in group))
        _write_journal(partial, journal.model_copy(update={"shards": shards}))
    return shards


def _digest(outputs: tuple[Output, ...]) -> str:
    return hashlib.sha256(header(outputs)).hexdigest()


def _finished(partial: Path, journal: Journal, names: set[str]) -> dict[str, FileRecord]:
    """Return the finished shards of an earlier write whose digests match."""
    if not (partial / _JOURNAL).exists():
        log.info("%s: nothing is finished there", partial)
        return {}
    with Folder(partial) as folder:
        where = folder.where(_JOURNAL)
        data = parse_json(folder.read(_JOURNAL, limit=_MAX_JOURNAL), where)
    earlier = validated(Journal, data, where, "; start without --resume")
    now = json.loads(json.dumps(journal.made_of))
    changed = sorted(
        k for k in earlier.made_of.keys() | now if earlier.made_of.get(k) != now.get(k)
    )
    if changed:
        raise CheckpointError(
            f"{partial}: was begun with another {' and '.join(changed)}, so it cannot be resumed: "
            "start without --resume"
        )
    kept = {}
    for record in earlier.shards:
        if record.file in names and _is_whole(partial / _STAGED / record.file, record):
            kept[record.file] = record
        else:
            log.warning(
                "%s: %s is not as it was written: it is written again", partial, record.file
            )
    return kept


def _is_whole(path: Path, record: FileRecord) -> bool:
    try:
        with Folder(path.parent) as folder, folder.open(path.name, size=record.bytes) as stream:
            digest = hashlib.sha256()
            while part := stream.read(CHUNK):
                digest.update(part)
    except CheckpointError:
        return False
    return digest.hexdigest() == record.sha256


def _clear(partial: Path, keep: Mapping[str, FileRecord]) -> None:
    """Remove all but finished shards."""
    for entry in [*partial.iterdir(), *_entries(partial / _STAGED)]:
        if entry.name == _STAGED and entry.is_dir() and not entry.is_symlink():
            continue
        if entry.parent.name == _STAGED and entry.name in keep:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []


def _check_room(model_files: ModelFiles, path: Path, limit: int, kept: int) -> None:
    needed, free = bytes_to_write(model_files, limit) - kept, free_bytes(path)
    if needed > free:
        raise CheckpointError(
            f"{path}: {needed:,} bytes are to be written and {free:,} are free; nothing was written"
        )


def _write_journal(partial: Path, journal: Journal) -> None:
    data = json.dumps(journal.model_dump(mode="json"), indent=1, allow_nan=False).encode()
    replace_file(partial / _JOURNAL, data)
