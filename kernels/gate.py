"""`moeify::gate`: scores, top-k choice and router losses, in full precision whatever the model's.

The op is deterministic. Random noise is drawn by the caller and passed in, so a recomputed
forward chooses the same experts, and the gradient is an explicit second op, so that a compiler
sees two opaque nodes.

Shapes: T tokens, D model width, E experts, K top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moeify.kernels.precision import accumulation_dtype, without_autocast
from moeify.kernels.registry import define, differentiable, fake

SCORES = ("softmax", "sigmoid")
BALANCES = ("all", "first")
LOGIT_NOISES = ("none", "rsample", "gumbel")

EPSILON = 1e-20
"""Added to a sum of sigmoid scores before dividing by it; invisible to any sum above 1e-12."""


def gate_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Choose `top_k` experts per token and compute the router's losses.

    A is float64 for float64 tokens, else float32. Ties go to the lowest expert index.

    Args:
        tokens: [T, D], any float dtype.
        weight: [E, D], any float dtype.
        selection_bias: [E] added to the scores for the choice only (Wang et al. 2024), or None.
        input_noise: [T, D] factor on the tokens (jitter), or None.
        logit_noise: [T, E] added to the logits for the choice only, or None.
        top_k: Experts per token, 1 <= top_k <= E.
        score: "softmax", or "sigmoid" (independent scores).
        noise: Which choices `logit_noise` moves: "rsample" all, "gumbel" all but the first.
        balance: "all" counts every choice in the balance loss, "first" only first choices.
        surrogate: The gradient of the scores is a surrogate that trains the weight alone: it does
            not go on to the tokens, whose true gradient through it is zero (straight-through).

    Returns:
        scores [T, K] A of the chosen experts, without bias and logit noise; ids [T, K] int32 in
        order of choice; logits [T, E] A; counts [E] int32, routes per expert before any
        dropping; aux_loss [] A; z_loss [] A; entropy [] A, the mean over tokens of the entropy of
        the normalised scores, in nats, without gradient. Losses of zero tokens are 0.

    Source:
        Balance loss "all": Switch Transformers (Fedus et al. 2021) eq. 4 for K = 1, and
        `(E / K) * sum_e mean_t(p_e) * mean_t(assigned_e)` for any K; "first": GShard (Lepikhin et
        al. 2020) section 2.2, as DeepSpeed's top-2 gate. With sigmoid scores p is normalised over
        the experts: DeepSeek-V3 (2024) eq. 17-20. z-loss: ST-MoE (Zoph et al. 2022) eq. 5. Jitter:
        Switch Transformers. Gumbel noise on the second expert: DeepSpeed's top-2 gate.
    """
    with without_autocast(tokens):
        logits = _logits(tokens, weight, input_noise)
        return _outputs(logits, logits, selection_bias, logit_noise, top_k, score, noise, balance)


def _formula(
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
) -> tuple[Tensor, ...]:
    """Return what `gate_reference` returns; what is added or multiplied has no derivative."""
    bias, factor, added = (
        None if x is None else x.detach() for x in (selection_bias, input_noise, logit_noise)
    )
    with without_autocast(tokens):
        logits = _logits(tokens, weight, factor)
        scored = _logits(tokens.detach(), weight, factor) if surrogate else logits
        outputs = _outputs(logits, scored, bias, added, top_k, score, noise, balance)
    return *outputs[:-1], outputs[-1].detach()


def _outputs(
    logits: Tensor,
    scored: Tensor,
    selection_bias: Tensor | None,
    logit_noise: Tensor | None,
    top_k: int,
    score: str,
    noise: str,
    balance: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the outputs of `gate`; `scored` are the logits whose derivative the scores have."""
    experts = logits.shape[1]
    probabilities = expert_scores(logits, score)
    ids = _choose(logits, probabilities, selection_bias, logit_noise, top_k, score, noise)
    own = probabilities if scored is logits else expert_scores(scored, score)
    scores = own.gather(1, ids)
    share = normalized_scores(probabilities, score)
    mean_share = _mean(share)
    aux_loss = (mean_share * _balance_target(ids, experts, balance, logits.dtype)).sum()
    z_loss = _mean(logits.logsumexp(1).square())
    entropy = _mean(torch.special.entr(share).sum(1))
    counts = count_choices(ids, experts).to(torch.int32)
    return scores, ids.to(torch.int32), logits, counts, aux_loss, z_loss, entropy


gate = define(
    "gate",
    "(Tensor tokens, Tensor weight, Tensor? selection_bias, Tensor? input_noise, "
    "Tensor? logit_noise, int top_k, str score, str noise, str balance, bool surrogate) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    gate_reference,
    cpu="moeify.kernels.cpu.gate:gate",
    cuda="moeify.kernels.triton.gate:gate",
)


@fake("gate")
def _(tokens: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    top_k = rest[3]
    rows, experts = tokens.shape[0], weight.shape[0]
    dtype = accumulation_dtype(tokens.dtype)
    return (
        tokens.new_empty(rows, top_k, dtype=dtype),
        tokens.new_empty(rows, top_k, dtype=torch.int32),
        tokens.new_empty(rows, experts, dtype=dtype),
        tokens.new_empty(experts, dtype=torch.int32),
        *(tokens.new_empty((), dtype=dtype) for _ in range(3)),
    )


def gate_backward_reference(
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
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gate` for tokens [T, D] and weight [E, D], in their dtypes.

    The choice itself (ids, counts) has no gradient. A gradient that is None counts as zero.
    """
    with without_autocast(tokens):
        true_grad = _grad_of_losses(grad_logits, grad_aux, grad_z, logits, ids, score, balance)
        grad = true_grad + _grad_of_scores(grad_scores, logits, ids, score)
        grad_weight = grad.t() @ _noisy_tokens(tokens, input_noise, logits.dtype)
        grad_tokens = _noisy_tokens(
            (true_grad if surrogate else grad) @ weight.to(logits.dtype), input_noise, logits.dtype
        )
    return grad_tokens.to(tokens.dtype), grad_weight.to(weight.dtype)


def _backward_formula(
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
) -> tuple[Tensor, Tensor]:
    """Return what `gate_backward_reference` returns; surrogate scores are constant in the tokens.

    So they are in `_formula`, of whose derivative this is the value.
    """
    factor = None if input_noise is None else input_noise.detach()
    dtype = logits.dtype
    with without_autocast(tokens):
        grad = _grad_of_losses(grad_logits, grad_aux, grad_z, logits, ids, score, balance)
        noisy = scored_noisy = _noisy_tokens(tokens, factor, dtype)
        scored = logits
        if surrogate:
            scored = _logits(tokens.detach(), weight, factor)
            scored_noisy = noisy.detach()
        own = _grad_of_scores(grad_scores, scored, ids, score)
        grad_weight = grad.t() @ noisy + own.t() @ scored_noisy
        grad_tokens = (grad if surrogate else grad + own) @ weight.to(dtype)
        grad_tokens = _noisy_tokens(grad_tokens, factor, dtype)
    return grad_tokens.to(tokens.dtype), grad_weight.to(weight.dtype)


def _grad_of_losses(
    grad_logits: Tensor | None,
    grad_aux: Tensor | None,
    grad_z: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    score: str,
    balance: str,
) -> Tensor:
    """Return the gradient of the logits [T, E] through all outputs but the scores."""
    tokens, experts = logits.shape
    grad = torch.zeros_like(logits)
    if grad_aux is not None:
        probabilities = expert_scores(logits, score)
        target = _balance_target(ids.long(), experts, balance, logits.dtype)
        grad_share = grad_aux * target / max(tokens, 1)
        grad_probabilities = _normalized_backward(grad_share, probabilities, score)
        grad = grad + _scores_backward(grad_probabilities, probabilities, score)
    if grad_z is not None:
        slope = 2 * grad_z / max(tokens, 1)
        grad = grad + slope * logits.logsumexp(1, keepdim=True) * logits.softmax(1)
    return grad if grad_logits is None else grad + grad_logits


def _grad_of_scores(grad_scores: Tensor | None, logits: Tensor, ids: Tensor, score: str) -> Tensor:
    """Return the gradient of the logits [T, E] through the scores."""
    zeros = torch.zeros_like(logits)
    if grad_scores is None:
        return zeros
    grad_probabilities = zeros.scatter(1, ids.long(), grad_scores.to(logits.dtype))
    return _scores_backward(grad_probabilities, expert_scores(logits, score), score)


gate_backward = define(
    "gate_backward",
    "(Tensor? grad_scores, Tensor? grad_logits, Tensor? grad_aux, Tensor? grad_z, "
    "Tensor tokens, Tensor weight, Tensor? input_noise, Tensor logits, Tensor ids, "
    "str score, str balance, bool surrogate) -> (Tensor, Tensor)",
    gate_backward_reference,
    cpu="moeify.kernels.cpu.gate:gate_backward",
    cuda="moeify.kernels.triton.gate_backward:gate_backward",
)


@fake("gate_backward")
def _(*args: Any) -> tuple[Tensor, Tensor]:
    tokens, weight = args[4:6]
    return tokens.new_empty(tokens.shape), weight.new_empty(weight.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    tokens, weight, _, input_noise, _, _, ctx.score, _, ctx.balance, ctx.surrogate = inputs
    _, ids, logits, counts, _, _, entropy = output
    ctx.save_for_backward(tokens, weight, input_noise, logits, ids)
    ctx.mark_non_differentiable(ids, counts, entropy)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    grad_scores, _, grad_logits, _, grad_aux, grad_z, _ = grads
    grad_tokens, grad_weight = torch.ops.moeify.gate_backward(
        grad_scores,
        grad_logits,
        grad_aux,
        grad_z,
        *ctx.saved_tensors,
        ctx.score,
        ctx.balance,
        ctx.surrogate,
    )
    return grad_tokens, grad_weight, None, None, None, None, None, None, None, None


differentiable("gate", _formula, backward=_backward, setup_context=_setup_context)
differentiable("gate_backward", _backward_formula)


def _logits(tokens: Tensor, weight: Tensor, input_noise: Tensor | None) -> Tensor:
    dtype = accumulation_dtype(tokens.dtype)
    return _noisy_tokens(tokens, input_noise, dtype) @ weight.to(dtype).t()


def _noisy_tokens(tokens: Tensor, input_noise: Tensor | None, dtype: torch.dtype) -> Tensor:
    wide = tokens.to(dtype)
    return wide if input_noise is None else wide * input_noise.to(dtype)


def expert_scores(logits: Tensor, score: str) -> Tensor:
    """Return the scores [T, E] of logits [T, E]."""
    if score == "softmax":
        return logits.softmax(1)
    if score == "sigmoid":
        return logits.sigmoid()
    raise ValueError(f"score: {score!r} is unknown; use one of {', '.join(SCORES)}")


def _scores_backward(grad: Tensor, probabilities: Tensor, score: str) -> Tensor:
    """Return the gradient of the logits, given that of the probabilities."""
    if score == "softmax":
        return probabilities * (grad - (grad * probabilities).sum(1, keepdim=True))
    return grad * probabilities * (1 - probabilities)


def _choose(
    logits: Tensor,
    probabilities: Tensor,
    selection_bias: Tensor | None,
    logit_noise: Tensor | None,
    top_k: int,
    score: str,
    noise: str,
) -> Tensor:
    """Return [T, K] int64 expert ids; a stable sort because `torch.topk` breaks ties freely."""
    if noise not in LOGIT_NOISES:
        raise ValueError(f"noise: {noise!r} is unknown; use one of {', '.join(LOGIT_NOISES)}")
    clean = logits if selection_bias is None else probabilities + selection_bias.to(logits.dtype)
    if logit_noise is None or noise == "none":
        return _top(clean, top_k)
    noisy = logits + logit_noise.to(logits.dtype)
    if selection_bias is not None:
        noisy = expert_scores(noisy, score) + selection_bias.to(logits.dtype)
    if noise == "rsample":
        return _top(noisy, top_k)
    finite = noisy.nan_to_num(nan=torch.finfo(noisy.dtype).min)
    return _top(finite.scatter(1, _top(clean, 1), torch.inf), top_k)


def _top(values: Tensor, k: int) -> Tensor:
    return values.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()


def normalized_scores(probabilities: Tensor, score: str) -> Tensor:
    """Return scores [T, E] that sum to 1 over the experts."""
    if score == "softmax":
        return probabilities
    return probabilities / (probabilities.sum(1, keepdim=True) + EPSILON)


def _normalized_backward(grad: Tensor, probabilities: Tensor, score: str) -> Tensor:
    """Return the gradient of `normalized_scores`, given its gradient [E], equal for all tokens."""
    if score == "softmax":
        return grad.expand_as(probabilities)
    total = probabilities.sum(1, keepdim=True) + EPSILON
    share = probabilities / total
    return (grad - (grad * share).sum(1, keepdim=True)) / total


def _balance_target(ids: Tensor, experts: int, balance: str, dtype: torch.dtype) -> Tensor:
    """Return [E]: the weight of each expert's mean score in the balance loss."""
    if balance not in BALANCES:
        raise ValueError(f"balance: {balance!r} is unknown; use one of {', '.join(BALANCES)}")
    counted = ids if balance == "all" else ids[:, :1]
    return count_choices(counted, experts).to(dtype) * (experts / max(counted.numel(), 1))


def count_choices(ids: Tensor, experts: int) -> Tensor:
    """Return [E] int64: how often each expert is among `ids`."""
    flat = ids.flatten().long()
    zeros = torch.zeros(experts, dtype=torch.int64, device=ids.device)
    return zeros.scatter_add(0, flat, torch.ones_like(flat))


def _mean(values: Tensor) -> Tensor:
    return values.sum(0) / max(values.shape[0], 1)
