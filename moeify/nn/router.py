"""The router: a weight, the routing options, and the losses and statistics of its last forward.

Everything random is drawn here and passed to deterministic ops. Losses, statistics and load counts
for bias updates are written by real forwards only, never while activation checkpointing recomputes
one, so each loss counts once and a recomputation routes alike.

Shapes: T tokens, D model width, E experts, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from moeify.compat import in_backward, is_exporting, record_under_compiled_checkpointing
from moeify.distributed.collectives import from_first
from moeify.kernels.flops import register_flops
from moeify.kernels.precision import accumulation_dtype, without_autocast
from moeify.kernels.route import BALANCES, COMBINES, DROPS, SCORES, Routing, route
from moeify.nn.capacity import expert_capacity
from moeify.nn.global_losses import over_ranks
from moeify.nn.recomputed_noise import repeated_draws
from moeify.nn.router_bias import follow_optimizers, move_bias
from moeify.nn.router_record import ForwardRecord, Records, RouterStats, at_least_one

record_under_compiled_checkpointing()

NOISES = ("none", "jitter", "rsample", "gumbel", "jitter+gumbel")


class Router(nn.Module):
    """Routes tokens to experts; only its weight trains, there is no trained bias.

    Args:
        hidden: Model width D.
        experts: Number of experts E.
        top_k: Experts per token.
        score: "softmax" or "sigmoid".
        combine: "probability", "normalized", "straight_through" or "sum"; see
            `kernels.combine_weights`.
        noise: In training: "jitter" (input times U(1 - eps, 1 + eps)), "rsample" (choice by logits
            plus Gumbel noise, K = 1), "gumbel" (the same for all choices but the first, K >= 2),
            "jitter+gumbel", or "none".
        jitter_eps: eps of "jitter".
        capacity_factor: In training; None is dropless.
        eval_capacity_factor: In evaluation; None is dropless.
        min_capacity: Lower bound of the capacity.
        drop: Which routes stay over capacity: "random" (in evaluation "position"), "position" or
            "score".
        balance: Choices that the balance loss counts: "all" or "first".
        aux_loss: Coefficient of the balance loss in `last_aux_loss`.
        z_loss: Coefficient of the z-loss in `last_aux_loss`.
        bias_update: Step of auxiliary-loss-free balancing; 0 is off. Each step of an optimizer that
            trains the router moves the selection bias by it, away from the load since the last one.
        device: Device of the weight.
        dtype: Dtype of the weight.

    Attributes:
        weight: [E, D] parameter.
        selection_bias: [E] float32 buffer, if `bias_update` > 0.
        pending_counts: [E] int64 buffer, load since the last bias update.
        record: Losses and statistics of this thread's last forward: in a converted model the sum
            over all calls in one forward of the model, elsewhere those of the last call.
        group: Process group of the ranks that hold different tokens, whose losses and statistics
            in training are over all their tokens; "" for this process alone.
        tensor_group: Process group of the ranks that hold the same tokens, which all use what the
            first of them draws; "" for this process alone.
        where: Path of the layer, for messages.
        lift_capacity: True makes routing dropless, deterministic and without side effects; see
            `lifted_capacity`.

    Raises:
        ValueError: An option that is unknown or out of range; the message names it.

    Source:
        Bias updates: auxiliary-loss-free load balancing (Wang et al. 2024) algorithm 1.

    Note:
        Reentrant checkpointing runs the real forward without a graph, so `last_aux_loss` cannot
        train the router there; use `use_reentrant=False`.

    Example:
        >>> routing = Router(16, experts=4, top_k=2)(torch.randn(8, 16))
        >>> routing.ids.shape
        torch.Size([8, 2])
    """

    selection_bias: Tensor | None
    pending_counts: Tensor | None

    def __init__(
        self,
        hidden: int,
        *,
        experts: int,
        top_k: int = 1,
        score: str = "softmax",
        combine: str = "probability",
        noise: str = "none",
        jitter_eps: float = 0.01,
        capacity_factor: float | None = None,
        eval_capacity_factor: float | None = None,
        min_capacity: int = 4,
        drop: str = "random",
        balance: str = "all",
        aux_loss: float = 0.0,
        z_loss: float = 0.0,
        bias_update: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        register_flops()
        self.hidden, self.experts, self.top_k = hidden, experts, top_k
        self.score, self.combine, self.balance = score, combine, balance
        self.noise, self.jitter_eps = noise, jitter_eps
        self.capacity_factor, self.eval_capacity_factor = capacity_factor, eval_capacity_factor
        self.min_capacity, self.drop = min_capacity, drop
        self.aux_loss, self.z_loss, self.bias_update = aux_loss, z_loss, bias_update
        self._check()
        self.weight = nn.Parameter(torch.empty(experts, hidden, device=device, dtype=dtype))
        bias = counts = None
        if bias_update > 0:
            bias = torch.zeros(experts, device=device, dtype=torch.float32)
            counts = torch.zeros(experts, device=device, dtype=torch.int64)
        self.register_buffer("selection_bias", bias)
        self.register_buffer("pending_counts", counts)
        self._records = Records()
        self.group = self.tensor_group = self.where = ""
        self.lift_capacity = False
        self._follow_optimizers()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as `nn.Linear` would."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Routing:
        """Route tokens [T, D] of any float dtype; see `Routing` for the result."""
        stochastic = self.training and not self.lift_capacity
        live = not self.lift_capacity and not in_backward()
        count = tokens.shape[0]
        factor = self._factor()
        drop = self.drop
        if drop == "random" and (factor is None or not stochastic):
            drop = "position"
        input_noise = logit_noise = priority = None
        if stochastic and (self.noise != "none" or drop == "random"):
            if torch.compiler.is_compiling():  # the graph repeats its draws itself
                input_noise, logit_noise, priority = self._draw(tokens, drop)
            else:
                with repeated_draws(self, tokens.device):
                    input_noise, logit_noise, priority = self._draw(tokens, drop)
        capacity = self.capacity(count)
        routing = route(
            tokens,
            self.weight,
            top_k=self.top_k,
            capacity=capacity,
            selection_bias=self.selection_bias,
            input_noise=input_noise,
            logit_noise=logit_noise,
            random_priority=priority,
            score=self.score,
            combine=self.combine,
            noise=self.noise.removeprefix("jitter+").replace("jitter", "none"),
            drop=drop,
            balance=self.balance,
        )
        if factor is not None:
            routing = routing._replace(capacity=capacity)
        total: int | Tensor = count
        if self.group and stochastic:
            routing, total = over_ranks(
                routing, self.group, self.where, self.top_k, self.score, self.balance
            )
        if stochastic and live and self.pending_counts is not None:
            self.pending_counts.add_(routing.counts)
        if live and not is_exporting():
            self._record(routing, total)
        return routing

    def capacity(self, tokens: int) -> int:
        """Return the rows per expert for that many tokens, in the present mode."""
        return expert_capacity(
            tokens,
            top_k=self.top_k,
            experts=self.experts,
            factor=self._factor(),
            minimum=self.min_capacity,
        )

    def _factor(self) -> float | None:
        if self.lift_capacity:
            return None
        return self.capacity_factor if self.training else self.eval_capacity_factor

    def extra_repr(self) -> str:
        factors = f"capacity_factor={self.capacity_factor}, eval={self.eval_capacity_factor}"
        return (
            f"{self.hidden}, experts={self.experts}, top_k={self.top_k}, score={self.score}, "
            f"combine={self.combine}, noise={self.noise}, drop={self.drop}, {factors}"
        )

    @property
    def record(self) -> ForwardRecord:
        """What this thread's last forward left here."""
        return self._records.own

    @property
    def last_aux_loss(self) -> Tensor | None:
        """Weighted sum of the losses of the last forward, with its graph; None before one."""
        return self.record.loss

    @property
    def last_stats(self) -> RouterStats | None:
        """Statistics of the last forward; None before one."""
        return self.record.stats

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the records: a loss with a graph cannot be copied."""
        return {name: value for name, value in self.__dict__.items() if name != "_records"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._records = Records()
        self._follow_optimizers()
        register_flops()  # in the process that a model was unpickled in

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Restore losses and statistics after forwards that should not count."""
        before = self.record.snapshot()
        try:
            yield
        finally:
            self.record.restore(before)

    def _draw(
        self, tokens: Tensor, drop: str
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return factors on the tokens [T, D], Gumbel noise [T, E] and priorities [T], or None."""
        input_noise = logit_noise = priority = None
        dtype, device = accumulation_dtype(tokens.dtype), tokens.device
        with without_autocast(tokens):
            if self.noise in ("jitter", "jitter+gumbel"):
                uniform = torch.rand(tokens.shape, dtype=dtype, device=device)
                uniform = self._from_first_rank(uniform)
                input_noise = 1 + self.jitter_eps * (2 * uniform - 1)
            if self.noise in ("rsample", "gumbel", "jitter+gumbel"):
                count = tokens.shape[0]
                uniform = torch.rand(count, self.experts, dtype=dtype, device=device)
                uniform = self._from_first_rank(uniform)
                exponential = -uniform.clamp_min(torch.finfo(dtype).tiny).log()
                logit_noise = -exponential.log()
        if drop == "random":  # float32 whatever the default: ties would favour the first tokens
            drawn = torch.rand(tokens.shape[0], dtype=torch.float32, device=device)
            priority = self._from_first_rank(drawn)
        return input_noise, logit_noise, priority

    def _from_first_rank(self, drawn: Tensor) -> Tensor:
        """Return what the first rank of the tensor group has drawn."""
        if not self.tensor_group:
            return drawn
        return from_first(drawn, self.tensor_group, f"{self.where}: random draws")

    @property
    def draws(self) -> bool:
        """Whether training forwards draw random numbers."""
        dropping = self.drop == "random" and self.capacity_factor is not None
        return self.noise != "none" or dropping

    def balanced(self) -> tuple[Router]:
        """Return itself: what has a selection bias."""
        return (self,)

    def _follow_optimizers(self) -> None:
        if self.pending_counts is not None:
            follow_optimizers(self)

    def update_bias(self) -> None:
        """Lower the bias of experts with more than the mean pending load, and raise the others'.

        The steps of any optimizer of torch that trains this router do it; `pending_counts` are
        zero then.
        """
        move_bias(self)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast, but keep the bias in float32: in bfloat16 its small steps get lost."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load values of any dtype, but keep the bias in float32, also with `assign=True`."""
        for name, buffer in self._buffers.items():
            value = state_dict.get(prefix + name)
            if buffer is not None and isinstance(value, Tensor):
                state_dict[prefix + name] = value.to(buffer.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _record(self, routing: Routing, tokens: int | Tensor) -> None:
        loss = self.aux_loss * routing.aux_loss
        if self.z_loss:
            loss = loss + self.z_loss * routing.z_loss
        routes = at_least_one(tokens) * self.top_k
        stats: RouterStats = {
            "counts": routing.counts,
            "dropped": routing.dropped / routes,
            "entropy": routing.entropy,
            "tokens": tokens,
        }
        self.record.add(loss, stats, routing.logits)

    def _check(self) -> None:
        if self.experts < 1:
            raise ValueError(f"experts: {self.experts} is not at least 1")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k: {self.top_k} must be between 1 and {self.experts} experts")
        for name, value, known in (
            ("score", self.score, SCORES),
            ("combine", self.combine, COMBINES),
            ("noise", self.noise, NOISES),
            ("drop", self.drop, DROPS),
            ("balance", self.balance, BALANCES),
        ):
            if value not in known:
                raise ValueError(f"{name}: {value!r} is unknown; use one of {', '.join(known)}")
        if self.noise == "rsample" and self.top_k != 1:
            raise ValueError(f"noise: 'rsample' needs top_k 1, not {self.top_k}; use 'gumbel'")
        if self.noise.endswith("gumbel") and self.top_k < 2:
            raise ValueError("noise: 'gumbel' needs top_k 2 or more; use 'rsample'")
        for name, factor in (
            ("capacity_factor", self.capacity_factor),
            ("eval_capacity_factor", self.eval_capacity_factor),
        ):
            if factor is not None and not (factor > 0 and math.isfinite(factor)):
                raise ValueError(f"{name}: {factor} must be a positive number, or None for no drop")
        if not 0 <= self.jitter_eps < 1:
            raise ValueError(f"jitter_eps: {self.jitter_eps} must be in [0, 1)")
        for name, number in (
            ("min_capacity", self.min_capacity),
            ("aux_loss", self.aux_loss),
            ("z_loss", self.z_loss),
            ("bias_update", self.bias_update),
        ):
            if not (number >= 0 and math.isfinite(number)):
                raise ValueError(f"{name}: {number} must be a number of at least 0")


@contextmanager
def lifted_capacity(model: nn.Module) -> Iterator[None]:
    """Make every router below `model` dropless, deterministic and free of side effects.

    Nothing is dropped and no noise is drawn, also in training mode; losses, statistics and the
    selection bias do not change. Used to compare a converted model with its source.
    """
    routers = [module for module in model.modules() if isinstance(module, Router)]
    former = [router.lift_capacity for router in routers]
    for router in routers:
        router.lift_capacity = True
    try:
        yield
    finally:
        for router, value in zip(routers, former, strict=True):
            router.lift_capacity = value
