"""What a folder written by moeify holds, and its tensors, read in place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from moeify.errors import CheckpointError
from moeify.formats.manifest import FormatManifest, read_format_manifest
from moeify.storage.atomic_folder import MANIFEST, Folder
from moeify.storage.folder_reader import CheckpointReader
from moeify.storage.manifest import FileRecord, Manifest, read_manifest
from moeify.storage.safetensors_file import DTYPES
from moeify.storage.tensor_reader import TensorFiles
from moeify.storage.tensor_source import TensorSpec, describe


def is_save(folder: Path) -> bool:
    """Return whether moeify wrote a folder."""
    return (folder / MANIFEST).is_file()


def is_converted(folder: Path) -> bool:
    """Return whether moeify wrote a folder with a converted model, not with a dense one."""
    if not is_save(folder):
        return False
    with Folder(folder) as opened:
        manifest = read_format_manifest(opened)
    return manifest is None or manifest.kind != "dense"


def read_any_manifest(folder: Folder) -> Manifest | FormatManifest:
    """Read `moeify.json` of a folder that moeify wrote in any format."""
    return read_format_manifest(folder) or read_manifest(folder)


class FolderTensors:
    """The tensors of a converted model in a folder that moeify wrote; a `TensorSource`.

    It reads what `moeify.save` wrote, and an export with custom code, where names that the model's
    class ties are absent. `verify` first compares every file with its SHA-256 in `moeify.json`.
    """

    def __init__(self, directory: str | os.PathLike[str], *, verify: bool = False) -> None:
        with Folder(directory) as folder:
            self.manifest = read_any_manifest(folder)
            if isinstance(self.manifest, Manifest):
                self._files = _saved(folder, self.manifest)
        if isinstance(self.manifest, FormatManifest):
            if self.manifest.kind != "custom":
                raise CheckpointError(
                    f"{os.fspath(directory)}: holds a {self.manifest.kind} model, whose tensors "
                    "have the names of its own class"
                )
            self._files = CheckpointReader(directory)
        self.specs: Mapping[str, TensorSpec] = {n: e.spec for n, e in self._files.keys.items()}
        self.aliases: Mapping[str, str] = {}
        if isinstance(self.manifest, Manifest):
            records = self.manifest.tensors
            self.specs = {n: self.specs[n] for n, r in records.items() if r.role != "scratch"}
            self.aliases = {a: n for a, n in self.manifest.aliases.items() if n in self.specs}
        if verify:
            self._verify(self.manifest.shards)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        return self._files.read(name, start, stop)

    def unchanged(self) -> None:
        """Raise a `CheckpointError` if a file was written to since it was opened."""
        self._files.unchanged()

    def close(self) -> None:
        self._files.close()

    def _verify(self, shards: list[FileRecord]) -> None:
        for record in shards:
            if self._files.sha256(record.file) != record.sha256:
                raise CheckpointError(
                    f"{os.path.join(self._files.path, record.file)}: its SHA-256 is not the one in "
                    f"{MANIFEST}: the file was changed or damaged"
                )


def _saved(folder: Folder, manifest: Manifest) -> TensorFiles:
    """Open the shards of a save and check them against its manifest."""
    files = TensorFiles(folder.path)
    for record in manifest.shards:
        where = folder.where(record.file)
        found = files.add(folder, record.file, record.bytes)
        expected = manifest.of_shard(record.file)
        for name in sorted(expected.keys() ^ found.keys()):
            what = "is missing" if name in expected else "should not be there"
            raise CheckpointError(f"{where}: {name:.200}: {what}")
        for name, tensor in expected.items():
            spec = TensorSpec(tuple(tensor.shape), DTYPES[tensor.dtype])
            if found[name].spec != spec:
                raise CheckpointError(
                    f"{where}: {name:.200}: is {describe(found[name].spec)} instead of "
                    f"{describe(spec)}"
                )
    return files
