"""Where a model's tensors come from, and the files that they are written to.

A `TensorSource` (a model in memory, a folder) and a `ModelFiles` (moeify's own format, a Hugging
Face folder) are independent of each other, so that every source can be written in every format, a
few rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import torch
from torch import Tensor, nn

from moeify.errors import CheckpointError
from moeify.storage.manifest import FileRecord
from moeify.storage.model_state import collect
from moeify.units import dtype_name

PIECE: Final = 1 << 26  # bytes of a flat tensor that are read at a time

# What reads a folder: `moeify.load` ("moeify"), transformers with code that needs moeify ("custom")
# or transformers alone ("native", "dense").
Kind = Literal["moeify", "custom", "native", "dense"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class TensorSource(Protocol):
    """The tensors of a model by the names of its state dict, wherever they are.

    Each tensor is listed once; the further names of tied ones are aliases. Reading can be repeated
    at little cost and keeps nothing in memory.
    """

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Every tensor of the state dict, in its order, without aliases."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Further names of tied tensors, to the name in `specs`."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return rows `[start, stop)` along the first dimension, on the CPU, not to be modified.

        A tensor without dimensions is returned whole.
        """
        ...


class LiveTensors:
    """The tensors of a model that is whole in this process.

    Args:
        model: The model.
        state_dict: Read these instead, by the same names (a trainer's gathered state).
    """

    def __init__(self, model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> None:
        state = collect(model)
        names = [name for name, role in state.roles.items() if role != "scratch"]
        self._tensors = {name: state.tensors[name] for name in names}
        self.aliases: Mapping[str, str] = {
            alias: name for alias, name in state.aliases.items() if name in self._tensors
        }
        if state_dict is not None:
            self._replace(state_dict)
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def _replace(self, state_dict: Mapping[str, Tensor]) -> None:
        known = self._tensors.keys() | self.aliases.keys()
        unknown = sorted(state_dict.keys() - known)
        missing = [name for name in self._tensors if name not in state_dict]
        if unknown or missing:
            what = f"has {unknown[0]}, which is not in" if unknown else f"lacks {missing[0]} of"
            raise CheckpointError(f"state_dict: {what} the model")
        for name, tensor in self._tensors.items():
            if state_dict[name].shape != tensor.shape:
                raise CheckpointError(
                    f"state_dict: {name} has the shape {tuple(state_dict[name].shape)}, and "
                    f"{tuple(tensor.shape)} in the model"
                )
            self._tensors[name] = state_dict[name]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        rows = tensor if tensor.dim() == 0 else tensor[start:stop]
        return rows.to("cpu").contiguous()


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to write."""

    name: str  # in the file
    spec: TensorSpec
    # Yields it in parts along the first dimension, in order, on the CPU, in the dtype of `spec`.
    # Called once, when its turn has come, and again only if the writing starts over.
    pieces: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        return torch.Size(self.spec.shape).numel() * self.spec.dtype.itemsize


def copied(tensor_source: TensorSource, name: str, as_name: str | None = None) -> Output:
    """Return an output that copies a tensor unchanged, some rows at a time, perhaps renamed."""
    spec = tensor_source.specs[name]

    def pieces() -> Iterator[Tensor]:
        if not spec.shape:
            yield tensor_source.read(name)
            return
        count = spec.shape[0]
        row = torch.Size(spec.shape[1:]).numel() * spec.dtype.itemsize
        # Of three dimensions, the first is that of experts: one at a time.
        step = 1 if len(spec.shape) > 2 else max(1, PIECE // max(row, 1))
        for start in range(0, count, step):
            yield tensor_source.read(name, start, min(start + step, count))

    return Output(as_name or name, spec, pieces)


@dataclass(frozen=True, slots=True)
class Written:
    """What has been written."""

    shards: list[FileRecord]  # in order
    files: list[FileRecord]  # the small ones
    place: dict[str, str]  # file of each tensor


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What is to be in a folder."""

    kind: Kind
    tensors: tuple[Output, ...]  # in the order in which they are written
    texts: Mapping[str, bytes]  # small files by name
    manifest: Callable[[Written], bytes]  # makes `moeify.json` when all else is written
    notes: tuple[str, ...] = ()  # for the user, such as how much is padding
    warnings: tuple[str, ...] = ()  # what may go wrong for a user who does not know it

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(output.nbytes for output in self.tensors)

    def shard_names(self, count: int) -> list[str]:
        """Return the names of `count` files with tensors."""
        if self.kind != "moeify" and count == 1:
            return ["model.safetensors"]
        prefix = "moeify" if self.kind == "moeify" else "model"
        return [f"{prefix}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def describe(spec: TensorSpec) -> str:
    """Format a shape and dtype for messages: `float32[4, 8]`."""
    return f"{dtype_name(spec.dtype)}{list(spec.shape)}"
