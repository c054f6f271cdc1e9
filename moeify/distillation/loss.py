"""The loss of a student: L = CE + alpha(t) * T^2 * KL(teacher || student).

Shapes: B rows, L positions, V words.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.distillation.divergence import TopK, distillation
from moeify.distillation.schedule import AlphaSchedule, Kind
from moeify.errors import MoeifyError, PlanError

_MOST_PADDING: Final = 1024  # words by which two sizes of a vocabulary may differ, or 5 % if less


class Parts(NamedTuple):
    """What the last loss was made of, without gradients."""

    ce: Tensor  # sum of the cross-entropies over the labels that count
    kd: Tensor  # T^2 times the sum of the divergences over them, before alpha; 0 where alpha is 0
    items: Tensor  # how many labels count
    alpha: float


class DistillationLoss(nn.Module):
    """CE + alpha(t) * T^2 * KL(teacher || student), both a mean over the labels that count.

    Probabilities are in float32 (float64 of float64 logits) whatever the dtype of the logits, and
    made a few rows at a time; see `moeify.distillation.divergence`. Only the student has a
    gradient.

    Two models may have padded one vocabulary to different sizes: the divergence is then over the
    words of both, with each model's probabilities renormalised over them. The cross-entropy is over
    the student's own words.

    Args:
        alpha: Weight of the divergence, if `schedule` is a name.
        temperature: T.
        schedule: An `AlphaSchedule`, or the name of one that needs no more than `alpha`.
        ignore_index: The label that does not count.
        shift: Position t predicts label t + 1, as in a causal language model whose labels are its
            inputs. Logits [N, V] without a dimension of positions are never shifted.
        vocab: Number of words, the first ones, that both models share; None finds it from the
            sizes.

    Attributes:
        last: `Parts` of the last call, or None.

    Raises:
        PlanError: An option is out of range.

    Source:
        Hinton et al. 2015, section 2; DeepSpeed-MoE (Rajbhandari et al. 2022), section 4.2.

    Example:
        >>> student, teacher = torch.randn(2, 5, 11, requires_grad=True), torch.randn(2, 5, 11)
        >>> loss = DistillationLoss(temperature=2.0)(student, teacher, torch.zeros(2, 5).long())
        >>> loss.backward()
    """

    def __init__(
        self,
        alpha: float = 1.0,
        temperature: float = 1.0,
        schedule: AlphaSchedule | Kind = "constant",
        *,
        ignore_index: int = -100,
        shift: bool = True,
        vocab: int | None = None,
    ) -> None:
        super().__init__()
        if not (temperature > 0 and math.isfinite(temperature)):
            raise PlanError(f"{temperature!r} is not positive", path="distill.temperature")
        if not isinstance(schedule, AlphaSchedule):
            schedule = AlphaSchedule(schedule, alpha=alpha)
        self.schedule, self.temperature = schedule, float(temperature)
        self.ignore_index, self.shift, self.vocab = ignore_index, shift, vocab
        self.last: Parts | None = None

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | TopK | None,
        labels: Tensor,
        *,
        step: int | None = None,
        num_items: Tensor | int | None = None,
        shift: bool | None = None,
    ) -> Tensor:
        """Return the loss.

        Args:
            student_logits: [B, L, V], or [..., V] where nothing is shifted, float.
            teacher_logits: The same positions, float, on any device and of any float dtype; a
                `TopK` of them at the same temperature; None where alpha is 0.
            labels: [B, L] (or [...]) int64.
            step: Optimizer step, for a schedule that is not constant.
            num_items: Labels that count in all micro-batches of the step, to divide by; those of
                this call if None.
            shift: In place of the option.

        Returns:
            Scalar, float32 or float64; 0 if no label counts.

        Raises:
            MoeifyError: Shapes or vocabularies do not fit, or a teacher or a step is missing.
        """
        if step is None and self.schedule.kind not in ("constant", "ahead"):
            raise MoeifyError(
                f"a {self.schedule.kind} schedule needs the optimizer step: call with step="
            )
        alpha = self.schedule(step or 0)
        shift = self.shift if shift is None else shift
        if shift and student_logits.dim() > 2:
            labels = F.pad(labels, (0, 1), value=self.ignore_index)[..., 1:]
        if labels.shape != student_logits.shape[:-1]:
            raise MoeifyError(
                f"labels {list(labels.shape)} do not fit the student's logits "
                f"{list(student_logits.shape)}: they need one label per position"
            )
        rows = student_logits.flatten(0, -2)
        flat = labels.flatten().to(rows.device)
        teacher, vocab = None, rows.shape[1]
        if alpha:
            teacher, vocab = self._teacher(teacher_logits, student_logits)
        items = (flat != self.ignore_index).sum()
        total = items.clamp_min(1) if num_items is None else num_items
        exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
        scale = 1 / torch.as_tensor(total, device=rows.device).to(exact).flatten()[0]
        sums = distillation(
            rows,
            teacher,
            flat,
            scale,
            alpha=alpha,
            temperature=self.temperature,
            vocab=vocab,
            ignore_index=self.ignore_index,
        )
        self.last = Parts(sums.ce, self.temperature**2 * sums.kl, items, alpha)
        return sums.loss

    def extra_repr(self) -> str:
        schedule = f"schedule={self.schedule.kind}, alpha={self.schedule.alpha}"
        return f"{schedule}, temperature={self.temperature}, shift={self.shift}"

    def _teacher(self, teacher: Tensor | TopK | None, student: Tensor) -> tuple[Tensor | TopK, int]:
        """Return the teacher's rows and the size of the shared vocabulary."""
        if teacher is None:
            raise MoeifyError("alpha is not 0 at this step: give the teacher's logits")
        if isinstance(teacher, TopK):
            rows = student[..., 0].numel()
            if teacher.ids.shape[0] != rows:
                raise MoeifyError(
                    f"the teacher's {teacher.ids.shape[0]} rows are not the student's {rows}"
                )
            vocab = _common_vocab(student.shape[-1], teacher.vocab, self.vocab)
            if vocab != teacher.vocab:
                raise MoeifyError(
                    f"the teacher's top words are of {teacher.vocab} words, but the models share "
                    f"{vocab}: keep them with vocab={vocab}"
                )
            return teacher, vocab
        if teacher.shape[:-1] != student.shape[:-1]:
            raise MoeifyError(
                f"the teacher's logits {list(teacher.shape)} are of other positions than the "
                f"student's {list(student.shape)}: both must read the same input"
            )
        vocab = _common_vocab(student.shape[-1], teacher.shape[-1], self.vocab)
        return teacher.detach().flatten(0, -2), vocab


def _common_vocab(student: int, teacher: int, vocab: int | None = None) -> int:
    """Return how many words two models share, by the sizes of their logits or by `vocab`."""
    least, most = sorted((student, teacher))
    if vocab is not None:
        if not 1 <= vocab <= least:
            raise MoeifyError(
                f"vocab {vocab}: the student has {student} words and the teacher {teacher}; use a "
                f"number from 1 to {least}"
            )
        return vocab
    if most - least > min(_MOST_PADDING, least // 20):
        raise MoeifyError(
            f"the student has {student} words and the teacher {teacher}, which is more than "
            "padding: the two need one tokenizer; if they have one, give its number of words as "
            "vocab="
        )
    return least
