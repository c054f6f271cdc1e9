"""Routed problems for the `experts` op, and their results in float64.

Shapes: T tokens, D model width, O output width, F expert width, E experts, K top-k.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeify.kernels import experts as _experts  # noqa: F401  registers the op
from moeify.kernels.assign import assign_reference
from moeify.kernels.elementwise import FUSED

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Allowed error as a fraction of the largest value."""

NAMES = ("out", "tokens", "weights", "up", "up_bias", "down", "down_bias")
"""What `Problem.solve` returns, biases only where there are any."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A size and kind of experts."""

    tokens: int
    d_in: int = 16
    d_ff: int = 24
    d_out: int | None = None  # `d_in` if None
    experts: int = 4
    top_k: int = 2
    capacity: int | None = None  # rows per expert at most
    only: tuple[int, ...] = ()  # experts that may get rows; all if empty
    activation: str = "silu"
    gated: bool = True
    up_bias: bool = False
    down_bias: bool = False
    weighted: bool = True


@dataclass(frozen=True)
class Problem:
    """Arguments of `experts` for one case, and a gradient of the output."""

    floats: tuple[Tensor | None, ...]  # tokens, weights, up, up_bias, down, down_bias
    order: Tensor
    slots: Tensor
    offsets: Tensor
    grad: Tensor
    activation: str
    gated: bool

    def to(self, dtype: torch.dtype) -> Problem:
        """Cast tokens and parameters; combine weights are float32, or float64 like the rest."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        kinds = [dtype, wide, *[dtype] * 4]
        cast = (None if t is None else t.to(k) for t, k in zip(self.floats, kinds, strict=True))
        return replace(self, floats=tuple(cast), grad=self.grad.to(dtype))

    def run(self, kernel: str, save: bool = True) -> tuple[Tensor, Tensor]:
        """Call the op."""
        out: tuple[Tensor, Tensor] = torch.ops.moeify.experts(
            *self.floats, self.order, self.slots, self.offsets, self.activation, self.gated, save,
            kernel,
        )  # fmt: skip
        return out

    def solve(self, kernel: str) -> dict[str, Tensor]:
        """Return the output and all gradients by name."""
        leaves = [None if t is None else t.detach().requires_grad_() for t in self.floats]
        out, _ = replace(self, floats=tuple(leaves)).run(kernel)
        wanted = {n: t for n, t in zip(NAMES[1:], leaves, strict=True) if t is not None}
        grads = torch.autograd.grad(out, list(wanted.values()), self.grad)
        return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def problem(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> Problem:
    """Draw a problem whose numbers are exact in `dtype`."""
    g = torch.Generator().manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=g) * scale).to(dtype)

    count, d, f, o = case.tokens, case.d_in, case.d_ff, case.d_out or case.d_in
    number, width = case.experts, 2 * case.d_ff if case.gated else case.d_ff
    logits = torch.rand(count, number, generator=g)
    if case.only:
        closed = torch.ones(number, dtype=torch.bool)
        closed[list(case.only)] = False
        logits[:, closed] = -1
    ids = logits.topk(case.top_k, dim=1).indices.int()
    capacity = count if case.capacity is None else case.capacity
    slots, order, offsets = assign_reference(ids, None, number, capacity)
    weights = torch.rand(count, case.top_k, generator=g) if case.weighted else None
    floats = (
        normal(count, d),
        weights,
        normal(number, width, d, scale=d**-0.5),
        normal(number, width) if case.up_bias else None,
        normal(number, o, f, scale=f**-0.5),
        normal(number, o) if case.down_bias else None,
    )
    given = Problem(floats, order, slots, offsets, normal(count, o), case.activation, case.gated)
    return given.to(dtype)


@functools.lru_cache(maxsize=2)
def truth(case: Case, dtype: torch.dtype) -> tuple[Problem, dict[str, Tensor]]:
    """Return a problem in `dtype` and what it gives in float64."""
    given = problem(case, dtype)
    return given, given.to(torch.float64).solve("reference")


def check(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compare by name, relative to the largest value of each.

    A gradient of a combine weight is a sum over both signs, so it may be tiny by cancellation.
    """
    assert got.keys() == expected.keys()
    largest = max((float(v.abs().max()) for v in expected.values() if v.numel()), default=0.0)
    for name, value in expected.items():
        assert got[name].shape == value.shape, name
        scale = float(value.abs().max()) if value.numel() else 0.0
        # What is left of larger values that cancel may be next to nothing.
        scale = max(scale, 1.0 if name == "weights" else 0.05)
        if value.numel() < 8:  # nor may any of so few be as large as what it is a sum of
            scale = max(scale, 0.1 * largest)
        torch.testing.assert_close(
            got[name].double(),
            value.double(),
            rtol=tolerance,
            atol=tolerance * scale,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def matrix() -> list[Case]:
    """Return 25 cases: every token count with every expert count, the other choices in turn."""
    cases = []
    for i, tokens in enumerate((0, 1, 7, 64, 1000)):
        for j, experts in enumerate((1, 2, 8, 64, 512)):
            n = 5 * i + j
            activation = FUSED[n % len(FUSED)]
            cases.append(
                Case(
                    tokens=tokens,
                    d_in=(16, 33, 128)[(i + j) % 3],
                    d_ff=(40, 17, 24, 64)[n % 4],
                    d_out=(None, 32, None)[n % 3],
                    experts=experts,
                    top_k=min((1, 2, 8)[(i + 2 * j) % 3], experts),
                    activation=activation,
                    gated=n % 2 == 0,
                    up_bias=n // 2 % 2 == 0
                    and activation != "relu",  # rounding moves over its kink
                    down_bias=n // 3 % 2 == 0,
                    weighted=(i + 2 * j) % 5 != 4,
                )
            )
    return cases
