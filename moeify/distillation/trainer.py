"""Distillation in Hugging Face's `Trainer`.

Imported on first use of `moeify.DistillationTrainer`, because it needs transformers, which
importing moeify does not import.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from moeify.distillation.distiller import Distiller
from moeify.errors import MoeifyError

log = logging.getLogger("moeify")


class DistillationTrainer(Trainer):
    """A `Trainer` whose training loss is a `Distiller`'s.

    `DistillationTrainer(model, arguments, distiller=moeify.distill(model, teacher), ...)`.
    Gradient accumulation and several ranks leave the loss what it is: a mean over all labels of
    the step. Evaluation is the model's own, so that `eval_loss` compares with any other run's;
    an `ahead` schedule reads it. Logs of the loss have `ce`, `kd` (T^2 KL, before alpha) and
    `alpha`, means over the labels since the last log. The teacher stays where it is: put it on
    the device that it should run on.

    Args:
        distiller: Made of this same model.

    Raises:
        MoeifyError: The distiller is another model's, or an option is set that replaces the
            loss.
    """

    def __init__(self, *args: Any, distiller: Distiller, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distiller = distiller
        self._refuse_conflicts()
        self.model_accepts_loss_kwargs = True  # so that labels are counted over micro-batches
        self._loss_shifts_labels = distiller.loss.shift
        self._sums: Tensor | None = None
        self.add_callback(_ScheduleObserver(distiller))
        self._warn_of_another_device()

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the distiller's loss in training, the model's own in evaluation."""
        if not model.training:  # a mean of the model's own
            return super().compute_loss(model, inputs, return_outputs)
        loss, output = self.distiller.run(
            model, inputs, step=self.state.global_step, num_items=num_items_in_batch
        )
        self._add_parts()
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, output) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums is not None:
            sums = self._sums
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(sums)
            ce, items, kd, kd_items = sums.tolist()
            parts = self.distiller.loss.last
            logs["ce"], logs["kd"] = ce / max(items, 1), kd / max(kd_items, 1)
            logs["alpha"] = 0.0 if parts is None else parts.alpha
            self._sums = None
        super().log(logs, *args, **kwargs)

    def _refuse_conflicts(self) -> None:
        if self.distiller.student is not self.model:
            raise MoeifyError("the distiller has another student: make it of this same model")
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise MoeifyError(
                "label smoothing and compute_loss_func replace the loss, and so does "
                "distillation: take them out"
            )
        if self.args.n_gpu > 1:
            raise MoeifyError("one process has several devices: start one per device with torchrun")

    def _warn_of_another_device(self) -> None:
        teacher = self.distiller.teacher
        where = next((p.device for p in teacher.parameters()), None) if teacher else None
        if where is not None and where.type != self.args.device.type:
            log.warning("the teacher runs on %s, the student on %s", where, self.args.device)

    def _add_parts(self) -> None:
        """Sum up the parts of the loss, on its device, until they are logged."""
        parts = self.distiller.loss.last
        assert parts is not None
        kd_items = parts.items if parts.alpha else torch.zeros_like(parts.items)
        new = (parts.ce, parts.items, parts.kd, kd_items)
        sums = torch.stack([part.to(torch.float64) for part in new])
        self._sums = sums if self._sums is None else self._sums + sums


class _ScheduleObserver(TrainerCallback):
    """Gives the schedule the length of the run, and validation losses as they come."""

    def __init__(self, kd: Distiller) -> None:
        self.kd = kd

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kd.schedule.total is None:
            self.kd.schedule.total = state.max_steps
        for entry in state.log_history:  # of the run that is resumed
            if "eval_loss" in entry:
                self.kd.schedule.observe(entry["step"], entry["eval_loss"])

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any
    ) -> None:
        if metrics and "eval_loss" in metrics:
            self.kd.schedule.observe(state.global_step, metrics["eval_loss"])
