"""`MoE`: a mixture-of-experts layer by hand, with DeepSpeed's arguments and meaning."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from moeify.kernels import combine as _combine  # noqa: F401  registers the op
from moeify.kernels import dispatch as _dispatch  # noqa: F401  registers the op
from moeify.nn.experts import ModuleExperts
from moeify.nn.router import Router

NOISY_GATE_POLICIES = (None, "Jitter", "RSample")


class MoE(nn.Module):
    """Mixture of copies of `expert`, routed as DeepSpeed's `MoE` routes.

    | k | kept over capacity | combine weight | balance loss |
    |---|---|---|---|
    | 1 | random tokens; by position with `use_rts=False` | the probability | all choices |
    | 2 | by position, first choices before second | normalised over the kept | first choices |
    | 3+ | highest probability | normalised over the kept | all choices |

    With k = 2 the second expert is sampled with Gumbel noise in training. Evaluation is
    deterministic: where training keeps random tokens it keeps the first ones.

    Args:
        hidden_size: Model width.
        expert: The module to copy; maps [n, hidden_size] to [n, hidden_size], also for n = 0.
        num_experts: Number of experts; all start equal.
        ep_size: Ranks that share the experts; only 1 here.
        k: Experts per token.
        capacity_factor: Capacity per expert in training, times `k * tokens / num_experts`.
        eval_capacity_factor: The same in evaluation.
        min_capacity: Lower bound of the capacity.
        use_residual: Add a dense copy of `expert`, mixed in by a learned coefficient per token.
        noisy_gate_policy: None, "Jitter" or "RSample" (k = 1 only), in training.
        drop_tokens: False keeps every token.
        use_rts: Random token selection, k = 1 only.

    Raises:
        ValueError: An argument out of range; the message names it.

    Source:
        DeepSpeed-MoE (Rajbhandari et al. 2022); the residual mix is section 4.1, with the
        softmax coefficient of DeepSpeed's code.

    Example:
        >>> moe = MoE(hidden_size=8, expert=nn.Linear(8, 8), num_experts=4, k=2)
        >>> out, l_aux, exp_counts = moe(torch.randn(2, 5, 8))
        >>> out.shape, int(exp_counts.sum())
        (torch.Size([2, 5, 8]), 20)
    """

    def __init__(
        self,
        hidden_size: int,
        expert: nn.Module,
        num_experts: int = 1,
        ep_size: int = 1,
        k: int = 1,
        capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0,
        min_capacity: int = 4,
        use_residual: bool = False,
        noisy_gate_policy: str | None = None,
        drop_tokens: bool = True,
        use_rts: bool = True,
    ) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size: {hidden_size} is not at least 1")
        if num_experts < 1:
            raise ValueError(f"num_experts: {num_experts} is not at least 1")
        if not 1 <= k <= num_experts:
            raise ValueError(f"k: {k} must be between 1 and num_experts={num_experts}")
        if ep_size != 1:
            raise ValueError(
                f"ep_size: {ep_size} must be 1 for a layer built by hand; convert the model with a "
                "plan (`parallel: {expert: ...}`) to shard experts over ranks"
            )
        like = next(expert.parameters(), None)
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        self.hidden_size, self.num_experts, self.k = hidden_size, num_experts, k
        self.use_residual = use_residual
        self.router = Router(
            hidden_size,
            experts=num_experts,
            top_k=k,
            combine="probability" if k == 1 else "normalized",
            noise=_noise(noisy_gate_policy, k),
            capacity_factor=capacity_factor if drop_tokens else None,
            eval_capacity_factor=eval_capacity_factor if drop_tokens else None,
            min_capacity=min_capacity,
            drop=_drop(k, use_rts),
            balance="first" if k == 2 else "all",
            device=device,
        )
        self.experts = ModuleExperts(copy.deepcopy(expert) for _ in range(num_experts))
        self.mlp: nn.Module | None = None
        self.coefficient: nn.Linear | None = None
        if use_residual:
            self.mlp = copy.deepcopy(expert)
            self.coefficient = nn.Linear(hidden_size, 2, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run the layer.

        Args:
            x: [..., hidden_size], any float dtype.

        Returns:
            out [..., hidden_size]; l_aux [], the balance loss without coefficient; exp_counts
            [num_experts] int64, routes per expert before dropping.

        Raises:
            ValueError: The last dimension is not `hidden_size`.
        """
        if x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x: last dimension {x.shape[-1]} is not hidden_size={self.hidden_size}"
            )
        tokens = x.reshape(-1, self.hidden_size)
        routing = self.router(tokens)
        rows = torch.ops.moeify.dispatch(tokens, routing.order, routing.slots)
        hidden = self.experts(rows, routing.offsets, self.router.capacity(tokens.shape[0]))
        out = torch.ops.moeify.combine(hidden, routing.weights, routing.order, routing.slots)
        out = out.view(*x.shape[:-1], out.shape[-1])
        if self.mlp is not None and self.coefficient is not None:
            dense = self.mlp(x)
            dense = dense[0] if isinstance(dense, tuple) else dense
            share = self.coefficient(x).softmax(dim=-1)
            out = out * share[..., 0:1] + dense * share[..., 1:]
        return out, routing.aux_loss, routing.counts.long()


def _noise(policy: str | None, k: int) -> str:
    """Return the router's noise for DeepSpeed's policy and k."""
    if policy not in NOISY_GATE_POLICIES:
        raise ValueError(f"noisy_gate_policy: {policy!r} is unknown; use None, 'Jitter', 'RSample'")
    if policy == "RSample" and k != 1:
        raise ValueError(f"noisy_gate_policy: 'RSample' needs k=1, not k={k}")
    kinds = [] if policy is None else [policy.lower()]
    return "+".join([*kinds, "gumbel"] if k == 2 else kinds) or "none"


def _drop(k: int, use_rts: bool) -> str:
    if k == 1:
        return "random" if use_rts else "position"
    return "position" if k == 2 else "score"
