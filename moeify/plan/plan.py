"""The plan: which MLPs become what, as strict, immutable data.

A plan is written in YAML, JSON or Python and is not tied to one model; `resolve` applies it to one.
Later rules override earlier ones site by site, in the fields they state. A plan that cannot be
right is a `PlanError` with its file, line and place. Importable without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic_core import PydanticCustomError

import moeify
from moeify.errors import PlanError
from moeify.plan import strict_yaml
from moeify.plan.deepspeed.importer import plan_data
from moeify.plan.errors import guess, plan_error
from moeify.plan.presets import PRESETS, preset_data
from moeify.plan.rules import LayerRule
from moeify.plan.selection import LISTED, Schedule, Select, Strict
from moeify.plan.specs import InitSpec, ParallelSpec, RouterSpec, ZeroSpec
from moeify.plan.strict_yaml import Lines, Where
from moeify.plan.student import DistillSpec, DropSpec, StudentSpec
from moeify.plan.zero_checks import check_spec

if TYPE_CHECKING:
    from torch import nn

    from moeify.plan.layer_plan import ResolvedPlan

_SUFFIXES = (".yaml", ".yml", ".json")


def _check_version(value: Any) -> Any:
    # A Literal alone would take true and 1.0, which equal 1.
    if type(value) is not int or value != 1:
        raise PydanticCustomError("plan", "this moeify reads version 1 only")
    return value


class Plan(Strict):
    """What to turn into a Mixture of Experts, and how.

    Args:
        data: The fields below, as a plan file would hold them.

    Attributes:
        version: Version of the format.
        layers: Rules, applied in order.
        router: Routing of every MoE layer, unless a rule overrides it.
        init: Start of every MoE layer, unless a rule overrides it.
        parallel: Layout over the ranks.
        zero: Partitioning.
        student: The model with fewer layers that learns from this one; none if null.

    Raises:
        PlanError: The data is not a plan.

    Example:
        >>> plan = Plan.of({"layers": [{"select": {"every": 2, "start": 1}, "experts": 8}]})
        >>> plan.layers[0].top_k
        1
    """

    version: Annotated[Literal[1], BeforeValidator(_check_version)] = 1
    layers: Annotated[tuple[LayerRule, ...], LISTED, Field(min_length=1)]
    router: RouterSpec = RouterSpec()
    init: InitSpec = InitSpec()
    parallel: ParallelSpec = ParallelSpec()
    zero: ZeroSpec = ZeroSpec()
    student: StudentSpec | None = None

    _file: str | None = PrivateAttr(default=None)
    _lines: Lines = PrivateAttr(default_factory=dict)
    _notes: tuple[str, ...] = PrivateAttr(default=())

    def __init__(self, /, **data: Any) -> None:
        self._fill(data, {}, None)

    def _fill(self, data: Any, lines: Lines, file: str | None) -> Plan:
        try:
            self.__pydantic_validator__.validate_python(data, self_instance=self)
        except ValidationError as error:
            raise plan_error(error, _KEYS, lines, file) from None
        self._file, self._lines = file, lines
        for position, rule in enumerate(self.layers):
            self._check_rule(position, rule)
        check_spec(self)
        return self

    def _check_rule(self, position: int, rule: LayerRule) -> None:
        by_name = rule.select != "all" and rule.select.key == "name"
        if rule.expert == "linear" and not by_name:
            raise self.fault(
                ("layers", position, "expert"),
                "`linear` goes with `select: {name: ...}`, which names linear layers",
            )
        moot = sorted(rule.model_fields_set - {"select", "experts", "expert"})
        if rule.experts == "dense" and moot:
            raise self.fault(
                ("layers", position, moot[0]), "means nothing next to `experts: dense`; remove it"
            )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan.

        Args:
            path: A `.yaml`, `.yml` or `.json` file.

        Returns:
            The plan.

        Raises:
            PlanError: The file cannot be read or does not hold a plan.
        """
        file = os.fspath(path)
        _check_suffix(file)
        return cls.loads(strict_yaml.read(file), file=file)

    @classmethod
    def loads(cls, text: str, *, file: str | None = None) -> Plan:
        """Parse a plan.

        Args:
            text: YAML, or JSON if `file` ends in `.json`.
            file: File name for messages.

        Returns:
            The plan.

        Raises:
            PlanError: The text is not a plan.
        """
        file = "<string>" if file is None else file
        data, lines = strict_yaml.load(text, file)
        return cls.__new__(cls)._fill(data, lines, file)

    @classmethod
    def preset(cls, name: str, **options: Any) -> Plan:
        """Make a plan by name.

        Args:
            name: One of `moeify.plan.presets.PRESETS`, such as "pr-moe".
            options: Options of that preset, such as `experts=32`.

        Returns:
            The plan.

        Raises:
            PlanError: The name, an option or its value does not fit.
        """
        return cls(**preset_data(name, options))

    @classmethod
    def from_deepspeed(
        cls,
        config: Mapping[str, Any] | str | os.PathLike[str],
        *,
        moe: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        layers: Any = None,
    ) -> Plan:
        """Read a DeepSpeed config, with DeepSpeed's meanings.

        Args:
            config: A ds_config: a dict, a path, JSON text, or that in URL-safe base64.
            moe: Arguments of `deepspeed.moe.layer.MoE`, or of a Megatron-DeepSpeed launch script;
                a list of them, one for each MoE layer, if layers differ.
            layers: Which layers they are: "all", a `Select` or its data, or a list of rules, which
                take from `moe` what they do not state; every second layer if None.

        Returns:
            The plan; `notes` lists what of the config is not in it.

        Raises:
            PlanError: The config cannot be read or contradicts itself.
        """
        data, notes = plan_data(config, moe, layers)
        plan = cls.of(data)
        plan._notes = notes
        return plan

    @property
    def folder(self) -> str:
        """Where relative paths in the plan start: its file's folder, or "" without a file."""
        file = self._file
        return os.path.dirname(file) if file is not None and os.path.isfile(file) else ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What the config that this plan was read from says beyond it; not part of the plan."""
        return self._notes

    @classmethod
    def of(cls, value: Plan | Mapping[str, Any] | str | os.PathLike[str]) -> Plan:
        """Return the plan that a value stands for.

        Args:
            value: A plan, its data, a preset's name, or a path.

        Returns:
            The plan.

        Raises:
            PlanError: The value does not stand for a plan.
        """
        if isinstance(value, Plan):
            return value
        if isinstance(value, Mapping):
            return cls.__new__(cls)._fill(dict(value), {}, None)
        if isinstance(value, str):
            if value in PRESETS:
                return cls.preset(value)
            if not value.lower().endswith(_SUFFIXES) and os.sep not in value:
                raise PlanError(
                    f"{value[:60]!r} is neither a preset nor a plan file; {guess(value, PRESETS)}"
                    f"presets: {', '.join(PRESETS)}; files end in {', '.join(_SUFFIXES)}; "
                    "for text use Plan.loads"
                )
            return cls.load(value)
        if isinstance(value, os.PathLike):
            return cls.load(value)
        raise PlanError(
            f"a plan is a Plan, a dict, a preset's name or a path, not {type(value).__name__}"
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, all or nothing.

        Args:
            path: A `.yaml`, `.yml` or `.json` file; replaced if it exists.

        Raises:
            PlanError: It cannot be written; an older file is left as it was.
        """
        file = os.fspath(path)
        _check_suffix(file)
        strict_yaml.write(file, strict_yaml.dump(self.data(), file))

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Describe the format.

        Returns:
            A JSON Schema of plan files, for editors and other tools.
        """
        schema = cls.model_json_schema(by_alias=True)
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}

    def data(self) -> dict[str, Any]:
        """Return the plan as data.

        Returns:
            What a plan file holds: only stated fields in the rules, everything elsewhere; `student`
            only if there is one.
        """
        none = {"student"} if self.student is None else None
        data = self.model_dump(mode="json", by_alias=True, exclude=none)
        rules = self.model_dump(mode="json", by_alias=True, include={"layers"}, exclude_unset=True)
        return data | rules

    def digest(self) -> str:
        """Identify the plan's content.

        Returns:
            SHA-256, in hex, of its canonical JSON; equal plans have equal digests.
        """
        text = json.dumps(self.data(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def fault(self, where: Where, message: str) -> PlanError:
        """Make an error about a place such as `("layers", 1, "select")`, with its file and line."""
        return PlanError(
            message,
            file=self._file,
            line=strict_yaml.line_of(where, self._lines),
            path=strict_yaml.path_text(where),
        )

    def resolve(self, model: nn.Module, example_inputs: Any = None) -> ResolvedPlan:
        """Apply the plan to a model, changing nothing.

        Args:
            model: The dense model.
            example_inputs: Inputs to run it once with: a dict of keyword or a tuple of positional
                arguments; made from the model's config if it is a Hugging Face one.

        Returns:
            What every site becomes; prints as a table.

        Raises:
            PlanError: The plan does not fit the model.
            CaptureError: The model cannot be run.
        """
        # This module does without torch, running a model does not: `moeify.api` has the body.
        return moeify.resolve_plan(self, model, example_inputs)

    def __eq__(self, other: object) -> bool:
        # Not pydantic's: which fields the rules state counts, the file they came from does not.
        return self.data() == other.data() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest())


def _check_suffix(file: str) -> None:
    if not file.lower().endswith(_SUFFIXES):
        raise PlanError(f"a plan file ends in {', '.join(_SUFFIXES)}", file=file)


def _keys(model: type[Strict]) -> tuple[str, ...]:
    return tuple(field.alias or name for name, field in model.model_fields.items())


_KEYS = {
    "": _keys(Plan),
    "layers": _keys(LayerRule),
    "layers.select": _keys(Select),
    "layers.experts": _keys(Schedule),
    "layers.router": _keys(RouterSpec),
    "layers.init": _keys(InitSpec),
    "router": _keys(RouterSpec),
    "init": _keys(InitSpec),
    "parallel": _keys(ParallelSpec),
    "zero": _keys(ZeroSpec),
    "student": _keys(StudentSpec),
    "student.drop": _keys(DropSpec),
    "student.distill": _keys(DistillSpec),
}
"""Allowed keys of every mapping in a plan, by dotted path without positions."""
