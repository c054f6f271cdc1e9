"""Hooks on a converted Hugging Face model that a user holds.

The public functions attach them: `moeify`, `load` and the classes of a custom export; `demoeify`
removes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from torch import nn

from moeify.errors import CheckpointError
from moeify.formats.save_pretrained import save_pretrained
from moeify.sites.record import conversion_of

_ONE_EXPERT: Final = re.compile(r"\.experts\.[0-9]+\.")


class SavePretrained:
    """Replaces the `save_pretrained` of a converted model.

    The class's own would write what loads as a dense model with random MLPs. This is an object, not
    a bound function, so that the copy of a model saves the copy.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        save_pretrained(self.model, *args, **kwargs)


def guard(model: nn.Module) -> None:
    """Make a converted model save itself, and refuse weights under names that it does not have."""
    if not hasattr(model, "save_pretrained"):
        return
    model.__dict__["save_pretrained"] = SavePretrained(model)
    model.register_load_state_dict_pre_hook(refuse_other_names)  # type: ignore[no-untyped-call]


def unguard(model: nn.Module) -> None:
    """Undo `guard`."""
    if not isinstance(model.__dict__.pop("save_pretrained", None), SavePretrained):
        return
    for key, hook in list(model._load_state_dict_pre_hooks.items()):
        if getattr(hook, "hook", hook) is refuse_other_names:
            del model._load_state_dict_pre_hooks[key]


def refuse_other_names(
    model: nn.Module, state_dict: Mapping[str, Any], prefix: str, *_: Any
) -> None:
    """Refuse the MLP weights of a dense or a native checkpoint; a load hook.

    A trainer that resumes loads with `strict=False`, which would silently keep the present experts.
    """
    record = conversion_of(model)
    if record is None:
        return
    names = model.state_dict(keep_vars=True).keys()
    dense = {name for name, (fate, _) in record.ledger.items() if fate != "kept"}
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
