"""The dense model behind a student, on meta, and the record of converting it.

A student must not depend on its teacher: it is a dense model with fewer layers under a plan that
names every MoE layer. Both are made here on `meta`, compared with what the config builds and with
the student itself, and the student's record is taken from them.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, Final

from torch import nn

from moeify.capture.capture import ExampleInputs
from moeify.capture.on_meta import parameters_on_meta, quiet_random_state
from moeify.convert.convert_model import convert_without_values
from moeify.convert.revert import revert
from moeify.distillation.drop_config import Cut, same_tree, shorten_modules
from moeify.errors import UnsupportedModuleError, VerificationError
from moeify.hf.dense_class import dense_class
from moeify.hf.detect import is_hf
from moeify.plan.layer_plan import LayerPlan
from moeify.plan.plan import Plan
from moeify.sites.install import skeleton
from moeify.sites.record import Conversion, Swap, conversion_of
from moeify.storage.model_state import tensors_of

_GLOB: Final = str.maketrans({"[": "[[]", "*": "[*]", "?": "[?]"})


def shortened_dense(model: nn.Module, record: Conversion | None, cuts: list[Cut]) -> nn.Module:
    """Return the dense model behind a model, on meta and shortened."""
    dense = skeleton(model)
    if record is not None:
        revert(dense)
    shorten_modules(dense, cuts)
    return dense


def built_from_config(model: nn.Module, dense: nn.Module, cuts: list[Cut]) -> nn.Module | None:
    """Build the shortened dense model from its config and compare; None without a config."""
    if not is_hf(dense):
        return None
    cls = dense_class(dense)
    try:
        with quiet_random_state(), parameters_on_meta():
            built: nn.Module = cls(copy.deepcopy(dense.config))
    except Exception as error:  # a class may raise anything
        raise UnsupportedModuleError(
            type(model).__name__,
            f"cannot be built from its config with fewer layers: {type(error).__name__}: {error}",
        ) from error
    same_tree(dense, built, cuts)
    return built


def converted_copy(dense: nn.Module, plan: Plan, inputs: ExampleInputs) -> nn.Module:
    """Return a copy of a dense model on meta, converted by a plan."""
    model = skeleton(dense)
    convert_without_values(model, plan, inputs)
    return model


def explicit_plan(record: Conversion, cuts: Sequence[Cut]) -> Plan:
    """Return a plan, without `student`, that names each kept layer of a conversion."""
    rules: list[dict[str, Any]] = []
    for converted in record.layers:
        name = _renamed(converted.layer.name, cuts)
        if name is None:
            continue
        rule, pattern = _rule(converted.layer, record.plan), name.translate(_GLOB)
        if rules and {**rules[-1], "select": None} == {**rule, "select": None}:
            rules[-1]["select"]["name"].append(pattern)
        else:
            rules.append({"select": {"name": [pattern]}, **rule})
    if not rules:
        raise UnsupportedModuleError(
            cuts[0].path, "none of the layers to keep is a Mixture of Experts; keep one of them"
        )
    data = {k: v for k, v in record.plan.data().items() if k != "student"}
    return Plan.of(data | {"layers": rules})


def _rule(layer: LayerPlan, plan: Plan) -> dict[str, Any]:
    rule: dict[str, Any] = {"experts": layer.experts, "top_k": layer.top_k, "kernel": layer.kernel}
    rule |= {"residual": layer.residual, "expert": layer.expert}
    for key, of_layer, of_plan in (
        ("router", layer.router, plan.router),
        ("init", layer.init, plan.init),
    ):
        values, default = (x.model_dump(mode="json", by_alias=True) for x in (of_layer, of_plan))
        differs = {k: v for k, v in values.items() if v != default[k]}
        if differs:
            rule[key] = differs
    return rule


def _renamed(name: str, cuts: Sequence[Cut]) -> str | None:
    """Return the name of a layer's part after the cut; None if its layer is dropped."""
    for cut in cuts:
        prefix = f"{cut.path}." if cut.path else ""
        if name.startswith(prefix):
            at, dot, rest = name[len(prefix) :].partition(".")
            if at.isdigit():
                now = {str(old): str(new) for new, old in enumerate(cut.kept)}
                return f"{prefix}{now[at]}{dot}{rest}" if at in now else None
    return name


def record_of_student(
    model: nn.Module, old: Conversion, copied: nn.Module, plan: Plan
) -> Conversion:
    """Return the record of the copy's conversion, about the model's own modules."""
    made = conversion_of(copied)
    assert made is not None
    layers = []
    for converted in made.layers:
        swaps = [Swap(s.path, s.original, model.get_submodule(s.path)) for s in converted.swaps]
        layers.append(dataclasses.replace(converted, swaps=swaps))
    return Conversion(plan, layers, made.ledger, made.fused, old.inputs)


def check_tensors(model: nn.Module, expected: nn.Module) -> None:
    """Check that the model has the tensors, by name and shape, of the expected one."""
    ours, theirs = (
        {i.name: tuple(i.tensor.shape) for i in tensors_of(m) if i.role != "scratch"}
        for m in (model, expected)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise VerificationError(
                f"{name}: is {ours.get(name)}, but {theirs.get(name)} in a dense model of this "
                "depth under this plan"
            )
