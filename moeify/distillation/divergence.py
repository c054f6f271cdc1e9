"""Cross-entropy and teacher-student divergence over a large vocabulary, a few rows at a time.

Logits of 128k words in float32 are gigabytes. Here rows are widened, turned into probabilities and
summed in chunks, forward and backward. Only the given logits are kept in between, and the gradient,
in the dtype of the student's logits, is the only whole matrix that is made.

Shapes: N rows, V words, K words kept of a teacher.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moeify.kernels.precision import accumulation_dtype, without_autocast

CHUNK: Final = 1 << 22  # most elements of a chunk: 16 MiB in float32


class TopK(NamedTuple):
    """A teacher's distribution, with all but its K likeliest words in one lump."""

    ids: Tensor  # [N, K] integers, words
    log_probs: Tensor  # [N, K] log p of each, of the softmax over the whole vocabulary
    log_rest: Tensor  # [N] log of the probability of all other words; -inf for none
    vocab: int  # V


class Sums(NamedTuple):
    """What `distillation` returns; only the loss has a gradient."""

    loss: Tensor  # (sum CE + alpha T^2 sum KL) * scale
    ce: Tensor  # sum of the cross-entropies
    kl: Tensor  # sum of the divergences KL(teacher || student) at T


def distillation(
    student: Tensor,
    teacher: Tensor | TopK | None,
    labels: Tensor,
    scale: Tensor,
    *,
    alpha: float,
    temperature: float,
    vocab: int,
    ignore_index: int = -100,
    chunk: int = CHUNK,
) -> Sums:
    """Return the sums over the rows whose label is not `ignore_index`.

    With p and q the softmax of teacher and student at T over the first `vocab` words, KL is sum p
    (log p - log q). Of a `TopK` it is sum_K p (log p - log q) + r (log r - log s), with r and s
    what teacher and student give to all other words: the divergence of the distributions with those
    words in one lump, which is never more than the whole one, and equals it for K = V.

    The student is [N, V], the labels are [N]; the teacher is [N, V'] on any device, a `TopK` of N
    rows, or None for the cross-entropy alone. At most `chunk` elements are widened at once.
    """
    options = (float(alpha), float(temperature), vocab, ignore_index, chunk)
    parts = teacher[:3] if isinstance(teacher, TopK) else (teacher, None, None)
    apply: Any = _Distillation.apply  # untyped in torch
    loss, ce, kl = apply(student, labels, scale, options, *parts)
    return Sums(loss, ce, kl)


def top_k(logits: Tensor, k: int, temperature: float, *, chunk: int = CHUNK) -> TopK:
    """Return the K likeliest words of softmax(logits / temperature), the rest in one lump."""
    found = []
    with torch.no_grad(), without_autocast(logits):
        for part in torch.split(logits, _rows(logits, chunk)):
            wide = part.to(accumulation_dtype(part.dtype))
            log_p = (wide / temperature).log_softmax(1)
            values, ids = log_p.topk(k, 1)
            rest = log_p.scatter(1, ids, -torch.inf).logsumexp(1)
            found.append((ids.to(torch.int32), values, rest))
    ids, values, rest = (torch.cat(each) for each in zip(*found, strict=True))
    return TopK(ids, values, rest, logits.shape[1])


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        labels: Tensor,
        scale: Tensor,
        options: tuple[float, float, int, int, int],
        *teacher: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        alpha, temperature, *_ = options
        ctx.save_for_backward(student, labels, scale, *teacher)
        ctx.options = options
        dtype = _dtype(student, *teacher)
        ce = torch.zeros((), dtype=dtype, device=student.device)
        kl = torch.zeros_like(ce)
        with without_autocast(student):
            for _, part, chunk_labels, target in _chunks(student, labels, teacher, options):
                more = _losses(part.to(dtype), chunk_labels, target, options)
                ce, kl = ce + more[0], kl + more[1]
        loss = ce + (alpha * temperature**2) * kl if alpha else ce.clone()
        ctx.mark_non_differentiable(ce, kl)
        return loss * scale.to(dtype), ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        student, labels, scale, *teacher = ctx.saved_tensors
        dtype = _dtype(student, *teacher)
        factor = (upstream * scale).to(dtype)
        gradient = torch.empty_like(student)
        with without_autocast(student):
            chunks = _chunks(student, labels, tuple(teacher), ctx.options)
            for rows, part, chunk_labels, target in chunks:
                chunk = _gradient(part.to(dtype), chunk_labels, target, ctx.options)
                gradient[rows] = chunk.mul_(factor).to(gradient.dtype)
        return gradient, None, None, None, None, None, None


def _dtype(student: Tensor, *teacher: Tensor | None) -> torch.dtype:
    dtypes = [t.dtype for t in (student, *teacher) if t is not None and t.is_floating_point()]
    return torch.float64 if torch.float64 in dtypes else accumulation_dtype(student.dtype)


def _rows(logits: Tensor, chunk: int) -> int:
    return max(1, chunk // max(logits.shape[1], 1))


def _chunks(
    student: Tensor, labels: Tensor, teacher: tuple[Tensor | None, ...], options: Any
) -> Any:
    """Yield (rows, student, labels, teacher) of each chunk, on the student's device."""
    size = _rows(student, options[4])
    for start in range(0, student.shape[0], size):
        rows = slice(start, start + size)
        target = [None if t is None else t[rows].to(student.device) for t in teacher]
        yield rows, student[rows], labels[rows], target


def _log_student(student: Tensor, temperature: float, vocab: int) -> Tensor:
    return (student[:, :vocab] / temperature).log_softmax(1)


def _losses(
    student: Tensor, labels: Tensor, target: list[Tensor | None], options: Any
) -> tuple[Tensor, Tensor]:
    """Return the sums of CE and KL over the rows of a chunk."""
    alpha, temperature, vocab, ignore, _ = options
    counts = labels != ignore
    log_q = student.log_softmax(1)
    ce = -log_q.gather(1, labels.masked_fill(~counts, 0)[:, None])[:, 0]
    ce = torch.where(counts, ce, 0).sum()
    first, log_top, log_rest = target
    if not alpha or first is None:
        return ce, torch.zeros_like(ce)
    if temperature != 1 or vocab != student.shape[1]:
        log_q = _log_student(student, temperature, vocab)
    if log_top is None or log_rest is None:
        log_p = (first[:, :vocab].to(student.dtype) / temperature).log_softmax(1)
        kl = _weighted(log_p, log_q).sum(1)
    else:
        ids = first.long()
        log_left = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
        kl = _weighted(log_top.to(log_q), log_q.gather(1, ids)).sum(1)
        kl = kl + _weighted(log_rest.to(log_q), log_left)
    return ce, torch.where(counts, kl, 0).sum()


def _weighted(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return p (log p - log q), which is 0 for p = 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0)


def _gradient(student: Tensor, labels: Tensor, target: list[Tensor | None], options: Any) -> Tensor:
    """Return d(sum CE + alpha T^2 sum KL) / d student of a chunk: q - onehot, and T (q - p)."""
    alpha, temperature, vocab, ignore, _ = options
    counts = labels != ignore
    gradient = student.softmax(1)
    where = labels.masked_fill(~counts, 0)[:, None]
    gradient.scatter_add_(1, where, gradient.new_full(where.shape, -1.0))
    first, log_top, log_rest = target
    if alpha and first is not None:
        log_q = _log_student(student, temperature, vocab)
        if log_top is None or log_rest is None:
            p = (first[:, :vocab].to(student.dtype) / temperature).softmax(1)
        else:  # within the lump, keep the student's proportions
            ids, log_r = first.long(), log_rest.to(log_q)
            log_left = log_q.scatter(1, ids, -torch.inf).logsumexp(1)
            ratio = torch.where(log_r > -torch.inf, log_r - log_left, -torch.inf)
            p = (log_q + ratio[:, None]).exp_().scatter_(1, ids, log_top.to(log_q).exp())
        gradient[:, :vocab].add_(log_q.exp_().sub_(p), alpha=alpha * temperature)
    return gradient.masked_fill_(~counts[:, None], 0)
