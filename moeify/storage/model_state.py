"""What a checkpoint keeps of a model: its tensors by all their names, its modes, its graphs.

`collect` reads them from a model, `assign` puts them into one, `Rollback` restores a model after
a failure.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import torch
from torch import Tensor, fx, nn

from moeify import compat
from moeify.errors import CheckpointError
from moeify.passes.infra.printer import format_node
from moeify.storage.manifest import ModelRecord, TensorRecord
from moeify.storage.safetensors_file import storable
from moeify.units import dtype_name

Role = Literal["parameter", "buffer", "scratch"]
_CONTAINERS: Final = (dict, list, set)
_PLAIN: Final = frozenset({"builtins", "collections"})


@dataclass(frozen=True, slots=True)
class Named:
    """A tensor of a model under one of its names, `key` in its module."""

    name: str
    module: nn.Module
    key: str
    tensor: Tensor
    role: Role


def tensors_of(model: nn.Module) -> Iterator[Named]:
    """Yield every parameter and buffer of a model under every name it has."""
    persistent = model.state_dict(keep_vars=True).keys()
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            yield Named(prefix + key, module, key, parameter, "parameter")
        for key, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            role: Role = "buffer" if prefix + key in persistent else "scratch"
            yield Named(prefix + key, module, key, buffer, role)


@dataclass(slots=True)
class State:
    """The tensors of a model, each once, by the name they are stored under."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    roles: dict[str, Role] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)  # further name: name in `tensors`

    def names(self) -> dict[str, str]:
        """Map every name, aliases included, to the name that its tensor is stored under."""
        return {name: name for name in self.tensors} | self.aliases

    @property
    def parameters(self) -> int:
        """Number of parameter elements."""
        return sum(t.numel() for n, t in self.tensors.items() if self.roles[n] == "parameter")

    def main_dtype(self) -> str:
        """Return the dtype of most parameter elements."""
        counts: dict[str, int] = {}
        for name, tensor in self.tensors.items():
            if self.roles[name] == "parameter":
                dtype = dtype_name(tensor.dtype)
                counts[dtype] = counts.get(dtype, 0) + tensor.numel()
        return max(counts, key=lambda dtype: counts[dtype], default="float32")


def collect(model: nn.Module, *, values: bool = True) -> State:
    """Collect the tensors that must be stored of a model, tied ones once.

    Buffers outside the state dict are kept if they are floating-point: others depend on the config
    alone. Unless `values`, the tensors of the state dict may be on meta.
    """
    state = State()
    seen: dict[tuple[Any, ...], str] = {}
    for item in tensors_of(model):
        tensor = item.tensor
        if item.role == "scratch" and not tensor.is_floating_point():
            continue
        if values or item.role == "scratch":
            storable(item.name, tensor)
        keys = [("id", id(tensor))]
        memory = compat.storage_key(tensor) if tensor.numel() else None
        if memory is not None:
            keys.append((*memory, tensor.dtype, item.role, tensor.requires_grad))
        first = next((seen[key] for key in keys if key in seen), None)
        if first is not None:
            state.aliases[item.name] = first
            continue
        seen |= dict.fromkeys(keys, item.name)
        state.tensors[item.name] = tensor
        state.roles[item.name] = item.role
    check_state_dict(model, state)
    return state


def check_state_dict(model: nn.Module, state: State) -> None:
    """Check that the state dict holds nothing but the collected tensors."""
    names = state.names()
    for name, value in model.state_dict(keep_vars=True).items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name}: the state dict holds a {type(value).__name__} there, not a tensor; only "
                "tensors are saved"
            )
        if name not in names:
            raise CheckpointError(
                f"{name}: is in the state dict, but is not a parameter or buffer of the model: a "
                "module adds to what it saves or renames it, which cannot be loaded again"
            )


def assign(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    records: Mapping[str, TensorRecord],
    names: Mapping[str, str],
) -> None:
    """Put tensors into a model, tied ones as one object under all their names.

    Args:
        model: Has a place for each of them.
        tensors: By the name they were stored under.
        records: By the same names.
        names: Every name in the model to the name its tensor was stored under.
    """
    made: dict[str, Tensor] = {}
    for name, stored in names.items():
        record = records[stored]
        path, _, key = name.rpartition(".")
        module = model.get_submodule(path)
        value = made.get(stored)
        if value is None:
            old = module._parameters.get(key, module._buffers.get(key))
            value = _in_layout_of(old, tensors[stored])
            if record.role == "parameter":
                value = nn.Parameter(value, requires_grad=record.requires_grad)
                value.__dict__.update({} if old is None else old.__dict__)
            made[stored] = value
        if record.role == "scratch" and key not in module._buffers:
            module.register_buffer(key, value, persistent=False)
        else:
            setattr(module, key, value)
    target = next(iter(made.values())).device if made else torch.device("cpu")
    for item in tensors_of(model):
        if item.tensor.is_meta and target.type != "meta":
            raise CheckpointError(f"{item.name}: has no values after loading")


def _in_layout_of(old: Tensor | None, value: Tensor) -> Tensor:
    """Return a tensor in the memory layout of the one it replaces, as `load_state_dict` does."""
    # Kernels sum in another order for other strides: the loaded model would differ by bits.
    if old is None or old.is_contiguous() or old.shape != value.shape:
        return value
    return torch.empty_like(old, dtype=value.dtype, device=value.device).copy_(value)


def check_places(
    model: nn.Module, records: Mapping[str, TensorRecord], names: Mapping[str, str], where: str
) -> None:
    """Check that a model has a place for every tensor, and a tensor for every place."""
    places = {item.name: item for item in tensors_of(model)}
    for name, item in places.items():
        if item.role != "scratch" and name not in names:
            raise CheckpointError(f"{where}: {name}: the model needs it, but it was not saved")
    for name, stored in names.items():
        record, place = records[stored], places.get(name)
        if place is None:
            if record.role == "scratch" and _has_room(model, name):
                continue
            raise CheckpointError(f"{where}: {name}: was saved, but the model has no place for it")
        if (place.role == "parameter") != (record.role == "parameter"):
            raise CheckpointError(f"{where}: {name}: was saved as {record.role}, not {place.role}")
        if record.role != "scratch" and list(place.tensor.shape) != record.shape:
            raise CheckpointError(
                f"{where}: {name}: was saved with shape {record.shape}, but the model has "
                f"{list(place.tensor.shape)}"
            )


def _has_room(model: nn.Module, name: str) -> bool:
    path, _, key = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return False
    return key in module._buffers or not hasattr(module, key)


def to_meta(model: nn.Module, dtypes: Mapping[str, torch.dtype] | None = None) -> None:
    """Replace every parameter by one on meta, tied ones as one; move buffers to the CPU.

    `dtypes` are those to give parameters and buffers, by name.
    """
    dtypes = dtypes or {}
    replaced: dict[int, Tensor] = {}
    for item in list(tensors_of(model)):
        tensor, dtype = item.tensor, dtypes.get(item.name, item.tensor.dtype)
        if id(tensor) not in replaced:
            if item.role == "parameter":
                empty: Tensor = nn.Parameter(
                    torch.empty_like(tensor, device="meta", dtype=dtype),
                    requires_grad=tensor.requires_grad,
                )
                empty.__dict__.update(tensor.__dict__)
            else:
                empty = tensor if tensor.is_meta else tensor.to("cpu", dtype)
            replaced[id(tensor)] = empty
        if replaced[id(tensor)] is not tensor:
            setattr(item.module, item.key, replaced[id(tensor)])


def describe_modes(model: nn.Module) -> tuple[bool, list[str]]:
    """Return the model's mode, and the paths of the modules in the other one."""
    other = [path for path, m in model.named_modules() if m.training != model.training]
    return model.training, other


def restore_modes(model: nn.Module, record: ModelRecord) -> None:
    """Put every module into the mode it was saved in."""
    other = set(record.other_mode)
    for path, module in model.named_modules():
        module.training = record.training != (path in other)


def graph_digests(block: nn.Module) -> tuple[str, str]:
    """Return digests of a block's graph, and of the graphs inside it."""
    graphs = [m.graph for m in block.modules() if isinstance(m, fx.GraphModule)]
    texts = [_numbered(graph) for graph in graphs]
    outer, inner = texts[0], "\n\n".join(texts[1:])
    return hashlib.sha256(outer.encode()).hexdigest(), hashlib.sha256(inner.encode()).hexdigest()


def _numbered(graph: fx.Graph) -> str:
    """Print a graph in a form that pickling, which renames nodes, does not change."""
    copied = copy.deepcopy(graph)
    copied.owning_module = graph.owning_module
    numbers = {node.name: str(i) for i, node in enumerate(copied.nodes)}

    def number(match: re.Match[str]) -> str:
        return "%" + numbers.get(match[1], match[1])

    lines = []
    for node in copied.nodes:
        if node.op == "call_function":
            with contextlib.suppress(TypeError, ValueError):  # no signature to bind to
                bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
                bound.apply_defaults()
                node.args, node.kwargs = bound.args, bound.kwargs
        lines.append(re.sub(r"%([A-Za-z_]\w*)", number, format_node(node, meta=False)))
    return "\n".join(lines)


class Rollback:
    """A record of a model's attributes, tables and hooks, to restore after a failure.

    Tensors are referenced, not copied: none may be written to meanwhile.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved = [
            (module, dict(module.__dict__), _containers(module)) for module in model.modules()
        ]

    def restore(self) -> None:
        for module, state, containers in self._saved:
            module.__dict__.clear()
            module.__dict__.update(state)
            for live, former in containers:
                live.clear()
                live.extend(former) if isinstance(live, list) else live.update(former)


def _containers(module: nn.Module) -> list[tuple[Any, Any]]:
    found = [value for value in module.__dict__.values() if isinstance(value, _CONTAINERS)]
    return [(value, value.copy()) for value in found if type(value).__module__ in _PLAIN]
