"""Hooks on a converted Hugging Face model that a user holds.

The public functions attach them: `moeify`, `load` and the classes of a custom export; `demoeify`
removes them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from torch import nn

from moeify.errors import CheckpointError
from moeify.formats.save_pretrained import save_pretrained
from moeify.hf.dense_class import dense_class
from moeify.hf.name_rules import carry_name_rules, restore_name_rules
from moeify.sites.descent import all_descendants
from moeify.sites.record import ATTRIBUTE, Conversion, conversion_of, require_conversion

_ONE_EXPERT: Final = re.compile(r"\.experts\.[0-9]+\.")


class SavePretrained:
    """Replaces the `save_pretrained` of a converted model.

    The class's own would write what loads as a dense model with random MLPs. This is an object, not
    a bound function, so that the copy of a model saves the copy.
    """

    def __init__(self, model: nn.Module, rules: Mapping[str, Any]) -> None:
        self.model = model
        self.rules = rules  # of the dense model, where they changed

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        save_pretrained(self.model, *args, **kwargs)


class RefusePart:
    """Replaces the `save_pretrained` of a part that holds blocks of a model converted as a whole.

    Plan and example inputs are the whole model's, so the part has no recipe of its own. This keeps
    names only, so that a copy of the part does not copy the whole.
    """

    def __init__(self, path: str, part: nn.Module, whole: nn.Module) -> None:
        self.path = path
        self.part, self.whole = dense_class(part).__name__, dense_class(whole).__name__
        self.alone = not hasattr(whole, "save_pretrained")

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        cure = f"save the whole model, and take .{self.path} of what from_pretrained returns"
        if self.alone:
            cure = "use moeify.save on the whole model, or convert this part alone"
        raise CheckpointError(
            f"{self.path}: this {self.part} is a part of a converted {self.whole}: a folder of it "
            f"would load as a dense model with random MLPs; {cure}"
        )


def guard(model: nn.Module) -> None:
    """Make a converted model save itself, and refuse weights under names that it does not have.

    Its parts that transformers could save on their own refuse to be. What its class says of MLPs by
    name is said of the blocks.
    """
    record = require_conversion(model)
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = SavePretrained(model, _carry_rules(model, record))
        model.register_load_state_dict_pre_hook(refuse_other_names)  # type: ignore[no-untyped-call]
    for path, part in _parts(model, record):
        part.__dict__["save_pretrained"] = RefusePart(path, part, model)
        inside = {n.removeprefix(f"{path}.") for n in _replaced(record) if n.startswith(f"{path}.")}
        hook = functools.partial(_refuse_names, frozenset(inside))
        part.register_load_state_dict_pre_hook(hook)  # type: ignore[no-untyped-call]


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    for module in model.modules():
        found = module.__dict__.get("save_pretrained")
        if not isinstance(found, SavePretrained | RefusePart):
            continue
        if module is not model and isinstance(found, SavePretrained):
            continue  # it was converted by itself
        del module.__dict__["save_pretrained"]
        if isinstance(found, SavePretrained):
            restore_name_rules(module, found.rules)
        for key, wrapped in list(module._load_state_dict_pre_hooks.items()):
            hook = getattr(wrapped, "hook", wrapped)
            if hook is refuse_other_names or getattr(hook, "func", None) is _refuse_names:
                del module._load_state_dict_pre_hooks[key]


def _carry_rules(model: nn.Module, record: Conversion) -> dict[str, Any]:
    swaps = [(swap.original, swap.replacement) for c in record.layers for swap in c.swaps]
    inside = tuple(f"{layer.block}." for layer in record.layers)
    names = [name for name in model.state_dict(keep_vars=True) if name.startswith(inside)]
    return carry_name_rules(model, all_descendants(model, record), swaps, names)


def _parts(model: nn.Module, record: Conversion) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a model that can save themselves and hold a block."""
    places = [swap.path for layer in record.layers for swap in layer.swaps]
    for path, part in model.named_modules():
        if part is model or not hasattr(part, "save_pretrained") or ATTRIBUTE in part.__dict__:
            continue
        if any(place.startswith(f"{path}.") for place in places):
            yield path, part


def _replaced(record: Conversion) -> set[str]:
    return {name for name, (fate, _) in record.ledger.items() if fate != "kept"}


def refuse_other_names(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Refuse the MLP weights of a dense or a native checkpoint; a load hook.

    A trainer that resumes loads with `strict=False`, which would silently keep the present experts.
    """
    record = conversion_of(model)
    if record is not None:
        _refuse_names(_replaced(record), model, state_dict, prefix)


def _refuse_names(
    dense: Iterable[str], model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    names, dense = model.state_dict(keep_vars=True).keys(), set(dense)
    for key in state_dict:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix) or name in names:
            continue
        if name in dense or _ONE_EXPERT.search(name):
            raise CheckpointError(
                f"{name}: is of a dense model or a native export, but this model keeps its experts "
                'stacked: resume from a folder that save_pretrained(export="custom") or a Trainer '
                "wrote, or load that checkpoint with from_pretrained"
            )
