"""Experts from several checkpoints of one architecture, all else averaged (Branch-Train-MiX).

Checkpoints are folders of safetensors files, read a tensor at a time; nothing is downloaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moeify.errors import CheckpointError
from moeify.hf.tensor_names import DenseTensors, open_dense_folder
from moeify.plan.layer_plan import LayerPlan
from moeify.storage.strict_json import parse_json
from moeify.storage.tensor_source import TensorSource

_OPEN: WeakKeyDictionary[nn.Module, dict[tuple[str, ...], tuple[DenseTensors, ...]]] = (
    WeakKeyDictionary()
)
"""The open checkpoints of a model, kept because its experts are built one at a time."""

_SAME = (
    "model_type",
    "hidden_act",
    "hidden_activation",
    "activation_function",
    "num_attention_heads",
    "num_key_value_heads",
    "rope_theta",
)
"""Keys that must be equal in configs: what the shapes of tensors do not show."""


def sources_for(model: nn.Module, layer: LayerPlan) -> tuple[DenseTensors, ...]:
    """Open the checkpoints of a layer with `init: {experts: models}`.

    The model, which may be on `meta`, gives names and shapes.

    Raises:
        CheckpointError: A folder does not exist, or holds another architecture.
    """
    folders = tuple(os.path.join(layer.folder, folder) for folder in layer.init.from_)
    known = _OPEN.setdefault(model, {})
    if folders not in known:
        known[folders] = tuple(_opened(folder, model) for folder in folders)
    return known[folders]


def _opened(folder: str, model: nn.Module) -> DenseTensors:
    if not os.path.isdir(folder):
        raise CheckpointError(
            f"{folder}: is not a folder; `from` names local folders, relative to the plan's file "
            "or, without one, to the working directory"
        )
    _check_config(folder, model)
    source = open_dense_folder(folder, model)
    for name, parameter in model.named_parameters():
        if name in source.missing:
            raise CheckpointError(f"{folder}: {name} of this {_kind(model)} is missing")
        found = source.specs[source.aliases.get(name, name)]
        if found.shape != tuple(parameter.shape):
            raise CheckpointError(
                f"{folder}: {name} has the shape {list(found.shape)}, but "
                f"{list(parameter.shape)} in this {_kind(model)}: another architecture"
            )
    return source


def _kind(model: nn.Module) -> str:
    return type(model).__name__


def _check_config(folder: str, model: nn.Module) -> None:
    path, config = Path(folder, "config.json"), getattr(model, "config", None)
    if not path.is_file() or config is None or not hasattr(config, "to_dict"):
        return
    theirs, ours = parse_json(path.read_bytes(), str(path)), config.to_dict()
    if not isinstance(theirs, dict):
        raise CheckpointError(f"{path}: is not a mapping")
    for key in _SAME:
        if key in theirs and key in ours and theirs[key] != ours[key]:
            raise CheckpointError(
                f"{path}: {key} is {theirs[key]!r:.80}, but {ours[key]!r:.80} in this "
                f"{_kind(model)}: another architecture"
            )


def read_like(source: TensorSource, name: str, like: Tensor) -> Tensor:
    """Return a source's tensor in the dtype and on the device of `like`."""
    found = source.read(source.aliases.get(name, name))
    return found.to(device=like.device, dtype=like.dtype)


def averaged(
    sources: Sequence[TensorSource], name: str, start: int = 0, stop: int | None = None
) -> Tensor:
    """Return rows of a tensor, averaged over checkpoints.

    Summed in float32 (or float64), in the dtype of the first checkpoint. Integers are not averaged:
    they are those of the first checkpoint.

    Source:
        Branch-Train-MiX (Sukhbaatar et al. 2024), section 3.2.
    """
    read = (s.read(s.aliases.get(name, name), start, stop) for s in sources)
    first = next(read)
    if not first.is_floating_point():
        return first
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    total = first.to(wide, copy=True)
    for other in read:
        total += other.to(wide)
    return (total / len(sources)).to(first.dtype)


class Averaged:
    """The average of checkpoints of one architecture, as a `TensorSource`."""

    def __init__(self, sources: Sequence[TensorSource]) -> None:
        self._sources = tuple(sources)
        self.specs = sources[0].specs
        self.aliases = sources[0].aliases

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """See `TensorSource.read`."""
        return averaged(self._sources, name, start, stop)


def rest_of(model: nn.Module, layers: Iterable[LayerPlan], source: TensorSource) -> TensorSource:
    """Return the source of all tensors but the experts': the plan's average, or `source`.

    Raises:
        CheckpointError: A checkpoint of the plan does not fit.
    """
    for layer in layers:
        if layer.init.experts == "models" and layer.init.rest == "average":
            return Averaged(sources_for(model, layer))
    return source


@contextmanager
def averaging(model: nn.Module, layers: Iterable[LayerPlan]) -> Iterator[None]:
    """Set a dense model's tensors to the average of the plan's checkpoints; undo it on an error.

    Needs memory for a second copy inside. With `rest: keep`, without checkpoints, and on `meta`,
    nothing changes.

    Raises:
        CheckpointError: A checkpoint cannot be read, or does not fit.
    """
    layer = next((layer for layer in layers if layer.init.experts == "models"), None)
    tensors = state_of(model)
    if layer is None or any(t.is_meta for t in tensors.values()):
        yield
        return
    before: dict[str, Tensor] = {}
    try:
        sources = sources_for(model, layer)
        with torch.no_grad():
            missing = {name for source in sources for name in source.missing}  # buffers
            for name, tensor in tensors.items() if layer.init.rest == "average" else ():
                if name in missing:
                    continue
                before[name] = tensor.detach().clone()
                tensor.copy_(averaged(sources, name).to(tensor.device))
        yield
    except BaseException:
        with torch.no_grad():
            for name, old in before.items():
                tensors[name].copy_(old)
        raise
    finally:
        _OPEN.pop(model, None)  # closes the files


def state_of(model: nn.Module) -> Mapping[str, Any]:
    """Return parameters and persistent buffers by name, tied ones once."""
    found: dict[str, Any] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    found |= {name: b for name, b in model.named_buffers() if name in persistent}
    return found
