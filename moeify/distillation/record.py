"""The dense model behind a student, on meta, and the record of converting it.

What a student is must not depend on the teacher: it is a dense model with fewer layers under a plan
that names every MoE layer. Both are made here on `meta`, compared with what the config builds and
with the student itself, and the student's record is taken from them.
"""

from __future__ import annotations

import copy
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
from moeify.sites.record import Conversion, ConvertedLayer, Swap, conversion_of
from moeify.storage.model_state import tensors_of

_GLOB: Final = str.maketrans({"[": "[[]", "*": "[*]", "?": "[?]"})


def dense_twin(model: nn.Module, record: Conversion | None, cuts: list[Cut]) -> nn.Module:
    """Return the dense model behind a model, on meta and shortened."""
    twin = skeleton(model)
    if record is not None:
        revert(twin)
    shorten_modules(twin, cuts)
    return twin


def built_twin(model: nn.Module, dense: nn.Module, cuts: list[Cut]) -> nn.Module | None:
    """Build the dense model from its new config and compare; None without a config.

    Raises:
        UnsupportedModuleError: The config cannot say what this choice of layers is.
    """
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


def converted_twin(dense: nn.Module, plan: Plan, inputs: ExampleInputs) -> nn.Module:
    """Return a copy of a dense model on meta, converted by a plan."""
    twin = skeleton(dense)
    convert_without_values(twin, plan, inputs)
    return twin


def explicit_plan(record: Conversion, cuts: Sequence[Cut]) -> Plan:
    """Return a plan that gives the kept layers of a conversion, each named; without `student`.

    Args:
        record: The conversion.
        cuts: What is kept of each stack.

    Raises:
        UnsupportedModuleError: No MoE layer is kept.
    """
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
    for key, own, common in (
        ("router", layer.router, plan.router),
        ("init", layer.init, plan.init),
    ):
        said, default = (x.model_dump(mode="json", by_alias=True) for x in (own, common))
        differs = {k: v for k, v in said.items() if v != default[k]}
        if differs:
            rule[key] = differs
    return rule


def _renamed(name: str, cuts: Sequence[Cut]) -> str | None:
    """Return what a name becomes; None if it is of a dropped layer."""
    for cut in cuts:
        prefix = f"{cut.path}." if cut.path else ""
        if name.startswith(prefix):
            at, dot, rest = name[len(prefix) :].partition(".")
            if at.isdigit():
                now = {str(old): str(new) for new, old in enumerate(cut.kept)}
                return f"{prefix}{now[at]}{dot}{rest}" if at in now else None
    return name


def record_of_student(model: nn.Module, old: Conversion, twin: nn.Module, plan: Plan) -> Conversion:
    """Return the record of the twin's conversion, about the model's own modules."""
    made = conversion_of(twin)
    assert made is not None
    layers = []
    for converted in made.layers:
        swaps = [Swap(s.path, s.original, model.get_submodule(s.path)) for s in converted.swaps]
        layers.append(
            ConvertedLayer(
                converted.layer,
                converted.block,
                swaps,
                converted.swap_halves,
                converted.program_params,
            )
        )
    return Conversion(plan, layers, made.ledger, made.fused, old.inputs)


def check_tensors(model: nn.Module, twin: nn.Module) -> None:
    """Check that the model has the tensors of its twin.

    Raises:
        VerificationError: It has not; names one.
    """
    ours, theirs = (
        {i.name: tuple(i.tensor.shape) for i in tensors_of(m) if i.role != "scratch"}
        for m in (model, twin)
    )
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise VerificationError(
                f"{name}: is {ours.get(name)}, and {theirs.get(name)} in a dense model of this "
                "depth under this plan"
            )


__all__ = [
    "built_twin",
    "check_tensors",
    "converted_twin",
    "dense_twin",
    "explicit_plan",
    "record_of_student",
]
