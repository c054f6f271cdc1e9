"""`save_sharded` and `load_sharded`: training state, saved by all ranks, loaded on any others.

One checkpoint is a folder `step-00000010` with a file of each rank that writes, and a manifest. It
is there whole or not at all, and is read without unpickling anything. Tensors are kept as
rectangles of the whole, so that another number of ranks, or another layout, reads the same numbers
bit for bit.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, overload

from torch import nn
from torch.distributed.checkpoint import state_dict_saver
from torch.optim import Optimizer

from moeify.atomic_file import remove_leftovers
from moeify.checkpoint.sharded.chunks import Pieces
from moeify.checkpoint.sharded.describe import describe
from moeify.checkpoint.sharded.load import Loaded, load
from moeify.checkpoint.sharded.manifest import NAME
from moeify.checkpoint.sharded.rng import Generators
from moeify.checkpoint.sharded.state import NamedOptimizer, collect_state, json_data
from moeify.checkpoint.sharded.storage_writer import Finish, PiecesToSave, PieceWriter
from moeify.checkpoint.single import unwrapped
from moeify.distributed.meeting import LONG, SHORT, meet
from moeify.distributed.ranks import Ranks
from moeify.errors import CheckpointError
from moeify.sites.record import require_conversion
from moeify.storage.atomic_folder import resolve_target, stage
from moeify.zero.fsdp2 import settle

__all__ = ["Loaded", "Saving", "find_checkpoint", "latest", "load_sharded", "save_sharded"]

log = logging.getLogger("moeify")

_STEP = re.compile(r"step-([0-9]{8,18})")
MAX_STEP: Final = 10**18 - 1


@dataclass(slots=True)
class Saving:
    """A save in progress.

    Attributes:
        path: Where the checkpoint will be.
    """

    path: Path
    _future: Future[Path] = field(repr=False)

    @property
    def done(self) -> bool:
        """Whether it has ended, with or without success."""
        return self._future.done()

    def wait(self) -> Path:
        """Wait for its end and return the checkpoint.

        Raises:
            CheckpointError: It failed; what was there before is unchanged.
        """
        return self._future.result()


_under_way: list[Saving] = []


@overload
def save_sharded(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    step: int = 0,
    extra: dict[str, Any] | None = None,
    asynchronous: Literal[False] = False,
) -> Path: ...


@overload
def save_sharded(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    step: int = 0,
    extra: dict[str, Any] | None = None,
    asynchronous: Literal[True],
) -> Saving: ...


def save_sharded(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    step: int = 0,
    extra: dict[str, Any] | None = None,
    asynchronous: bool = False,
) -> Path | Saving:
    """Save a model, its optimizer and all random generators, from all ranks, all or nothing.

    Every rank calls it with the same arguments. Each writes a part of what it holds; what several
    ranks hold is written once.

    Args:
        model: A converted model, on any layout; also inside DDP or `torch.compile`.
        directory: Where the checkpoints of this training are; `step-00000010` is made in it.
        optimizer: A torch optimizer over the model's parameters, or one of `mf.optimizer`.
        step: Number of the step; a checkpoint of the same step is replaced atomically.
        extra: JSON data of your own, such as `scheduler.state_dict()`; that of rank 0 is kept.
        asynchronous: Copy all tensors to the CPU and return; a thread writes them. The next save
            or load waits for it, and so does the end of the process.

    Returns:
        The checkpoint's folder; a `Saving` if asynchronous.

    Raises:
        CheckpointError: Something cannot be saved, the disk is full, or a rank died; on all ranks.
            Checkpoints that were there are unchanged.
        MoeifyError: The model has not been converted.

    Example:
        >>> import tempfile, torch
        >>> from moeify import moeify
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> plan = {"layers": [{"select": "all", "experts": 2}]}
        >>> model = moeify(nn.Sequential(mlp), plan, example_inputs=torch.randn(4, 8))
        >>> folder = tempfile.mkdtemp()
        >>> save_sharded(model, folder, step=10).name
        'step-00000010'
        >>> load_sharded(model, folder).step
        10
    """
    inner = unwrapped(model)
    require_conversion(inner)
    settle(inner)
    ranks = _ranks("save a sharded checkpoint", SHORT)
    tensors, finish, path = _collected(inner, directory, optimizer, step, extra, ranks)
    if not asynchronous:
        return _write(tensors, path, finish, ranks)

    def copies() -> dict[str, Pieces]:
        return {key: pieces.copied() for key, pieces in tensors.items()}

    copied: list[dict[str, Pieces]] = []
    ranks.run_on_all("copy the tensors to the CPU", lambda: copied.append(copies()))
    pool = ThreadPoolExecutor(1, thread_name_prefix="moeify-save")
    future = pool.submit(_write, copied.pop(), path, finish, ranks)
    pool.shutdown(wait=False)
    future.add_done_callback(_log_failure)
    saving = Saving(path, future)
    _under_way.append(saving)
    return saving


def load_sharded(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    step: int | None = None,
    trust: bool = False,
    strict: bool = True,
) -> Loaded:
    """Load a checkpoint into a model, its optimizer and the random generators, on all ranks.

    The layout may be any: number of ranks, expert and tensor parallelism, ZeRO stage. Everything,
    digests included, is checked first; only then are the live tensors written to, in place.

    Args:
        model: Converted by the same plan except for `parallel:` and `zero:`.
        directory: What `save_sharded` was given, or one checkpoint in it.
        optimizer: Gets states and hyperparameters, matched by the names of parameters; None
            ignores those in the checkpoint.
        step: Which checkpoint; the newest if None.
        trust: Read a checkpoint of torch.distributed.checkpoint itself, of a state dict with the
            model's names; its metadata is a pickle, which can run any code.
        strict: Refuse another plan, and missing or unexpected tensors. Other shapes, dtypes and
            numbers of experts are refused in any case.

    Returns:
        The step, the user's data and the checkpoint's path.

    Raises:
        CheckpointError: There is none, it is damaged, or it does not fit; on all ranks. Model,
            optimizer and generators are then unchanged.
        MoeifyError: The model has not been converted.
    """
    inner = unwrapped(model)
    require_conversion(inner)
    settle(inner)
    ranks = _ranks("load a sharded checkpoint", LONG)
    path = ranks.run_on_first("find the checkpoint", lambda: find_checkpoint(directory, step))
    return load(inner, path, optimizer, ranks, trust=trust, strict=strict)


def latest(directory: str | os.PathLike[str]) -> Path | None:
    """Return the newest complete checkpoint of a folder, or None if there is none."""
    found = _checkpoints(Path(directory))
    return found[max(found)] if found else None


def _log_failure(future: Future[Path]) -> None:
    if (error := future.exception()) is not None:  # perhaps nobody calls `wait`
        log.error("an asynchronous save failed: %s", error)


def _checkpoints(root: Path) -> dict[int, Path]:
    """Return the complete checkpoints by step."""
    found: dict[int, Path] = {}
    try:
        for entry in root.iterdir():
            match = _STEP.fullmatch(entry.name)
            if match is not None and not entry.is_symlink() and _is_file(entry / NAME):
                found[int(match[1])] = entry
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{root}: cannot be read: {error}") from error
    return found


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def find_checkpoint(directory: str | os.PathLike[str], step: int | None) -> Path:
    """Return the checkpoint of a step, or the newest, in a folder of them, or the folder itself."""
    root = Path(directory).absolute()
    if os.path.lexists(root / NAME) or os.path.lexists(root / ".metadata"):
        match = _STEP.fullmatch(root.name)
        if step is not None and match is not None and int(match[1]) != step:
            raise CheckpointError(f"{root}: is not the checkpoint of step {step}")
        return root
    if os.path.lexists(root / "moeify.json"):
        raise CheckpointError(
            f"{root}: was written by mf.save: read it with mf.load, or convert it with "
            "mf.to_sharded"
        )
    found = _checkpoints(root)
    if not found:
        raise CheckpointError(f"{root}: holds no complete checkpoint")
    if step is None:
        return found[max(found)]
    if step not in found:
        steps = ", ".join(map(str, sorted(found)[-8:]))
        raise CheckpointError(f"{root}: has no checkpoint of step {step}, only of {steps}")
    return found[step]


def _ranks(what: str, patience: float) -> Ranks:
    """Return the ranks, once saves in progress have ended and all ranks are here."""
    for saving in _under_way:
        saving._future.exception()  # only waits; `wait` raises it
    _under_way.clear()
    meet(what, patience, CheckpointError)
    return Ranks.here()


def _collected(
    model: nn.Module,
    directory: str | os.PathLike[str],
    optimizer: Optimizer | None,
    step: int,
    extra: dict[str, Any] | None,
    ranks: Ranks,
) -> tuple[dict[str, Pieces], Finish, Path]:
    """Return this rank's tensors, what makes the manifest, and where it all goes."""
    tensors: dict[str, Pieces] = {}
    finish: list[Finish] = []
    shapes: dict[str, str] = {}

    def collect() -> Path:
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step <= MAX_STEP:
            raise CheckpointError(f"step: {step!r:.40} is not a step number")
        path = resolve_target(directory) / f"step-{step:08d}"
        state = collect_state(model)
        named = None if optimizer is None else NamedOptimizer(optimizer, state)
        masters = {}
        if named is not None:
            named.settle()
            masters = named.weights()
        for name, tensor in state.tensors.items():
            tensors[f"model.{name}"] = Pieces.of(masters.get(name, tensor), name)
        for name, key, value in () if named is None else named.states():
            if hasattr(value, "ndim"):
                tensors[f"optimizer.{name}.{key}"] = Pieces.of(value, f"optimizer: {name}: {key}")
        shapes.update({key: f"{list(p.shape)} {p.dtype}" for key, p in tensors.items()})
        for kind, raw in Generators.collect().items():
            tensors[f"rng.{ranks.rank}.{kind}"] = Pieces.of(raw, f"rng: {kind}")
        data = json_data(extra or {}, "extra")
        if not isinstance(data, dict):
            raise CheckpointError(f"extra: is a {type(extra).__name__}, not a dict")
        record = None if named is None else named.record()
        known = dict(tensors)
        finish.append(describe(model, state, record, known, step, data, ranks.size))
        return path

    path = ranks.run_on_all("collect what is to be saved", collect)
    ranks.assert_same({"the folder": str(path)}, "save to the same folder on all ranks")
    ranks.assert_same(shapes, "save after the same steps on all ranks")
    return tensors, finish[0], path


def _write(tensors: dict[str, Pieces], path: Path, finish: Finish, ranks: Ranks) -> Path:
    """Write what was collected; the first rank stages, renames and cleans up."""
    staging: Path | None = None
    try:
        staging = ranks.run_on_first(f"save {path}", lambda: _stage(path))
        planner = PiecesToSave()
        writer = PieceWriter(staging, path, ranks.rank, finish)
        ranks.run(f"save {path}", _runner(tensors, planner, writer, ranks))
    except BaseException:
        if ranks.rank == 0 and staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise
    finally:
        if ranks.rank == 0:
            remove_leftovers(path.parent, _STEP)
    return path


def _runner(
    tensors: dict[str, Pieces], planner: PiecesToSave, writer: PieceWriter, ranks: Ranks
) -> Callable[[], Any]:
    if ranks.group is not None:
        return lambda: state_dict_saver.save(
            tensors, storage_writer=writer, planner=planner, process_group=ranks.group
        )

    def alone() -> None:  # as torch.distributed.checkpoint, which warns without a process group
        planner.set_up_planner(tensors, is_coordinator=True)
        plans, metadata = planner.create_global_plan([planner.create_local_plan()])
        results = writer.write_data(planner.finish_plan(plans[0]), planner).wait()
        writer.finish(metadata, [results])

    return alone


def _stage(path: Path) -> Path:
    """Remove what dead processes left, of any step, and make the staged folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, _STEP)
    if os.path.lexists(path) and (
        path.is_symlink()
        or not path.is_dir()
        or (any(path.iterdir()) and not _is_file(path / NAME))
    ):
        raise CheckpointError(f"{path}: is not a checkpoint; nothing was changed")
    return stage(path)
