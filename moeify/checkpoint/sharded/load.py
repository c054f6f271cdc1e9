"""Load a sharded checkpoint: check everything, then the digests, then copy values in place."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.storage import StorageReader
from torch.optim import Optimizer

from moeify.checkpoint.sharded.checks import check_layers, check_plan, match
from moeify.checkpoint.sharded.chunks import Pieces
from moeify.checkpoint.sharded.manifest import NAME, ShardedManifest, read
from moeify.checkpoint.sharded.rng import Generators
from moeify.checkpoint.sharded.state import NamedOptimizer, collect_state
from moeify.checkpoint.sharded.storage_reader import PieceReader, PiecesToLoad
from moeify.distributed.ranks import Ranks
from moeify.errors import CheckpointError
from moeify.storage.atomic_folder import Folder
from moeify.units import dtype_name

__all__ = ["Loaded", "load"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """What was loaded.

    Attributes:
        step: The training step.
        extra: The user's data.
        path: The checkpoint.
    """

    step: int
    extra: dict[str, Any]
    path: Path


@dataclass(slots=True)
class _Ready:
    """A load that has been checked on a rank and can be carried out."""

    state: dict[str, Pieces]  # what to load into, by key
    reader: StorageReader
    finish: Callable[[], None]
    loaded: Loaded
    publish: Callable[[], None] = lambda: None
    digest: str = ""


def load(
    model: nn.Module,
    path: Path,
    optimizer: Optimizer | None,
    ranks: Ranks,
    *,
    trust: bool,
    strict: bool,
) -> Loaded:
    """Load one checkpoint, on all ranks; arguments as for `load_sharded`."""
    with ExitStack() as stack:

        def prepare() -> _Ready:
            if not os.path.lexists(path / NAME) and os.path.lexists(path / ".metadata"):
                return _foreign(model, path, optimizer, trust=trust, strict=strict)
            return _prepare(model, path, optimizer, ranks, stack, strict=strict)

        ready = ranks.run_on_all(f"check {path}", prepare)
        content = {f"what {path} holds": ready.digest[:12]}
        ranks.assert_same(content, "it is being replaced: load again")
        if isinstance(ready.reader, PieceReader):
            reader, wanted = ready.reader, sorted(ready.state)  # the same on all ranks
            ranks.run_on_all(
                f"verify {path}", lambda: reader.verify(wanted, ranks.rank, ranks.size)
            )
        ranks.run(f"load {path}", _runner(ready, ranks))
        ranks.run_on_all(f"finish loading {path}", ready.finish)
        ready.publish()
        return ready.loaded


def _runner(ready: _Ready, ranks: Ranks) -> Callable[[], Any]:
    planner = PiecesToLoad()
    if ranks.group is not None:
        return lambda: state_dict_loader.load(
            ready.state, storage_reader=ready.reader, planner=planner, process_group=ranks.group
        )

    def alone() -> None:  # as torch.distributed.checkpoint, which warns without a process group
        ready.reader.reset()
        metadata = ready.reader.read_metadata()
        planner.set_up_planner(ready.state, metadata, True)
        ready.reader.set_up_storage_reader(metadata, True)
        plan = ready.reader.prepare_local_plan(planner.create_local_plan())
        ready.reader.read_data(ready.reader.prepare_global_plan([plan])[0], planner).wait()

    return alone


def _prepare(
    model: nn.Module,
    path: Path,
    optimizer: Optimizer | None,
    ranks: Ranks,
    stack: ExitStack,
    *,
    strict: bool,
) -> _Ready:
    """Check everything of this rank; nothing is changed."""
    folder = stack.enter_context(Folder(path))
    manifest = read(folder)
    where = str(path)
    check_layers(model, manifest, where)
    check_plan(model, manifest, where, strict=strict)
    state = collect_state(model)
    named = None if optimizer is None else NamedOptimizer(optimizer, state)
    masters = {} if named is None else named.weights()
    saved: dict[str, tuple[list[int], str, str]] = {
        name: (record.shape, record.dtype, record.role)
        for name, record in manifest.of_model().items()
    }
    names = {name: name for name in saved} | manifest.aliases
    targets = match(state, masters, saved, names, where, strict=strict)
    into: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in targets.items()}
    assign: Callable[[], None] = lambda: None  # noqa: E731
    if named is not None:
        assign = _prepare_optimizer(named, manifest, into, where)
    reader = PieceReader(folder, manifest)
    stack.callback(reader.close)
    pieces = {key: Pieces.of(tensor, key) for key, tensor in into.items()}
    restore = _generators(reader, manifest, ranks, where)
    reader.open(pieces)

    def finish() -> None:
        assign()
        restore()

    digest = hashlib.sha256()
    for record in manifest.tensors.values():
        for piece in record.pieces:
            digest.update(piece.sha256.encode())
    loaded = Loaded(manifest.step, manifest.extra, path)
    ready = _Ready(pieces, reader, finish, loaded, digest=digest.hexdigest())
    if named is not None and named.masters:
        ready.publish = named.owner.publish  # collective: nothing may fail before it
    return ready


def _prepare_optimizer(
    named: NamedOptimizer, manifest: ShardedManifest, into: dict[str, Tensor], where: str
) -> Callable[[], None]:
    """Add the optimizer's tensors to `into`; return what assigns them."""
    record = manifest.optimizer
    if record is None:
        raise CheckpointError(f"{where}: no optimizer was saved: load without optimizer=")
    options = named.options(record, where)
    named.check_states(manifest, where)
    states = named.made(manifest)
    for name, found in states.items():
        for key, tensor in found.items():
            into[f"optimizer.{name}.{key}"] = tensor

    def assign() -> None:
        named.assign(options, states, record.values)

    return assign


def _generators(
    reader: PieceReader, manifest: ShardedManifest, ranks: Ranks, where: str
) -> Callable[[], None]:
    """Read this rank's generators; return what restores them."""
    first = manifest.tensors.get("rng.0.torch")
    if first is None or not first.pieces:
        return lambda: None
    if ranks.rank >= manifest.world:
        digest = first.pieces[0].sha256
        return lambda: Generators.derive(digest, ranks.rank)
    prefix = f"rng.{ranks.rank}."
    found = {
        key.removeprefix(prefix): reader.values(key)
        for key in manifest.tensors
        if key.startswith(prefix)
    }
    ready = Generators.check(found, where)
    return lambda: Generators.restore(ready)


def _foreign(
    model: nn.Module, path: Path, optimizer: Optimizer | None, *, trust: bool, strict: bool
) -> _Ready:
    """Check a checkpoint of torch.distributed.checkpoint itself."""
    if not trust:
        raise CheckpointError(
            f"{path}: was written by torch.distributed.checkpoint alone; its .metadata is a "
            "pickle, and reading it runs any code in it: pass trust=True if you trust whoever "
            "wrote it"
        )
    if optimizer is not None:
        raise CheckpointError(f"{path}: only weights are read from it: load without optimizer=")
    reader = FileSystemReader(path)
    try:
        metadata = reader.read_metadata()
    except Exception as error:
        raise CheckpointError(f"{path}/.metadata: cannot be read: {error}") from error
    found: dict[str, Any] = {
        key: record
        for key, record in metadata.state_dict_metadata.items()
        if isinstance(record, TensorStorageMetadata)
    }
    prefix = "model." if any(key.startswith("model.") for key in found) else ""
    state = collect_state(model)
    if prefix and any(key in found for key in state.tensors):
        prefix = ""  # the model has a child of that name
    saved = {
        key.removeprefix(prefix): (
            list(record.size),
            dtype_name(record.properties.dtype),
            state.roles.get(key.removeprefix(prefix), "buffer"),
        )
        for key, record in found.items()
        if key.startswith(prefix)
    }
    names = {name: name for name in saved}
    for alias, name in state.aliases.items():
        if alias in saved and name in saved:  # tied here, stored twice there
            del saved[alias], names[alias]
    targets = match(state, {}, saved, names, str(path), strict=strict)
    pieces = {f"{prefix}{name}": Pieces.of(t, name) for name, t in targets.items()}
    return _Ready(pieces, reader, lambda: None, Loaded(0, {}, path))
