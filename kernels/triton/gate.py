"""`moeify::gate` in Triton: one kernel over the tokens, one that sums the results of its blocks.

A program owns a block of tokens: it projects them on the router, and while the logits are in
registers takes scores, choice and its share of the losses from them. Blocks write partial sums,
which the second kernel adds in a fixed order, so that nothing depends on scheduling.

The choice compares integer keys in the order of the floats, NaN the greatest as in `torch.sort`, so
that every row, a NaN row too, gets distinct experts, and ties go to the lowest index.

Shapes: T tokens, D model width, E experts, K top-k, B blocks of tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import triton
import triton.language as tl
from moeify.kernels.gate import BALANCES, LOGIT_NOISES, SCORES
from moeify.kernels.operands import FLOATS, contiguous
from moeify.kernels.triton.arithmetic import (
    dot,
    float32_precision,
    on_tensor_cores,
    ordered,
    probabilities,
)

MAX_EXPERTS = 512

_TAKEN = tl.constexpr(-(2**31))  # below the key of every float
_FIRST = tl.constexpr(2**31 - 2)  # above the key of every finite float
_MAX = tl.constexpr(torch.finfo(torch.float32).max)


@triton.jit
def _best(keys, columns):
    """Return the column of each row's greatest key, the lowest of equal ones."""
    is_best = keys == tl.max(keys, axis=1)[:, None]
    return tl.min(tl.where(is_best, columns, 2**30), axis=1)


@triton.jit(do_not_specialize=["rows"])
def gate_kernel(
    tokens,
    weight,
    bias,
    input_noise,
    logit_noise,
    scores_out,
    ids_out,
    logits_out,
    block_counts,
    block_shares,
    block_sums,
    rows,
    experts,
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORE: tl.constexpr,
    NOISE: tl.constexpr,
    FIRST_ONLY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Choose experts for BLOCK_T tokens; BLOCK_E covers all experts."""
    block = tl.program_id(0)
    row = block * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    row_ok, expert_ok = row < rows, expert < experts
    row = row.to(tl.int64)
    columns, valid = expert[None, :], expert_ok[None, :]

    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for start in range(0, WIDTH, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        column_ok = column < WIDTH
        place = row[:, None] * WIDTH + column[None, :]
        inside = row_ok[:, None] & column_ok[None, :]
        x = tl.load(tokens + place, mask=inside, other=0.0)
        if input_noise is not None:
            factor = tl.load(input_noise + place, mask=inside, other=0.0)
            x = x.to(tl.float32) * factor.to(tl.float32)
        w = tl.load(
            weight + expert[None, :] * WIDTH + column[:, None],
            mask=valid & column_ok[:, None],
            other=0.0,
        )
        logits = dot(x, w, logits, PRECISION)
    place = row[:, None] * experts + columns
    inside = row_ok[:, None] & valid
    tl.store(logits_out + place, logits, mask=inside)

    scores, shares, logsumexp = probabilities(logits, valid, SCORE)
    safe = tl.where(shares == 0, 1.0, shares)
    entropy = -tl.sum(safe * tl.log(safe), axis=1)
    tl.store(block_shares + block * BLOCK_E + expert, tl.sum(tl.where(inside, shares, 0.0), axis=0))
    square = logsumexp * logsumexp
    tl.store(block_sums + 2 * block, tl.sum(tl.where(row_ok, square, 0.0), axis=0))
    tl.store(block_sums + 2 * block + 1, tl.sum(tl.where(row_ok, entropy, 0.0), axis=0))

    if bias is not None:
        shift = tl.load(bias + expert, mask=expert_ok, other=0.0).to(tl.float32)[None, :]
    if NOISE != "rsample":
        keys = ordered(logits if bias is None else scores + shift)
        keys = tl.where(valid, keys, _TAKEN)
    if NOISE != "none":
        noise = tl.load(logit_noise + place, mask=inside, other=0.0).to(tl.float32)
        noisy = logits + noise
        if bias is not None:
            noisy = probabilities(noisy, valid, SCORE)[0] + shift
        if NOISE == "gumbel":
            first = _best(keys, columns)
            noisy = tl.where(noisy != noisy, -_MAX, noisy)
            noisy = tl.minimum(tl.maximum(noisy, -_MAX), _MAX)
            keys = tl.where(columns == first[:, None], _FIRST, ordered(noisy))
        else:
            keys = ordered(noisy)
        keys = tl.where(valid, keys, _TAKEN)

    if FIRST_ONLY:
        firsts = (columns == _best(keys, columns)[:, None]) & row_ok[:, None]
    for choice in range(TOP_K):
        best = _best(keys, columns)
        chosen = columns == best[:, None]
        score = tl.sum(tl.where(chosen, scores, 0.0), axis=1)
        tl.store(ids_out + row * TOP_K + choice, best, mask=row_ok)
        tl.store(scores_out + row * TOP_K + choice, score, mask=row_ok)
        keys = tl.where(chosen, _TAKEN, keys)
    counts = tl.sum((inside & (keys == _TAKEN)).to(tl.int32), axis=0)
    tl.store(block_counts + 2 * block * BLOCK_E + expert, counts)
    if FIRST_ONLY:
        counts = tl.sum(firsts.to(tl.int32), axis=0)
    tl.store(block_counts + (2 * block + 1) * BLOCK_E + expert, counts)


@triton.jit(do_not_specialize=["rows", "blocks"])
def gate_sums_kernel(
    block_counts,
    block_shares,
    block_sums,
    counts_out,
    aux_out,
    z_out,
    entropy_out,
    rows,
    blocks,
    experts,
    COUNTED: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Add up the blocks in order; the balance loss counts COUNTED choices per token."""
    expert = tl.arange(0, BLOCK_E)
    counts = tl.zeros((BLOCK_E,), tl.int32)
    load = tl.zeros((BLOCK_E,), tl.int32)
    shares = tl.zeros((BLOCK_E,), tl.float32)
    z_sums = tl.zeros((BLOCK_B,), tl.float32)
    entropies = tl.zeros((BLOCK_B,), tl.float32)
    start = 0
    while start < blocks:
        block = start + tl.arange(0, BLOCK_B)
        ok = block < blocks
        place = block[:, None] * BLOCK_E + expert[None, :]
        twice = 2 * block[:, None] * BLOCK_E + expert[None, :]
        counts += tl.sum(tl.load(block_counts + twice, mask=ok[:, None], other=0), axis=0)
        load += tl.sum(tl.load(block_counts + twice + BLOCK_E, mask=ok[:, None], other=0), axis=0)
        shares += tl.sum(tl.load(block_shares + place, mask=ok[:, None], other=0.0), axis=0)
        z_sums += tl.load(block_sums + 2 * block, mask=ok, other=0.0)
        entropies += tl.load(block_sums + 2 * block + 1, mask=ok, other=0.0)
        start += BLOCK_B
    tl.store(counts_out + expert, counts, mask=expert < experts)
    tokens = tl.maximum(rows, 1).to(tl.float32)
    target = load.to(tl.float32) * (experts / (tokens * COUNTED))
    tl.store(aux_out, tl.sum(shares / tokens * target, axis=0))
    tl.store(z_out, tl.sum(z_sums, axis=0) / tokens)
    tl.store(entropy_out, tl.sum(entropies, axis=0) / tokens)


def gate(
    tokens: Tensor,
    weight: Tensor,
    selection_bias: Tensor | None,
    input_noise: Tensor | None,
    logit_noise: Tensor | None,
    top_k: int,
    score: str,
    noise: str,
    balance: str,
    surrogate: bool,
) -> Any:
    """Do what `gate_reference` does, for up to 512 experts in float32, float16 or bfloat16."""
    rows, width = tokens.shape
    experts = weight.shape[0]
    known = score in SCORES and noise in LOGIT_NOISES and balance in BALANCES
    served = tokens.dtype in FLOATS and weight.dtype in FLOATS and 1 <= top_k <= experts
    if not known or not served or experts > MAX_EXPERTS:
        return NotImplemented
    noise = "none" if logit_noise is None else noise
    left = tokens.dtype if input_noise is None else torch.float32
    sizes = gate_sizes(rows, experts, left, weight.dtype)
    blocks, padded = triton.cdiv(rows, sizes["BLOCK_T"]), sizes["BLOCK_E"]
    new, f32, i32 = tokens.new_empty, torch.float32, torch.int32
    scores, ids = new(rows, top_k, dtype=f32), new(rows, top_k, dtype=i32)
    logits = new(rows, experts, dtype=f32)
    block_counts = new(blocks, 2, padded, dtype=i32)
    block_shares, block_sums = new(blocks, padded, dtype=f32), new(blocks, 2, dtype=f32)
    if blocks:
        gate_kernel[(blocks,)](
            *contiguous(tokens, weight, selection_bias, input_noise, logit_noise),
            scores,
            ids,
            logits,
            block_counts,
            block_shares,
            block_sums,
            rows,
            experts,
            WIDTH=width,
            TOP_K=top_k,
            SCORE=score,
            NOISE=noise,
            FIRST_ONLY=balance == "first",
            PRECISION=float32_precision(),
            **sizes,
        )
    counted = top_k if balance == "all" else 1
    sums = _sums(block_counts, block_shares, block_sums, rows, experts, counted)
    return scores, ids, logits, *sums


def _sums(
    block_counts: Tensor,
    block_shares: Tensor,
    block_sums: Tensor,
    rows: int,
    experts: int,
    counted: int,
) -> tuple[Tensor, ...]:
    """Add up what the blocks found: counts [E], balance loss, z-loss and entropy."""
    blocks, padded = block_shares.shape
    counts = block_counts.new_empty(experts)
    losses = [block_shares.new_empty(()) for _ in range(3)]
    gate_sums_kernel[(1,)](
        block_counts,
        block_shares,
        block_sums,
        counts,
        *losses,
        rows,
        blocks,
        experts,
        COUNTED=counted,
        **sum_sizes(padded),
    )
    return counts, *losses


def gate_sizes(rows: int, experts: int, left: torch.dtype, right: torch.dtype) -> dict[str, int]:
    """Return the blocks, warps and stages of `gate_kernel` for these operand dtypes."""
    padded = max(16, triton.next_power_of_2(experts))
    few = rows <= 16  # one program, whose time is the latency of its loads
    exact = on_tensor_cores(left, right)
    deepest = 64 if left != right else 512 if few else 128  # a split side takes registers
    depth = min(deepest, 65536 // (padded * right.itemsize))
    return {
        "BLOCK_T": 16 if few or padded > 128 else 32,
        "BLOCK_E": padded,
        "BLOCK_D": depth if exact else 32,
        "num_warps": 4 if padded <= 32 else 8,
        "num_stages": 3 if exact else 2,
    }


def sum_sizes(padded: int) -> dict[str, int]:
    """Return the blocks, warps and stages of `gate_sums_kernel`."""
    return {"BLOCK_B": 8192 // padded, "BLOCK_E": padded, "num_warps": 8, "num_stages": 2}
