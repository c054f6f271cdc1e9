"""One layer and one load: sizes, weights, tokens, and the output that all must return.

Shapes: T tokens, D model width, F expert width, E experts, K top-k, R = T * K rows.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CAPACITY_FACTOR, MIN_CAPACITY = 1.25, 4
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCES = {"fp32": 2e-4, "bf16": 3e-2}
"""Largest error allowed, over the largest element of the output."""

CLEAR_MARGIN = 0.02
"""Distance of a token's last chosen logit from the first one not chosen, relative to the largest
logit: more than bfloat16 rounds off, so that every contestant chooses the same experts."""

MOST_COPIES = 128


@dataclass(frozen=True)
class Case:
    """One layer and one load."""

    device: str  # "cpu" or "cuda"
    mode: str  # "forward", or "train" for forward and backward
    dtype: str  # a name of `DTYPES`
    threads: int  # CPU threads, on as many cores
    width: int  # D
    hidden: int  # F
    experts: int  # E
    top_k: int  # K
    tokens: int  # T

    @property
    def key(self) -> str:
        """Return the name of the case in a file of results."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def rows(self) -> int:
        return self.tokens * self.top_k

    @property
    def expert_bytes(self) -> int:
        return 3 * self.width * self.hidden * self.torch_dtype.itemsize

    @property
    def capacity(self) -> int:
        """Return the rows per expert of the formulations that have a capacity."""
        fair = math.ceil(CAPACITY_FACTOR * self.rows / self.experts)
        return min(max(fair, MIN_CAPACITY), self.tokens)

    @property
    def flops(self) -> float:
        """Return the work of the experts alone, the same as the dense MLP's."""
        return 6.0 * self.rows * self.width * self.hidden * (3 if self.trains else 1)

    def moved_bytes(self, used: float, held: int) -> float:
        """Return the fewest bytes that are read and written, with `used` of `held` experts."""
        # weights of experts with rows are read, twice in training, where each expert has a gradient
        experts = 2 * used + held if self.trains else used
        return experts * self.expert_bytes

    @property
    def trains(self) -> bool:
        return self.mode == "train"


@dataclass(frozen=True)
class Weights:
    """What all contestants share."""

    router: Tensor  # [E, D]
    gate_up: Tensor  # [E, 2F, D], the gate first
    down: Tensor  # [E, D, F]
    dense_gate_up: Tensor  # [2KF, D] of the dense MLP of equal active size
    dense_down: Tensor  # [D, KF]

    @classmethod
    def drawn(cls, case: Case, seed: int = 0) -> Weights:
        """Draw weights for a case, scaled so that activations keep their size."""
        generator = torch.Generator(case.device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            tensor = torch.empty(shape, device=case.device, dtype=case.torch_dtype)
            return tensor.normal_(0, shape[-1] ** -0.5, generator=generator)

        d, f, e = case.width, case.hidden, case.experts
        dense = case.top_k * f
        return cls(draw(e, d), draw(e, 2 * f, d), draw(e, d, f), draw(2 * dense, d), draw(d, dense))


def cold_copies(weights: Weights, size: int) -> list[Weights]:
    """Return the weights at so many addresses that `size` bytes are read before one is reused.

    The MoE's weights and the dense MLP's are copied as often as each needs.
    """
    moe = (weights.router, weights.gate_up, weights.down)
    dense = (weights.dense_gate_up, weights.dense_down)
    moes, denses = _copies(moe, size), _copies(dense, size)
    count = max(len(moes), len(denses))
    return [Weights(*moes[i % len(moes)], *denses[i % len(denses)]) for i in range(count)]


def _copies(tensors: tuple[Tensor, ...], size: int) -> list[tuple[Tensor, ...]]:
    count = min(math.ceil(size / sum(tensor.nbytes for tensor in tensors)), MOST_COPIES)
    return [tensors, *(tuple(t.clone() for t in tensors) for _ in range(count - 1))]


def draw_tokens(case: Case, weights: Weights, seed: int) -> Tensor:
    """Draw tokens [T, D] whose choice of experts is clear in any precision."""
    generator = torch.Generator(case.device).manual_seed(seed)
    found: list[Tensor] = []
    while sum(map(len, found)) < case.tokens:
        x = torch.randn(2 * case.tokens, case.width, device=case.device, generator=generator).to(
            case.torch_dtype
        )
        logits = F.linear(x.float(), weights.router.float())
        if case.top_k < case.experts:
            best = logits.topk(case.top_k + 1).values
            margin = best[:, -2] - best[:, -1]
            x = x[margin > CLEAR_MARGIN * logits.abs().amax(1)]
        found.append(x)
    return torch.cat(found)[: case.tokens]


@dataclass(frozen=True)
class Truth:
    """What a layer must return, and how its load is distributed."""

    out: Tensor  # [T, D] float32
    grad: Tensor | None  # [T, D] float32, gradient of the tokens where the case trains, else None
    used: int  # experts with rows
    busiest: int  # rows of the fullest expert
    dropped: int  # routes over the capacity of the formulations that have one


def truth(case: Case, weights: Weights, x: Tensor, gradient: Tensor) -> Truth:
    """Compute the layer in float32, expert by expert."""
    x = x.float().requires_grad_(case.trains)
    scores = F.linear(x, weights.router.float()).softmax(1)
    chosen, ids = scores.topk(case.top_k)
    if case.top_k > 1:
        chosen = chosen / chosen.sum(1, keepdim=True)
    out = torch.zeros_like(x)
    counts = torch.bincount(ids.flatten(), minlength=case.experts)
    for expert in counts.nonzero().flatten().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        hidden = F.linear(x[token], weights.gate_up[expert].float())
        gate, up = hidden.chunk(2, 1)
        rows = F.linear(F.silu(gate) * up, weights.down[expert].float())
        out = out.index_add(0, token, rows * chosen[token, choice, None])
    grad = torch.autograd.grad(out, x, gradient.float())[0] if case.trains else None
    dropped = (counts - case.capacity).clamp_min(0).sum()
    used, busiest = int((counts > 0).sum()), int(counts.max())
    return Truth(out.detach(), grad, used, busiest, int(dropped))


def compare(got: Tensor, want: Tensor, case: Case, may_differ: int) -> tuple[float, int]:
    """Return the relative error of an output or gradient, and how many tokens lost a route.

    A dropped route changes its token, whatever the formulation does with the other one. Such tokens
    are counted, at most `may_differ`, instead of compared.
    """
    error = (got.detach().float() - want).abs().amax(1) / want.abs().max()
    wrong = ~(error <= TOLERANCES[case.dtype])
    count = int(wrong.sum())
    if count > may_differ:
        raise AssertionError(
            f"{count} of {len(error)} tokens are wrong, by up to {float(error.max()):.2g} of the "
            f"largest element; {may_differ} may be"
        )
    kept = error[~wrong]
    return float(kept.max()) if len(kept) else 0.0, count
