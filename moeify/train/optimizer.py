"""The optimizer of a converted model: its parameter groups, and one call for every ZeRO stage."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moeify.errors import MoeifyError
from moeify.nn.experts import Experts, ModuleExperts
from moeify.sites.record import ATTRIBUTE, Conversion, conversion_of
from moeify.zero.fsdp2 import settle
from moeify.zero.stage1 import ShardedOptimizer

__all__ = ["optimizer", "param_groups"]


def param_groups(
    model: nn.Module,
    *,
    weight_decay: float = 0.01,
    lr: float | None = None,
    expert_lr: float | None = None,
    expert_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's parameters into groups for an optimizer: dense or expert, decayed or not.

    Biases, norms and other parameters of at most one dimension, not counting the expert dimension,
    are not decayed. Parameters on different meshes are in different groups, so that `foreach` and
    `fused` optimizers accept them. Empty groups are left out.

    Args:
        model: A converted model, one with `MoE` layers, or any other.
        weight_decay: Of the parameters that are decayed.
        lr: Learning rate of all groups; None leaves it to the optimizer.
        expert_lr: Learning rate of experts; `lr` if None.
        expert_weight_decay: Weight decay of experts; `weight_decay` if None.

    Returns:
        Groups with `params`, `param_names` (in the same order), `name`, `weight_decay` and `lr` if
        given. Each parameter that trains is in exactly one of them. Groups of experts have
        `moe: True` and DeepSpeed's name of their expert-data-parallel group: `ep_size_4` for layers
        over 4 ranks.

    Source:
        The keys of expert groups: `split_params_into_different_moe_groups_for_optimizer` in
        deepspeed.moe.utils.

    Example:
        >>> groups = param_groups(nn.Linear(2, 2), lr=0.1)
        >>> [(g["name"], g["param_names"], g["weight_decay"]) for g in groups]
        [('dense, decay', ['weight'], 0.01), ('dense, no decay', ['bias'], 0.0)]
    """
    settle(model)
    ranks = _expert_ranks(model)
    stacked = _parameters_of(model, Experts)  # their first dimension is that of experts
    norms = _parameters_of(model, nn.LayerNorm, nn.RMSNorm)
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        size = ranks.get(id(parameter))
        dims = parameter.ndim - (id(parameter) in stacked)
        bias = name.rpartition(".")[2].endswith("bias")
        decayed = dims > 1 and not bias and id(parameter) not in norms
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        key = (size is not None, size, not decayed, mesh)
        if key not in groups:
            groups[key] = _group(size, decayed)
        groups[key]["params"].append(parameter)
        groups[key]["param_names"].append(name)
    if expert_weight_decay is None:
        expert_weight_decay = weight_decay
    for (expert, _, plain, _), group in groups.items():
        decay = expert_weight_decay if expert else weight_decay
        group["weight_decay"] = 0.0 if plain else decay
        rate = expert_lr if expert and expert_lr is not None else lr
        if rate is not None:
            group["lr"] = rate
    # Sorting is stable: meshes stay in model order, the same on every rank.
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], key[1] or 0, key[2]))]


def _parameters_of(model: nn.Module, *classes: type[nn.Module]) -> set[int]:
    """Return the ids of the own parameters of modules of these classes."""
    return {
        id(parameter)
        for module in model.modules()
        if isinstance(module, classes)
        for parameter in module.parameters(recurse=False)
    }


def _group(ranks: int | None, decayed: bool) -> dict[str, Any]:
    made: dict[str, Any] = {"params": [], "param_names": []}
    if ranks is None:
        return made | {"name": "dense, decay" if decayed else "dense, no decay"}
    return made | {"name": f"ep_size_{ranks}", "moe": True}


def _expert_ranks(model: nn.Module) -> dict[int, int]:
    """Return the number of ep ranks of each expert parameter, by id."""
    found: dict[int, int] = {}
    for module in model.modules():
        record = module.__dict__.get(ATTRIBUTE)
        if isinstance(record, Conversion):
            layout = None if record.parallel is None else record.parallel.layout
            for converted in record.layers:
                size = 1 if layout is None else layout.ep(converted.layer.experts)
                experts = module.get_submodule(f"{converted.block}.experts")
                for parameter in experts.parameters():
                    found.setdefault(id(parameter), size)
    for module in model.modules():
        if isinstance(module, Experts | ModuleExperts):
            for parameter in module.parameters():
                found.setdefault(id(parameter), 1)
    return found


def optimizer(
    model: nn.Module,
    cls: type[Optimizer] = torch.optim.AdamW,
    groups: Iterable[Any] | None = None,
    **options: Any,
) -> Optimizer:
    """Make the optimizer of a converted model according to the plan's `zero`.

    At stage 1, with an offload at stages 0 and 1, or with master weights, it is a
    `ShardedOptimizer` around `cls`; otherwise `cls` itself, also for a model that was not
    converted.

    Args:
        model: The model, on its device.
        cls: Any optimizer of torch's interface.
        groups: Parameters or groups of them; `param_groups(model)` if None, with the given weight
            decay or the default one of `cls`.
        options: Arguments of `cls`; if parameters are pieces and `groups` is None, `foreach` is on
            by default.

    Raises:
        MoeifyError: The plan partitions parameters that are not in the model any more.

    Example:
        >>> made = optimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.1)
        >>> type(made).__name__, len(made.param_groups)
        ('SGD', 2)
    """
    settle(model)
    if groups is None:
        groups = param_groups(model, weight_decay=_weight_decay(cls, options))
        known = inspect.signature(cls).parameters
        if "foreach" in known and not options.keys() & {"foreach", "fused"} and _has_pieces(model):
            options["foreach"] = True  # one dispatch for many pieces; our groups are uniform
    record = conversion_of(model)
    parallel = None if record is None else record.parallel
    zero = None if parallel is None else parallel.zero
    if parallel is None or zero is None or zero.stage > 1:
        return cls(groups, **options)
    if zero.stage == 0 and zero.offload == "none" and not zero.has_masters:
        return cls(groups, **options)
    converted = next(m for m in model.modules() if m.__dict__.get(ATTRIBUTE) is record)
    names = dict(converted.named_parameters(remove_duplicate=False))
    lost = [name for name in parallel.cuts if name not in names]
    if lost:
        raise MoeifyError(
            f"{lost[0]}: the plan partitions its optimizer state, but it is not in the model any "
            "more; make the optimizer before you remove modules"
        )
    made = ShardedOptimizer(
        groups,
        cls,
        {id(names[name]): cut for name, cut in parallel.cuts.items()},
        device=None if zero.offload == "none" else "cpu",
        master=torch.float32 if zero.has_masters else None,
        masters={id(names[name]): value for name, value in parallel.masters.items()},
        **options,
    )
    parallel.masters.clear()  # a second copy of the weights; this optimizer trains its own
    return made


def _has_pieces(model: nn.Module) -> bool:
    """Tell whether the optimizer will hold DTensors."""
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return True
    record = conversion_of(model)
    return record is not None and record.parallel is not None and bool(record.parallel.cuts)


def _weight_decay(cls: type[Optimizer], options: dict[str, Any]) -> float:
    if "weight_decay" in options:
        return float(options["weight_decay"])
    known = inspect.signature(cls).parameters.get("weight_decay")
    return float(known.default) if known and isinstance(known.default, int | float) else 0.0
