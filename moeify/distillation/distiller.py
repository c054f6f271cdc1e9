"""Distillation of a student from a teacher, in any loop: `loss = kd(batch)`.

The student runs as it always does and its router losses enter once. The teacher runs in evaluation
and without gradients, its statistics stay as they were, and it does not run at all where alpha is
0: staged distillation also saves the teacher's time. It may be on another device, in another dtype,
or on disk; see `moeify.distillation.teacher_cache`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

from moeify.distillation.divergence import TopK
from moeify.distillation.loss import DistillationLoss, Parts
from moeify.distillation.models import (
    evaluating,
    inputs_by_name,
    labels_are_shifted,
    logits_of,
    router_losses,
    shared_vocab,
    to_device,
    unwrapped,
)
from moeify.distillation.schedule import AlphaSchedule, Kind
from moeify.distillation.teacher_cache import TeacherCache, row_keys
from moeify.errors import CheckpointError, MoeifyError, PlanError
from moeify.hf.detect import is_hf
from moeify.plan.plan import Plan
from moeify.plan.student import DistillSpec, StudentSpec, read_section

_LABELS: Final = ("labels", "shift_labels")

Batch = Mapping[str, Any] | tuple[Any, ...] | list[Any]


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    *,
    alpha: float | None = None,
    temperature: float | None = None,
    schedule: AlphaSchedule | Kind | None = None,
    stop: float | int | None = None,
    steps: int | None = None,
    cache: TeacherCache | str | os.PathLike[str] | None = None,
    top_k: int | None = None,
    spec: Any = None,
    shift: bool | None = None,
    vocab: int | None = None,
    tokenizers: tuple[Any, Any] | None = None,
    accumulate: int = 1,
) -> Distiller:
    """Train a student on the word probabilities of a teacher, besides the labels.

    Args:
        student: Any model that returns logits: dense, converted, compiled, or wrapped in DDP.
        teacher: Any model with the same vocabulary, on any device and in any dtype; None to read
            everything from `cache`.
        alpha: Weight of the divergence; 1.0 if neither it nor `spec` is given.
        temperature: T; 1.0.
        schedule: alpha over the run: the name of a schedule or one of your own; `constant`.
        stop: Where the schedule ends: a step (int) or a share of `steps` (float); 0.5.
        steps: Optimizer steps of the run; `Trainer` knows them.
        cache: Teacher logits on disk: a `TeacherCache`, or a folder for one. Missing rows are
            computed by the teacher and added.
        top_k: Words kept per position by a `cache` that is a folder; None keeps all.
        spec: Defaults of the options above: a plan (also as data or as a file), its `student:`
            section, or that section's `distill:`.
        shift: Position t predicts label t + 1. None takes it from a Hugging Face model's kind of
            loss; the labels of any other model are taken to fit its logits.
        vocab: Number of words, the first ones, that both models share; None finds it from their
            sizes.
        tokenizers: The student's and the teacher's, to check that they give the same words the
            same ids.
        accumulate: Calls per optimizer step, by which a plain loop's steps are counted.

    Returns:
        A `Distiller`.

    Raises:
        MoeifyError: The models are the same object, the tokenizers differ, or there is neither a
            teacher nor a cache.
        PlanError: An option is out of range.

    Source:
        DeepSpeed-MoE (Rajbhandari et al. 2022), section 4.2: Mixture-of-Students.

    Example:
        >>> model = torch.nn.Embedding(11, 11)
        >>> kd = distill(model, torch.nn.Embedding(11, 11), schedule="staged", steps=100)
        >>> loss = kd((torch.tensor([1, 2]), torch.tensor([2, 3])))
        >>> loss.backward()
    """
    defaults = _spec_of(spec)
    if isinstance(schedule, AlphaSchedule):
        if alpha is not None or stop is not None:
            raise PlanError(
                "alpha and stop belong to the given schedule: set them there",
                path="distill.schedule",
            )
        if steps is not None:
            schedule.total = steps
    else:
        schedule = AlphaSchedule(
            schedule or defaults.schedule,
            alpha=defaults.alpha if alpha is None else alpha,
            stop=defaults.stop if stop is None else stop,
            total=steps,
        )
    if temperature is None:
        temperature = defaults.temperature
    if tokenizers is not None:
        vocab = shared_vocab(*tokenizers) if vocab is None else vocab
    if shift is None:
        shift = labels_are_shifted(student)
    loss = DistillationLoss(temperature=temperature, schedule=schedule, shift=shift, vocab=vocab)
    if cache is not None and not isinstance(cache, TeacherCache):
        top_k = defaults.top_k if top_k is None else top_k
        cache = TeacherCache(cache, top_k=top_k, temperature=temperature, vocab=vocab)
    return Distiller(student, teacher, loss, cache=cache, accumulate=accumulate)


class Distiller:
    """A student's loss with its teacher in it; made by `distill`.

    Args:
        student: The model that learns.
        teacher: The model to learn from, or None.
        loss: What is computed of their logits.
        cache: Teacher logits on disk, or None.
        accumulate: Calls per optimizer step.

    Attributes:
        schedule: The loss's, whose `observe` takes validation losses.
        calls: Training calls so far; one optimizer step is `accumulate` of them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        loss: DistillationLoss,
        *,
        cache: TeacherCache | None = None,
        accumulate: int = 1,
    ) -> None:
        if teacher is not None and unwrapped(teacher) is unwrapped(student):
            raise MoeifyError("teacher and student are one model: copy it first (copy.deepcopy)")
        if teacher is None and cache is None:
            raise MoeifyError("there is neither a teacher nor a cache: give teacher= or cache=")
        if accumulate < 1:
            raise MoeifyError(f"accumulate: {accumulate} is not at least 1")
        if cache is not None:
            if cache.top_k is not None and cache.temperature != loss.temperature:
                raise MoeifyError(
                    f"the cache holds probabilities at temperature {cache.temperature}, not "
                    f"{loss.temperature}: use that one, or another folder"
                )
            if teacher is not None:
                cache.bind(teacher)
        self.student, self.teacher, self.loss, self.cache = student, teacher, loss, cache
        self.schedule, self.accumulate, self.calls = loss.schedule, accumulate, 0

    def __call__(
        self, batch: Batch, *, step: int | None = None, num_items: Tensor | int | None = None
    ) -> Tensor:
        """Run student and teacher on a batch and return the student's loss.

        In evaluation it is the cross-entropy alone, comparable with any other model's, and the
        teacher does not run.

        Args:
            batch: Keyword arguments of the models with `labels` among them, or a sequence of
                positional ones with the labels last.
            step: Optimizer steps done; counted from the calls if None.
            num_items: Labels that count in all micro-batches of the step, so that their losses add
                up to the mean; this batch's own if None.

        Returns:
            Scalar with a graph to the student, its router losses included.

        Raises:
            MoeifyError: The batch has no labels, or the two models do not fit.
            CacheMissError: A row is not in the cache and there is no teacher.
        """
        if step is None:
            step = self.calls // self.accumulate
        loss, _ = self.run(self.student, batch, step=step, num_items=num_items)
        if self.student.training:
            self.calls += 1
        return loss

    def run(
        self,
        model: nn.Module,
        batch: Batch,
        *,
        step: int,
        num_items: Tensor | int | None = None,
    ) -> tuple[Tensor, Any]:
        """Return the loss and the output of the student as `model`, which may wrap it."""
        args, kwargs, labels, shift = self._split(batch)
        output = model(*args, **kwargs)
        logits = logits_of(output, "student")
        target: Tensor | TopK | None = None
        training = model.training
        alpha = self.schedule(step) if training else 0.0
        if alpha:
            target = self._target(args, kwargs)
            if logits.dim() == 2 and isinstance(target, Tensor):
                target = target.flatten(0, -2)
            elif isinstance(target, Tensor) and target.dim() == 2:
                target = target.view(*logits.shape[:-1], -1)
        if training:
            loss = self.loss(logits, target, labels, step=step, num_items=num_items, shift=shift)
        else:
            plain = DistillationLoss(0.0, shift=self.loss.shift)
            loss = plain(logits, None, labels, num_items=num_items, shift=shift)
            self.loss.last = plain.last
        extra = router_losses(model, output) if training else None
        if extra is not None:
            if num_items is not None:
                items = self._last().items
                extra = extra * (
                    items / torch.as_tensor(num_items, device=items.device).flatten()[0]
                )
            loss = loss + extra.to(loss.device, loss.dtype)
        return loss, output

    @property
    def last(self) -> dict[str, float]:
        """Means of the last call's terms: `ce`, `kd` (T^2 KL, before alpha) and `alpha`."""
        parts = self._last()
        items = max(int(parts.items), 1)
        return {"ce": float(parts.ce) / items, "kd": float(parts.kd) / items, "alpha": parts.alpha}

    def fill(self, batches: Any) -> int:
        """Put all rows of some batches into the cache ahead, and return the cache's bytes on disk.

        Raises:
            MoeifyError: There is no cache or no teacher.
        """
        if self.cache is None or self.teacher is None:
            raise MoeifyError("filling a cache needs both teacher= and cache=")
        for batch in batches:
            args, kwargs, _, _ = self._split(batch)
            keys = row_keys(inputs_by_name(args, kwargs))
            if self.cache.missing(keys):
                self.cache.add(keys, self._run_teacher(args, kwargs))
        self.cache.flush()
        return self.cache.nbytes

    def state_dict(self) -> dict[str, Any]:
        """Return what a run has to keep, as plain numbers."""
        return {"calls": self.calls, "schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            CheckpointError: It is damaged, or of another schedule.
        """
        calls, schedule = state.get("calls"), state.get("schedule")
        if not isinstance(calls, int) or not isinstance(schedule, Mapping):
            raise CheckpointError("the saved state of the distillation is damaged")
        self.schedule.load_state_dict(schedule)
        self.calls = calls

    def _last(self) -> Parts:
        if self.loss.last is None:
            raise MoeifyError("no loss has been computed yet")
        return self.loss.last

    def _split(self, batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Tensor, bool | None]:
        """Return positional and keyword inputs, labels, and whether these are shifted."""
        if not isinstance(batch, Mapping):
            *inputs, labels = batch
            return tuple(inputs), {}, labels, None
        kwargs = {name: value for name, value in batch.items() if name not in _LABELS}
        labels, shifted = batch.get("labels"), batch.get("shift_labels")
        found = labels if shifted is None else shifted
        if not isinstance(found, Tensor):
            raise MoeifyError(f"the batch has no labels, only {', '.join(batch)}: add labels")
        model: Any = unwrapped(self.student)
        seq2seq = is_hf(model) and getattr(model.config, "is_encoder_decoder", False)
        if seq2seq and "decoder_input_ids" not in kwargs and "decoder_inputs_embeds" not in kwargs:
            kwargs["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=found)
        return (), kwargs, found, None if shifted is None else False

    def _target(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | TopK:
        if self.cache is None:
            return self._run_teacher(args, kwargs)
        keys = row_keys(inputs_by_name(args, kwargs))
        if self.teacher is not None and self.cache.missing(keys):
            self.cache.add(keys, self._run_teacher(args, kwargs))
        return self.cache.read(keys)

    def _run_teacher(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return the teacher's logits, and leave it as if it had never run."""
        teacher = self.teacher
        assert teacher is not None
        device = next((p.device for p in teacher.parameters()), None)
        with evaluating(teacher):
            inputs, named = to_device(args, device), to_device(kwargs, device)
            return logits_of(teacher(*inputs, **named), "teacher").detach()


def _spec_of(spec: Any) -> DistillSpec:
    """Return the distillation section of a plan or of a part of one."""
    if spec is None:
        return DistillSpec()
    if isinstance(spec, Mapping):
        spec = _section_of(spec)
    elif isinstance(spec, str | os.PathLike):
        spec = Plan.of(spec)
    if isinstance(spec, Plan):
        if spec.student is None:
            raise PlanError("the plan has no student", path="student")
        spec = spec.student
    if isinstance(spec, StudentSpec):
        spec = spec.distill
    if not isinstance(spec, DistillSpec):
        raise TypeError(f"spec must be a plan or a part of one, not {type(spec).__name__}")
    return spec


def _section_of(data: Mapping[str, Any]) -> Plan | StudentSpec | DistillSpec:
    """Return the part of a plan that `data` is, by its keys."""
    if {"layers", "version"} & data.keys():
        return Plan.of(data)
    if {"drop", "keep", "depth", "distill"} & data.keys():
        return read_section(StudentSpec, data)
    return read_section(DistillSpec, data)
