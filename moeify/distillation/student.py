"""`drop_layers` and `student`: a model with fewer of its layers, dense or converted.

Layers are found on the recorded graph, taken out of it by a pass, and then out of the model. What
comes out is a model like any other: its config states its depth, the record of its conversion is
that of a dense model with fewer layers under a plan that names every MoE layer, and both are proven
by building and converting that model once more, on `meta`.

Source: Mixture-of-Students, DeepSpeed-MoE (Rajbhandari et al. 2022), section 4.2.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from moeify.capture.capture import Capture, ExampleInputs, capture
from moeify.capture.input_spec import make_inputs
from moeify.distillation.drop_config import Cut, shorten_modules
from moeify.distillation.record import (
    built_from_config,
    check_tensors,
    converted_copy,
    explicit_plan,
    record_of_student,
    shortened_dense,
)
from moeify.distillation.reinitialise import draw_again
from moeify.distillation.size import describe
from moeify.errors import MoeifyError, PlanError, UnsupportedModuleError, VerificationError
from moeify.hf.detect import example_inputs_for, is_hf
from moeify.passes.drop_layers import DropLayers
from moeify.passes.infra.base import PlanContext
from moeify.passes.infra.manager import PassManager
from moeify.passes.infra.observers import observers_from_env
from moeify.passes.match.stacks import Miss, Stack, find_stacks
from moeify.passes.rewrite.facts import CHECKS
from moeify.plan.plan import Plan
from moeify.plan.selection import shorten
from moeify.plan.student import StudentSpec, read_section
from moeify.sites.record import ATTRIBUTE, Conversion, conversion_of
from moeify.sites.unsupported import refuse_adapters
from moeify.storage.model_state import Rollback, tensors_of

log = logging.getLogger("moeify")
Model = TypeVar("Model", bound=nn.Module)
Choice = StudentSpec | Plan | Mapping[str, Any] | str | os.PathLike[str]


def drop_layers(
    model: Model, spec: Choice | None = None, *, example_inputs: ExampleInputs | None = None
) -> Model:
    """Take whole layers out of a model, in place; after an error it is as it was.

    Names are renumbered as a `ModuleList` does, and so are the positions that layers know (for
    their place in a cache) and everything in the config that counts layers. Parameters of kept
    layers are the same objects; make a new optimizer, since those of dropped layers are gone.

    Args:
        model: A dense or a converted model of one process, not compiled or wrapped. On `meta` it
            stays on `meta`.
        spec: Which layers: a `StudentSpec` or its data, such as `{"drop": {"every": 8}}`; or a plan
            with a `student:` section. The model's own plan if None.
        example_inputs: Inputs to run it once with; those of its conversion, or made from the config
            of a Hugging Face model, if None.

    Returns:
        The same object.

    Raises:
        PlanError: The choice does not fit: no such layer, or nothing is dropped.
        UnsupportedModuleError: The model has no stack of layers that can be shortened, or a dropped
            layer is needed by others; says why.
        CaptureError: The model does not run on the example inputs.
        MoeifyError: Its layers lie on several ranks.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.linear = nn.Linear(8, 8)
        ...     def forward(self, x):
        ...         return x + self.linear(x)
        >>> model = nn.Sequential(*(Block() for _ in range(4)))
        >>> len(drop_layers(model, {"drop": {"every": 2}}, example_inputs=torch.randn(2, 8)))
        2
    """
    record = _refuse(model)
    chosen = _spec(spec, record)
    inputs = _inputs(model, record, example_inputs)
    seed = 0 if record is None else record.plan.init.seed
    if isinstance(spec, Plan):
        seed = spec.init.seed
    found = capture(model, inputs)
    stacks, misses = find_stacks(model, found)
    cuts = _cuts(model, chosen, stacks, misses)
    _on_graph(model, found, stacks, cuts)
    size = describe(model)
    dense = shortened_dense(model, record, cuts)
    built = built_from_config(model, dense, cuts)
    expected, plan = dense, None
    if record is not None:
        plan = explicit_plan(record, cuts)
        expected = converted_copy(dense, plan, inputs)
    fresh = None
    if chosen.weights == "fresh":
        fresh = draw_again(expected, built, plan, inputs, seed, name=type(model).__name__)
    rollback = Rollback(model)
    try:
        shorten_modules(model, cuts)
        if record is not None and plan is not None:
            model.__dict__[ATTRIBUTE] = record_of_student(model, record, expected, plan)
        check_tensors(model, expected)
        _same_nodes(stacks, cuts, find_stacks(model, capture(model, inputs))[0])
    except BaseException:
        rollback.restore()
        raise
    if fresh is not None:
        with torch.no_grad():
            for item in tensors_of(model):
                item.tensor.copy_(fresh[item.name])
    kept = "; ".join(f"{c.path}: {len(c.kept)} of {c.count} layers" for c in cuts)
    log.info("drop-layers: %s\n%s", kept, describe(model, size))
    return model


def student(
    teacher: Model,
    plan_or_spec: Choice | None = None,
    *,
    example_inputs: ExampleInputs | None = None,
) -> Model:
    """Make a student of a model: a copy with fewer layers. The teacher stays as it is.

    Args:
        teacher: The model; see `drop_layers`.
        plan_or_spec: Which layers; see `drop_layers`.
        example_inputs: See `drop_layers`.

    Raises:
        PlanError, UnsupportedModuleError, CaptureError, MoeifyError: As `drop_layers`.
    """
    _spec(plan_or_spec, _refuse(teacher))  # before anything is copied
    return drop_layers(copy.deepcopy(teacher), plan_or_spec, example_inputs=example_inputs)


# -- the model and the choice of layers


def _refuse(model: nn.Module) -> Conversion | None:
    """Refuse a model that cannot be shortened; return the record of its conversion."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    name = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UnsupportedModuleError(name, "drop layers of the model inside first, then wrap it")
    refuse_adapters(model)
    for path, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor" or type(parameter.data).__name__ == "DTensor":
            raise UnsupportedModuleError(path, "it is sharded already: drop layers, then shard")
    for path, module in model.named_modules():
        if "_hf_hook" in module.__dict__:
            raise UnsupportedModuleError(
                path or name, "accelerate has dispatched it: drop layers, then dispatch"
            )
    record = conversion_of(model)
    if record is not None and ATTRIBUTE not in model.__dict__:
        raise UnsupportedModuleError(name, "only a part of it was converted: give that part")
    if record is not None and record.parallel is not None:
        raise MoeifyError(
            "drop_layers needs the whole model, but this one was converted for several ranks: make "
            "the student in one process, save it, and load it on the ranks"
        )
    return record


def _spec(spec: Choice | None, record: Conversion | None) -> StudentSpec:
    if isinstance(spec, StudentSpec):
        return spec
    if spec is None:
        plan = None if record is None else record.plan
        if plan is None or plan.student is None:
            raise PlanError(
                "say which layers the student keeps: in a `student:` section of the plan, or with "
                'a spec such as {"drop": {"every": 8}}'
            )
        return plan.student
    if isinstance(spec, Mapping) and not {"layers", "version"} & spec.keys():
        return read_section(StudentSpec, spec)
    found = Plan.of(spec).student
    if found is None:
        raise PlanError("the plan has no `student:` section", path="student")
    return found


def _inputs(
    model: nn.Module, record: Conversion | None, given: ExampleInputs | None
) -> ExampleInputs:
    if given is not None:
        return given
    if record is not None and not is_hf(model):
        made: ExampleInputs = make_inputs(record.inputs)
        return made
    return example_inputs_for(model)


def _cuts(
    model: nn.Module, spec: StudentSpec, stacks: Sequence[Stack], misses: Sequence[Miss]
) -> list[Cut]:
    if not stacks:
        reasons = f": {shorten([str(miss) for miss in misses], 4)}" if misses else ""
        raise UnsupportedModuleError(
            type(model).__name__, f"has no stack of similar layers that can be shortened{reasons}"
        )
    chosen = [stack for stack in stacks if spec.stack in ("all", stack.role)]
    if not chosen:
        known = ", ".join(f"{s.path} ({len(s)} layers)" for s in stacks)
        raise PlanError(
            f"the model has no {spec.stack}, but {known}; use `stack: all`", path="student.stack"
        )
    cuts = []
    for stack in stacks:
        kept = tuple(range(len(stack)))
        if stack in chosen:
            try:
                kept = spec.positions(len(stack))
            except ValueError as error:
                raise PlanError(f"{stack.path}: {error}", path="student") from None
        cuts.append(Cut(stack.path, len(stack), kept, stack.role))
    if all(len(cut.kept) == cut.count for cut in cuts):
        raise PlanError("keeps every layer: there is nothing to drop", path="student")
    for cut in cuts:
        _refuse_shared(model, cut)
    return cuts


def _refuse_shared(model: nn.Module, cut: Cut) -> None:
    owners: dict[int, str] = {}
    for name, layer in model.get_submodule(cut.path).named_children():
        for path, module in layer.named_modules():
            first = owners.setdefault(id(module), name)
            if first != name and any(True for _ in module.parameters()):
                raise UnsupportedModuleError(
                    f"{cut.path}.{name}.{path}", f"layer {first} shares it: neither can be dropped"
                )


# -- on the graph


def _on_graph(model: nn.Module, found: Capture, stacks: list[Stack], cuts: list[Cut]) -> None:
    drop = DropLayers(stacks, {cut.path: cut.kept for cut in cuts})
    manager = PassManager([drop], observers=observers_from_env(), checks=CHECKS)
    manager.run(found.graph_module, PlanContext(model=model))


def _same_nodes(before: list[Stack], cuts: list[Cut], after: list[Stack]) -> None:
    """Check that every kept layer runs the same ops in the shortened model."""
    now = {stack.path: stack for stack in after}
    for cut in cuts:
        old = next(stack for stack in before if stack.path == cut.path)
        new = now.get(cut.path)
        count = 1 if new is None else len(new)
        if count != len(cut.kept):
            raise VerificationError(f"{cut.path}: ran {count} layers, not {len(cut.kept)}")
        if new is None:
            continue
        for block, at in zip(new.blocks, cut.kept, strict=True):
            was = [str(n.target) for n in old.blocks[at].nodes if n.op != "get_attr"]
            is_ = [str(n.target) for n in block.nodes if n.op != "get_attr"]
            if was != is_:
                raise VerificationError(
                    f"{block.path}: does not compute what it did as layer {at}: keep other layers"
                )
