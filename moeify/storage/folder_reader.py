"""Read a folder of safetensors from any origin, without trusting it, a few rows at a time.

Every claim of a header or an index is checked against the files. All files are opened before the
first is read and stay open, so that what is read is what was checked. Nothing is mapped into
memory, unpickled, or followed out of the folder; the only links accepted are those that the cache
of the Hugging Face hub is made of.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

from moeify.errors import CheckpointError
from moeify.storage.atomic_folder import Folder
from moeify.storage.strict_json import canonical_digest, parse_json
from moeify.storage.tensor_reader import Entry, TensorFiles

WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
CONFIG: Final = "config.json"
MAX_TEXT: Final = 1 << 28  # bytes of an index or config

_BLOB = re.compile(r"\.\./\.\./blobs/([0-9a-f]{40}|[0-9a-f]{64})")
_PICKLED = re.compile(r".*\.(?:bin|pt|pth|ckpt|pkl|pickle|h5|msgpack)")


class CheckpointReader(TensorFiles):
    """The tensors of a local folder with `model.safetensors`, or with an index of several files.

    Args:
        directory: The folder; also a snapshot in the hub's cache, whose links lead to its blobs.

    Attributes:
        config: The content of `config.json`; empty if there is none.
        notes: Harmless oddities of the folder.

    Raises:
        CheckpointError: There are no safetensors, or they are damaged; the message names the file
            and the tensor.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(os.fspath(directory))
        self.config: Mapping[str, Any] = {}
        self.notes: tuple[str, ...] = ()
        try:
            with _LinkedFolder(directory) as folder:
                self._open(folder)
        except BaseException:
            self.close()
            raise

    def fingerprint(self) -> dict[str, Any]:
        """Describe the folder as JSON that changes with it, without reading all of it."""
        files = [
            {
                "file": name,
                "bytes": file.bytes,
                "mtime_ns": file.mtime_ns,
                "header_sha256": file.header,
            }
            for name, file in self.files.items()
        ]
        return {"folder": _title(self.path), "files": files}

    def digest(self) -> str:
        """Return the SHA-256 of the fingerprint, in hex."""
        return canonical_digest(self.fingerprint())

    def _open(self, folder: _LinkedFolder) -> None:
        names = folder.names()
        self.config = _mapping(folder, CONFIG) if CONFIG in names else {}
        placed, total = _index(folder, names)
        for file in [WEIGHTS] if placed is None else sorted(set(placed.values())):
            for key in self.add(folder, file):
                if placed is not None and placed.get(key) != file:
                    raise CheckpointError(
                        f"{self.where(file)}: {key:.200}: the index does not place it there "
                        f"({placed.get(key)!r:.80}): files of two saves are mixed, or the index "
                        "belongs to another one"
                    )
        for key, file in (placed or {}).items():
            if key not in self.keys:
                raise CheckpointError(
                    f"{self.where(file)}: {key!r:.200}: is missing, but the index places it there"
                )
        if not self.keys:
            raise CheckpointError(f"{self.path}: its files hold no tensors")
        size = sum(entry.end - entry.begin for entry in self.keys.values())
        if total is not None and total != size:
            self.notes = (f"{INDEX}: total_size is {total!r:.40}, the tensors have {size} bytes",)


class _LinkedFolder(Folder):
    """A folder whose files may be links to the blobs beside it, as in the hub's cache."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        super().__init__(directory)
        self._blobs: Folder | None = None
        above = Path(os.path.realpath(directory)).parent
        blobs = above.parent / "blobs"
        if above.name == "snapshots" and blobs.is_dir() and not blobs.is_symlink():
            self._blobs = Folder(blobs)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._blobs is not None:
            self._blobs.__exit__()

    def __enter__(self) -> _LinkedFolder:
        return self

    def names(self) -> list[str]:
        try:
            return os.listdir(self.handle)
        except OSError as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error

    def open(self, name: str, *, size: int | None = None) -> BinaryIO:
        if self._blobs is None:
            return super().open(name, size=size)
        try:
            match = _BLOB.fullmatch(os.readlink(name, dir_fd=self.handle))
        except (OSError, ValueError):  # not a link
            match = None
        if match is None:
            return super().open(name, size=size)
        return self._blobs.open(match[1], size=size)


def _index(folder: Folder, names: Sequence[str]) -> tuple[dict[str, str] | None, object]:
    """Return the file of each tensor (None without an index) and the claimed total size."""
    if INDEX not in names:
        if WEIGHTS in names:
            return None, None
        pickled = sorted(name for name in names if _PICKLED.fullmatch(name))
        others = sorted(name for name in names if name.endswith(".safetensors"))
        reason = ""
        if pickled:
            reason = f" {pickled[0]!r:.80} is never opened: save the model as safetensors first"
        elif "adapter_model.safetensors" in others:
            reason = " it holds an adapter: merge that into its base model first"
        elif others:
            reason = f" {others[0]!r:.80} alone may not be the whole model"
        raise CheckpointError(f"{folder.path}: has neither {WEIGHTS} nor {INDEX};{reason}")
    where = folder.where(INDEX)
    index = _mapping(folder, INDEX)
    placed = index.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError(f"{where}: weight_map: must map tensors to files")
    for key, file in placed.items():
        plain = isinstance(file, str) and file.endswith(".safetensors") and file.isprintable()
        if not plain or file.startswith(".") or set(file) & set("/\\:"):
            raise CheckpointError(
                f"{where}: weight_map: {key!r:.200}: {file!r:.80} is not a safetensors file in the "
                "same folder"
            )
    if WEIGHTS in names and set(placed.values()) != {WEIGHTS}:
        raise CheckpointError(
            f"{folder.path}: holds both {WEIGHTS} and {INDEX} of other files: one of them is left "
            "over from another save; remove that one"
        )
    metadata = index.get("metadata")
    return placed, metadata.get("total_size") if isinstance(metadata, dict) else None


def _mapping(folder: Folder, name: str) -> dict[str, Any]:
    data = parse_json(folder.read(name, limit=MAX_TEXT), folder.where(name))
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder.where(name)}: is not a mapping")
    return data


def _title(path: str) -> str:
    """Return a name for a folder; for a snapshot in the hub's cache, the hub's."""
    real = Path(os.path.realpath(path))
    repo = real.parent.parent.name
    if real.parent.name == "snapshots" and repo.startswith("models--"):
        return f"{repo.removeprefix('models--').replace('--', '/')}@{real.name}"
    return real.name


__all__ = ["INDEX", "WEIGHTS", "CheckpointReader", "Entry"]
