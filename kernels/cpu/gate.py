"""`gate` and its gradient in C++ on the CPU: one pass over the logits, no other [T, E] tensor.

A few tokens are multiplied in C++ too, bfloat16 without a copy; more by oneDNN or BLAS, bfloat16 a
block at a time, so that the tokens are never copied as a whole.

Shapes: T tokens, D model width, E experts, K top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moeify.kernels.cpu.compile import address, floats, function, integers
from moeify.kernels.gate import BALANCES, LOGIT_NOISES, SCORES
from moeify.kernels.operands import FLOATS
from moeify.kernels.precision import without_autocast
from moeify.kernels.registry import never_traced

ARGUMENTS = {
    "multiply": "plpl" + "lll" + "p",
    "gate": "ppp" + "llllll" + "pppppp",
    "gate_backward": "pppppp" + "lllll" + "pp",
}
"""Types of the functions of gate.cpp, as `compile.function` reads them."""

FEW = 16
"""Tokens up to which reading the weight once in C++ beats a matrix product."""
LARGE = 1 << 21
"""Multiplications from which oneDNN's start-up pays off."""
BLOCK_BYTES = 4 << 20
"""Size of a float32 block of tokens: small enough for a cache, large enough for a product."""


@never_traced
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
    """Do what `gate_reference` does, in float32, bfloat16 or float16."""
    kernel = _kernel("gate")
    rows, experts = tokens.shape[0], weight.shape[0]
    if (
        kernel is None
        or not _serves(tokens, weight, input_noise, score, balance)
        or noise not in LOGIT_NOISES
        or not 1 <= top_k <= experts
        or (selection_bias is not None and selection_bias.shape != (experts,))
        or (logit_noise is not None and logit_noise.shape != (rows, experts))
    ):
        return NotImplemented
    logits = _logits(tokens, weight, input_noise)
    bias = None if selection_bias is None else selection_bias.float().contiguous()
    added = None if logit_noise is None else logit_noise.float().contiguous()
    scores = floats(rows, top_k)
    ids = integers(rows, top_k)
    counts = integers(experts)
    aux_loss, z_loss, entropy = floats(), floats(), floats()
    kernel(
        logits.data_ptr(),
        address(bias),
        address(added),
        rows,
        experts,
        top_k,
        SCORES.index(score),
        LOGIT_NOISES.index(noise),
        balance == "first",
        *(address(t) for t in (scores, ids, counts, aux_loss, z_loss, entropy)),
    )
    return scores, ids, logits, counts, aux_loss, z_loss, entropy


@never_traced
def gate_backward(
    grad_scores: Tensor | None,
    grad_logits: Tensor | None,
    grad_aux: Tensor | None,
    grad_z: Tensor | None,
    tokens: Tensor,
    weight: Tensor,
    input_noise: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    score: str,
    balance: str,
    surrogate: bool,
) -> Any:
    """Do what `gate_backward_reference` does, for what `gate` serves."""
    kernel = _kernel("gate_backward")
    if kernel is None or not _serves(tokens, weight, input_noise, score, balance):
        return NotImplemented
    rows, experts = logits.shape
    logits, ids = logits.contiguous(), ids.contiguous()
    grads = [
        None if grad is None else grad.float().contiguous()
        for grad in (grad_scores, grad_logits, grad_aux, grad_z)
    ]
    split = surrogate and grad_scores is not None
    others = any(grad is not None for grad in grads[1:])
    whole = floats(rows, experts)
    without_scores = floats(rows, experts) if split and others else None
    kernel(
        *(address(grad) for grad in grads),
        logits.data_ptr(),
        ids.data_ptr(),
        rows,
        experts,
        ids.shape[1],
        SCORES.index(score),
        balance == "first",
        whole.data_ptr(),
        address(without_scores),
    )
    with without_autocast(tokens):
        grad_weight = _grad_weight(whole, tokens, input_noise)
        if split and not others:
            return torch.zeros_like(tokens), grad_weight.to(weight.dtype)
        grad = whole if without_scores is None else without_scores
        grad_tokens = _grad_tokens(grad, weight, tokens, input_noise)
    return grad_tokens, grad_weight.to(weight.dtype)


@functools.cache
def _kernel(symbol: str) -> Any:
    return function("gate", symbol, ARGUMENTS[symbol])


def _serves(
    tokens: Tensor, weight: Tensor, input_noise: Tensor | None, score: str, balance: str
) -> bool:
    return (
        tokens.is_cpu
        and weight.is_cpu
        and tokens.dtype in FLOATS
        and weight.dtype in FLOATS
        and tokens.shape[1:] == weight.shape[1:]
        and (input_noise is None or input_noise.shape == tokens.shape)
        and score in SCORES
        and balance in BALANCES
    )


def _logits(tokens: Tensor, weight: Tensor, input_noise: Tensor | None) -> Tensor:
    """Return [T, E] float32."""
    rows, experts = tokens.shape[0], weight.shape[0]
    if rows > FEW:
        with without_autocast(tokens):
            wide = weight.float()
            parts = [_product(x, wide) for _, x in _blocks(tokens, input_noise)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    if input_noise is not None:
        tokens = tokens.float() * input_noise.float()
    left, right = _readable(tokens), _readable(weight)
    logits = floats(rows, experts)
    _kernel("multiply")(
        left.data_ptr(),
        left.dtype == torch.bfloat16,
        right.data_ptr(),
        right.dtype == torch.bfloat16,
        rows,
        left.shape[1],
        experts,
        logits.data_ptr(),
    )
    return logits


def _readable(tensor: Tensor) -> Tensor:
    """Return what C++ reads: contiguous float32 or bfloat16."""
    return (tensor.float() if tensor.dtype == torch.float16 else tensor).contiguous()


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right.T in float32; on AMD oneDNN takes half as long as MKL's `mm`."""
    if left.shape[0] * right.numel() >= LARGE and _has_onednn():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
        return product
    return torch.mm(left, right.t())


@functools.cache
def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _blocks(tokens: Tensor, input_noise: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield the tokens times their noise in float32; a block is valid until the next one."""
    if tokens.dtype == torch.float32 and input_noise is None:
        yield slice(None), tokens
        return
    rows, width = tokens.shape
    step = max(FEW, BLOCK_BYTES // (4 * max(width, 1)))
    buffer = floats(min(step, rows), width)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        block = buffer[: part.stop - start].copy_(tokens[part])
        if input_noise is not None:
            block *= input_noise[part]
        yield part, block


def _grad_weight(grad: Tensor, tokens: Tensor, input_noise: Tensor | None) -> Tensor:
    total: Tensor | None = None
    for part, block in _blocks(tokens, input_noise):
        across = grad[part].t()
        total = torch.mm(across, block) if total is None else total.addmm_(across, block)
    return grad.new_zeros(grad.shape[1], tokens.shape[1]) if total is None else total


def _grad_tokens(
    grad: Tensor, weight: Tensor, tokens: Tensor, input_noise: Tensor | None
) -> Tensor:
    across = weight.float().t()
    if tokens.dtype == torch.float32:
        whole = _product(grad, across)
        return whole if input_noise is None else whole.mul_(input_noise)
    out = tokens.new_empty(tokens.shape)
    step = max(FEW, BLOCK_BYTES // (4 * max(tokens.shape[1], 1)))
    for start in range(0, tokens.shape[0], step):
        part = slice(start, start + step)
        block = _product(grad[part], across)
        out[part] = block if input_noise is None else block.mul_(input_noise[part])
    return out
