"""Arithmetic that Triton kernels share: exact products, the order of floats, and scores.

Shapes: B rows, E experts.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

import torch

import triton
import triton.language as tl
from moeify.kernels.gate import EPSILON

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_EPSILON = tl.constexpr(EPSILON)
_NAN = tl.constexpr(2**31 - 1)


@triton.jit
def split(x):
    """Return three bfloat16 numbers whose sum is the float32 `x`."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """Add `a @ b`, as exact as in float32; on tensor cores if a side is bfloat16 or both are half.

    A product with a bfloat16 number is exact in float32, once the other side is split too.
    """
    if _INTERPRETED:  # the interpreter's products of bfloat16 are wrong
        a, b = a.to(tl.float32), b.to(tl.float32)
    if a.dtype == b.dtype:
        accumulator = tl.dot(a, b, accumulator, input_precision=PRECISION)
    elif a.dtype == tl.float32 and b.dtype == tl.bfloat16:
        high, middle, low = split(a)
        accumulator = tl.dot(low, b, accumulator)
        accumulator = tl.dot(middle, b, accumulator)
        accumulator = tl.dot(high, b, accumulator)
    elif a.dtype == tl.bfloat16 and b.dtype == tl.float32:
        high, middle, low = split(b)
        accumulator = tl.dot(a, low, accumulator)
        accumulator = tl.dot(a, middle, accumulator)
        accumulator = tl.dot(a, high, accumulator)
    else:
        accumulator = tl.dot(
            a.to(tl.float32), b.to(tl.float32), accumulator, input_precision=PRECISION
        )
    return accumulator


@triton.jit
def ordered(x):
    """Return int32 keys in the order of float32 values; -0 equals 0 and NaN is the greatest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(x != x, _NAN, key)


@triton.jit
def probabilities(logits, valid, SCORE: tl.constexpr):
    """Return the scores [B, E], their shares [B, E] and the logsumexp [B]; 0 where not valid."""
    logits = tl.where(valid, logits, float("-inf"))
    top = tl.max(logits, axis=1)
    powers = tl.exp(logits - top[:, None])
    total = tl.sum(powers, axis=1)
    if SCORE == "softmax":
        scores = powers / total[:, None]
        shares = scores
    else:
        scores = tl.where(valid, 1 / (1 + tl.exp(-logits)), 0.0)
        shares = scores / (tl.sum(scores, axis=1) + _EPSILON)[:, None]
    return scores, shares, top + tl.log(total)


def float32_precision() -> str:
    """Return how Triton multiplies float32 matrices, which torch's own switch decides."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def on_tensor_cores(left: torch.dtype, right: torch.dtype) -> bool:
    """Tell whether `dot` multiplies these dtypes on tensor cores."""
    if left == right:
        return left != torch.float32
    return {left, right} == {torch.float32, torch.bfloat16}
