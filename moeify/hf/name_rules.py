"""Rules of a transformers class that name modules and parameters, which a conversion replaces.

What holds for each of them in a converted model:

- `_keep_in_fp32_modules`, `_keep_in_fp32_modules_strict`: carried over. What came from a dense
  parameter that stays in float32 stays in float32.
- `_no_split_modules`: carried over, where a class that it names was replaced.
- `_keys_to_ignore_on_load_missing`: a pattern that fits a tensor of a block is dropped; no class
  knows how experts start.
- `_tied_weights_keys`: nothing to do. An MLP with a tied weight is refused.
- `_keys_to_ignore_on_save`, `_keys_to_ignore_on_load_unexpected`: nothing to do. They name what is
  outside MLPs, and a folder holds all that a block has.
- `_tp_plan`, `base_model_tp_plan`: a rule for a projection fits nothing any more, which
  transformers says; blocks are then whole on every rank, and attention is sliced as before.
- `_pp_plan`, `_fsdp_plan`, `_skip_keys_device_placement`, `_can_record_outputs`: they name layers,
  arguments and classes around MLPs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Final

import torch
from torch import nn

_IN_FLOAT16: Final = "_keep_in_fp32_modules"
_IN_BOTH: Final = "_keep_in_fp32_modules_strict"  # in float16 and in bfloat16
_IGNORED: Final = "_keys_to_ignore_on_load_missing"
_WHOLE: Final = "_no_split_modules"


def fits(patterns: Iterable[str], name: str) -> bool:
    """Tell whether a tensor's name fits one of these, in the way transformers looks for them."""
    return any(re.search(pattern.replace("*", ".*"), name) for pattern in patterns)


def float32_patterns(model: nn.Module, dtype: torch.dtype) -> set[str]:
    """Return the patterns of what a class keeps in float32 when it is loaded in a dtype."""
    found: set[str] = set()
    if dtype is torch.float16:
        found |= set(getattr(model, _IN_FLOAT16, None) or ())
    if dtype in (torch.float16, torch.bfloat16):
        found |= set(getattr(model, _IN_BOTH, None) or ())
    return found


def carry_name_rules(
    model: nn.Module,
    made_from: Mapping[str, Collection[str]],
    replaced: Collection[tuple[nn.Module, nn.Module]],
    blocks: Collection[str],
) -> dict[str, Any]:
    """Make the rules of a model fit what replaced its MLPs, and return those that it had.

    Args:
        model: A converted model of transformers.
        made_from: Names of the blocks' parameters by the dense parameter that they come from.
        replaced: Pairs of a dense module and the one in its place.
        blocks: Names of all tensors of blocks.
    """
    before: dict[str, Any] = {}

    def set_rule(rule: str, names: set[str]) -> None:
        if names != set(getattr(model, rule, None) or ()):
            before[rule] = getattr(model, rule)
            setattr(model, rule, names)

    for rule in (_IN_FLOAT16, _IN_BOTH):
        names = set(getattr(model, rule, None) or ())
        for dense, made in made_from.items():
            if fits(names, dense):
                names |= {name for name in made if not fits(names, name)}
        set_rule(rule, names)
    ignored = set(getattr(model, _IGNORED, None) or ())
    set_rule(_IGNORED, {p for p in ignored if not any(re.search(p, name) for name in blocks)})
    whole = set(getattr(model, _WHOLE, None) or ())
    set_rule(
        _WHOLE,
        whole.union(
            type(new).__name__
            for old, new in replaced
            if whole & {type(module).__name__ for module in old.modules()}
        ),
    )
    return before


def restore_name_rules(model: nn.Module, before: Mapping[str, Any]) -> None:
    """Undo `carry_name_rules`."""
    for rule, names in before.items():
        setattr(model, rule, names)
