"""What a sharded checkpoint keeps of a model and an optimizer: tensors by name, and JSON.

Tensors are `model.<name>` and `optimizer.<name>.<key>`; everything else is in the manifest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from moeify import compat
from moeify.checkpoint.sharded.manifest import OptimizerRecord, OptionGroup, ShardedManifest
from moeify.distributed.dtensor import is_sharded
from moeify.errors import CheckpointError
from moeify.storage.model_state import State, check_state_dict, tensors_of
from moeify.storage.safetensors_file import DTYPES
from moeify.units import dtype_name
from moeify.zero.stage1 import ShardedOptimizer

__all__ = ["NamedOptimizer", "collect_state", "json_data"]

# How an optimizer computes depends on the layout, which may be another one.
_NOT_KEPT = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")


def collect_state(model: nn.Module) -> State:
    """Collect a model's tensors, tied ones once; what FSDP2 has gathered is freed first."""
    for module in model.modules():
        unit: Any = module
        if hasattr(unit, "reshard") and hasattr(unit, "unshard"):
            unit.reshard()
    state = State()
    seen: dict[int, str] = {}
    for item in tensors_of(model):
        if item.role == "scratch" and not item.tensor.is_floating_point():
            continue
        if id(item.tensor) in seen:
            state.aliases[item.name] = seen[id(item.tensor)]
            continue
        if dtype_name(item.tensor.dtype) not in DTYPES:
            raise CheckpointError(f"{item.name}: {item.tensor.dtype} cannot be saved")
        seen[id(item.tensor)] = item.name
        state.tensors[item.name] = item.tensor
        state.roles[item.name] = item.role
    check_state_dict(model, state)
    return state


class NamedOptimizer:
    """An optimizer (of torch, or a `ShardedOptimizer`) by the names of the model's parameters."""

    def __init__(self, optimizer: Optimizer, state: State) -> None:
        whole: Any = optimizer
        self.owner = whole
        self.sharded = isinstance(optimizer, ShardedOptimizer)
        self.inner: Optimizer = whole.inner if self.sharded else optimizer
        self.masters = bool(self.sharded and whole.has_masters)
        known = {id(tensor): name for name, tensor in state.tensors.items()}
        self.groups: list[list[str]] = []
        self.parameters: dict[str, Tensor] = {}
        for position, group in enumerate(optimizer.param_groups):
            names = []
            for number, parameter in enumerate(group["params"]):
                name = known.get(id(parameter))
                if name is None:
                    raise CheckpointError(
                        f"optimizer: parameter {number} of group {position} (shape "
                        f"{tuple(parameter.shape)}) is not of this model: make the optimizer over "
                        "model.parameters() after the conversion"
                    )
                names.append(name)
                self.parameters[name] = parameter
            self.groups.append(names)

    def held(self, name: str) -> Tensor:
        """Return what the optimizer updates for a parameter: itself, or this rank's shard."""
        parameter = self.parameters[name]
        shard = self.owner.shard_of(parameter) if self.sharded else None
        return parameter if shard is None else shard

    def settle(self) -> None:
        """Let master weights adopt what was written into parameters since the last step."""
        if isinstance(self.owner, ShardedOptimizer):
            self.owner.adopt_writes()

    def weights(self) -> dict[str, Tensor]:
        """Return master weights by name, if there are any."""
        return {name: self.held(name) for name in self.parameters} if self.masters else {}

    def states(self) -> Iterator[tuple[str, str, Any]]:
        """Yield (parameter, key, value) of all state."""
        for name in self.parameters:
            found: Mapping[str, Any] = self.inner.state.get(self.held(name), {})
            for key, value in found.items():
                if not isinstance(key, str):
                    raise CheckpointError(f"optimizer: {name}: state has the key {key!r:.40}")
                if not isinstance(value, Tensor):
                    value = json_data(value, f"optimizer: {name}: {key}")
                elif dtype_name(value.dtype) not in DTYPES:
                    raise CheckpointError(f"optimizer: {name}: {key}: cannot save {value.dtype}")
                elif value.ndim and not is_sharded(value) and is_sharded(self.held(name)):
                    raise CheckpointError(
                        f"optimizer: {name}: {key}: is not a DTensor, although the parameter is "
                        f"distributed: {type(self.inner).__name__} does not say which part of the "
                        "whole it is, so it cannot be saved"
                    )
                yield name, key, value

    def record(self) -> OptimizerRecord:
        """Return what is not in tensors."""
        groups = []
        for names, group in zip(self.groups, self.owner.param_groups, strict=True):
            options = {
                key: json_data(
                    value.item() if isinstance(value, Tensor) and value.numel() == 1 else value,
                    f"optimizer: {key}",
                )
                for key, value in group.items()
                if key not in _NOT_KEPT
            }
            groups.append(OptionGroup(options=options, names=names))
        states: dict[str, list[str]] = {}
        values: dict[str, dict[str, Any]] = {}
        for name, key, value in self.states():
            if isinstance(value, Tensor):
                states.setdefault(name, []).append(key)
            else:
                values.setdefault(name, {})[key] = value
        return OptimizerRecord(
            name=type(self.inner).__name__, groups=groups, states=states, values=values
        )

    def options(self, record: OptimizerRecord, where: str) -> list[dict[str, Any]]:
        """Return the saved hyperparameters of each running group."""
        if record.name != type(self.inner).__name__:
            raise CheckpointError(
                f"{where}: optimizer: was saved from {record.name}, but this is "
                f"{type(self.inner).__name__}"
            )
        saved = {name: group.options for group in record.groups for name in group.names}
        found = []
        for position, names in enumerate(self.groups):
            options: dict[str, Any] | None = None
            for name in names:
                if name not in saved:
                    raise CheckpointError(f"{where}: optimizer: {name}: was not optimised")
                if options is not None and saved[name] != options:
                    differ = [k for k, v in saved[name].items() if options.get(k) != v]
                    raise CheckpointError(
                        f"{where}: optimizer: parameters of group {position} were saved with "
                        f"different {', '.join(differ) or 'options'} ({names[0]}, {name}): split "
                        "the group as it was"
                    )
                options = saved[name]
            found.append(options or {})
        extra = sorted(saved.keys() - self.parameters.keys())
        if extra:
            raise CheckpointError(f"{where}: optimizer: {extra[0]}: is not optimised here")
        return found

    def check_states(self, manifest: ShardedManifest, where: str) -> None:
        """Check that all saved state has a place."""
        assert manifest.optimizer is not None
        for name, keys in manifest.optimizer.states.items():
            for key in keys:
                record = manifest.tensors[f"optimizer.{name}.{key}"]
                like = self.held(name)
                if record.shape in ([], list(like.shape)) or not is_sharded(like):
                    continue
                raise CheckpointError(
                    f"{where}: optimizer: {name}: {key} has shape {record.shape}, not that of the "
                    "parameter, which is distributed here: load it where the parameter is whole"
                )

    def made(self, manifest: ShardedManifest) -> dict[str, dict[str, Tensor]]:
        """Return a tensor for each saved state, the optimizer's own where it fits."""
        assert manifest.optimizer is not None
        capturable = {
            name
            for names, group in zip(self.groups, self.inner.param_groups, strict=True)
            for name in names
            if group.get("capturable") or group.get("fused")
        }
        found: dict[str, dict[str, Tensor]] = {}
        for name, keys in manifest.optimizer.states.items():
            like = self.held(name)
            live = self.inner.state.get(like, {})
            for key in keys:
                record = manifest.tensors[f"optimizer.{name}.{key}"]
                dtype = DTYPES[record.dtype]
                tensor = live.get(key)
                fits = (
                    isinstance(tensor, Tensor)
                    and tensor.dtype == dtype
                    and list(tensor.shape) == record.shape
                    and is_sharded(tensor) == (is_sharded(like) and bool(record.shape))
                )
                if not fits:
                    tensor = _empty(like, record.shape, dtype, scalars_stay=name in capturable)
                found.setdefault(name, {})[key] = tensor
        return found

    def assign(
        self,
        options: list[dict[str, Any]],
        states: Mapping[str, Mapping[str, Tensor]],
        values: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Put loaded state and hyperparameters in place."""
        for name in self.parameters:
            self.inner.state.pop(self.held(name), None)
            if name in states or name in values:
                self.inner.state[self.held(name)] = {**values.get(name, {}), **states.get(name, {})}
        owners = [self.owner.param_groups]
        if self.inner is not self.owner:
            owners.append(self.inner.param_groups)
        for groups in owners:
            for group, saved in zip(groups, options, strict=True):
                for key, value in saved.items():
                    now = group.get(key)
                    if isinstance(now, Tensor):
                        now.fill_(value)
                    else:
                        group[key] = tuple(value) if isinstance(value, list) else value


def _empty(like: Tensor, shape: list[int], dtype: torch.dtype, *, scalars_stay: bool) -> Tensor:
    whole: Any = like.detach()
    if shape == list(whole.shape):
        if not is_sharded(whole):
            return torch.empty_like(whole, dtype=dtype)
        local = torch.empty_like(whole.to_local(), dtype=dtype)
        if dtype == whole.dtype:
            return compat.dtensor_like(local, whole)
        made: Tensor = torch.empty_like(whole, dtype=dtype)
        return made
    device = whole.device if shape or scalars_stay else "cpu"
    return torch.empty(shape, dtype=dtype, device=device)


def json_data(value: Any, where: str) -> Any:
    """Return data as JSON has it (tuples become lists); `where` names it in messages."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            raise CheckpointError(f"{where}: {value} is not a number that JSON can hold")
        return value
    if isinstance(value, list | tuple):
        return [json_data(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise CheckpointError(f"{where}: the key {key!r:.40} is not a string")
        return {key: json_data(item, f"{where}.{key}") for key, item in value.items()}
    raise CheckpointError(
        f"{where}: a {type(value).__name__} is not JSON data: use numbers, strings, lists, dicts"
    )
