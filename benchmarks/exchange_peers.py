"""The contestants of `benchmarks.exchange`: one MoE layer whose experts are spread over ranks.

Each keeps its share of the same weights and maps this rank's [T, D] to [T, D], routed by softmax
top-k as in `benchmarks.peers`. None of them does what is outside a layer: reducing the router's
gradient, and adding the router losses to the loss.

Shapes: T tokens of a rank, D model width, F expert width, E experts, N ranks, L = E / N experts of
a rank, K top-k, R = T * K rows.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import CAPACITY_FACTOR, MIN_CAPACITY, Case, Weights
from benchmarks.peers import _GateUpMlp, _Mlp, _module, start_deepspeed


class Layer(nn.Module):
    """A contestant on this rank."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__()
        self.case, self.ranks = case, dist.get_world_size()
        self.each = case.experts // self.ranks
        first = dist.get_rank() * self.each
        self.share = slice(first, first + self.each)

    def expert_gradients(self) -> tuple[Tensor, Tensor]:
        """Return the gradients [L, 2F, D] and [L, D, F] of this rank's experts."""
        raise NotImplementedError


class Plain(Layer):
    """What PyTorch alone offers: counts, rows and results by `all_to_all_single`, `grouped_mm`."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__(case, weights)
        self.router = nn.Parameter(weights.router.clone())
        self.gate_up = nn.Parameter(weights.gate_up[self.share].clone())
        self.down = nn.Parameter(weights.down[self.share].clone())

    def forward(self, x: Tensor) -> Tensor:
        case = self.case
        chosen, ids = F.linear(x, self.router).softmax(-1).topk(case.top_k)
        if case.top_k > 1:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        source = order // case.top_k
        counts = torch.bincount(flat, minlength=case.experts)
        recv_counts = torch.empty_like(counts)
        dist.all_to_all_single(recv_counts, counts)
        both = torch.stack([counts, recv_counts]).view(2, self.ranks, self.each)
        send, receive = both.sum(2).tolist()

        recv_rows = _all_to_all(x[source], receive, send)
        owner = torch.arange(self.each).repeat(self.ranks).repeat_interleave(recv_counts)
        by_expert = owner.argsort(stable=True)
        hidden = self.experts(recv_rows[by_expert], both[1].sum(0))
        results = torch.empty_like(hidden).index_copy(0, by_expert, hidden)
        returned = _all_to_all(results, send, receive)
        return torch.zeros_like(x).index_add(0, source, returned * chosen.flatten()[order, None])

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Run rows [R, D], sorted by expert, of which `counts` [L] says how many each gets."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = F.grouped_mm(rows, self.gate_up.mT, offs=ends).chunk(2, -1)
        return F.grouped_mm(F.silu(gate) * up, self.down.mT, offs=ends)

    def expert_gradients(self) -> tuple[Tensor, Tensor]:
        assert self.gate_up.grad is not None
        assert self.down.grad is not None
        return self.gate_up.grad, self.down.grad


class PlainLoop(Plain):
    """The same with a loop over the experts."""

    def experts(self, rows: Tensor, counts: Tensor) -> Tensor:
        outs = []
        for part, gate_up, down in zip(
            torch.split(rows, counts.tolist()), self.gate_up, self.down, strict=True
        ):
            gate, up = F.linear(part, gate_up).chunk(2, -1)
            outs.append(F.linear(F.silu(gate) * up, down))
        return torch.cat(outs)


def _all_to_all(rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
    out: Tensor = _AllToAll.apply(rows, receive, send)  # type: ignore[no-untyped-call]
    return out


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, receive: list[int], send: list[int]) -> Tensor:
        ctx.splits = receive, send
        out = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(out, rows.contiguous(), receive, send)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        receive, send = ctx.splits
        out = grads[0].new_empty(sum(send), grads[0].shape[1])
        dist.all_to_all_single(out, grads[0].contiguous(), send, receive)
        return out, None, None


class Wire(Layer):
    """No layer: send as many rows there and back as a dropless one does, evenly spread."""

    def forward(self, x: Tensor) -> Tensor:
        even = [self.case.rows // self.ranks] * self.ranks
        rows = x.repeat_interleave(self.case.top_k, 0)[: sum(even)]
        returned = _all_to_all(_all_to_all(rows, even, even), even, even)
        return F.pad(returned, (0, 0, 0, self.case.rows - len(returned)))[:: self.case.top_k]


class Moeify(Layer):
    """A converted MLP, as `moeify.moeify` returns it, on nodes of `node` ranks.

    With `parallel=None` no rows travel: a rank's own rows go to as many experts as it would keep.
    """

    def __init__(
        self,
        case: Case,
        weights: Weights,
        capacity: bool = False,
        node: int | None = None,
        parallel: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(case, weights)
        import moeify

        spread = {} if parallel is None else {"expert": self.ranks} | parallel
        experts = case.experts if spread else self.each
        plan = {
            "layers": [{"select": "all", "experts": experts, "top_k": case.top_k}],
            "router": {
                "capacity_factor": CAPACITY_FACTOR if capacity else None,
                "min_capacity": MIN_CAPACITY,
                "drop": "position",
                "combine": "normalized" if case.top_k > 1 else "probability",
            },
            "parallel": {"gradients": "none"} | spread,
        }
        torch.manual_seed(0)  # the same dense MLP on every rank
        model: Any = nn.Sequential(_Mlp(case.width, case.hidden))
        example = torch.zeros(case.tokens, case.width)
        with _ranks_per_node(node or self.ranks):
            moeify.moeify(model, plan, example_inputs=example, verify=False)
        self.block = model[0].train()
        with torch.no_grad():
            self.block.router.weight.copy_(weights.router if spread else weights.router[self.share])
            for parameter, whole in zip(
                self._experts(), (weights.gate_up, weights.down), strict=True
            ):
                _local(parameter).copy_(whole[self.share])

    def _experts(self) -> tuple[Tensor, Tensor]:
        return self.block.experts.gate_up_proj, self.block.experts.down_proj

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        return result

    def expert_gradients(self) -> tuple[Tensor, Tensor]:
        gate_up, down = (_local(parameter.grad) for parameter in self._experts())
        return gate_up, down


@contextlib.contextmanager
def _ranks_per_node(count: int) -> Any:
    name = "LOCAL_WORLD_SIZE"
    former = os.environ.get(name)
    os.environ[name] = str(count)
    try:
        yield
    finally:
        os.environ.pop(name) if former is None else os.environ.update({name: former})


def _local(tensor: Any) -> Tensor:
    found: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return found


class DeepSpeed(Layer):
    """DeepSpeed's `MoE` with `ep_size=N`; a module per expert of this rank."""

    def __init__(self, case: Case, weights: Weights, drop: bool) -> None:
        super().__init__(case, weights)
        with contextlib.redirect_stdout(io.StringIO()):
            start_deepspeed(case.device)
            self.moe = _module("deepspeed.moe.layer").MoE(
                case.width,
                _GateUpMlp(case.width, case.hidden),
                num_experts=case.experts,
                ep_size=self.ranks,
                k=case.top_k,
                capacity_factor=CAPACITY_FACTOR,
                min_capacity=MIN_CAPACITY,
                drop_tokens=drop,
                top2_2nd_expert_sampling=False,  # noise would make other outputs
            )
            self.moe.set_deepspeed_parallelism()
        inner: Any = self.moe.deepspeed_moe
        self.experts = list(inner.experts.deepspeed_experts)
        with torch.no_grad():
            inner.gate.wg.weight.copy_(weights.router)
            for expert, gate_up, down in zip(
                self.experts, weights.gate_up[self.share], weights.down[self.share], strict=True
            ):
                expert.gate_up.weight.copy_(gate_up)
                expert.down.weight.copy_(down)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x)[0]
        return out

    def expert_gradients(self) -> tuple[Tensor, Tensor]:
        gate_up = torch.stack([expert.gate_up.weight.grad for expert in self.experts])
        return gate_up, torch.stack([expert.down.weight.grad for expert in self.experts])


@dataclass(frozen=True)
class Contestant:
    """How to build a layer, and what to check about it."""

    # makes the layer; raises `benchmarks.peers.Refused` where it cannot
    build: Callable[[Case, Weights], Layer]
    drops: bool = False  # it has a capacity, and drops what exceeds it
    is_layer: bool = True  # it computes the layer; if not, it is there for comparison only


def _form(name: str, **options: Any) -> Callable[[Case, Weights], Layer]:
    parallel = {"all_to_all": name} | options.pop("parallel", {})
    return partial(Moeify, parallel=parallel, **options)


CONTESTANTS = {
    "plain": Contestant(Plain),
    "plain_loop": Contestant(PlainLoop),
    "wire": Contestant(Wire, is_layer=False),
    "moeify_local": Contestant(Moeify, is_layer=False),
    "moeify": Contestant(_form("flat")),
    "moeify_capacity": Contestant(_form("flat", capacity=True), drops=True),
    "moeify_allgather": Contestant(_form("allgather")),
    "moeify_allgather_capacity": Contestant(_form("allgather", capacity=True), drops=True),
    "moeify_hierarchical": Contestant(_form("hierarchical", node=2)),
    "moeify_overlap": Contestant(_form("flat", parallel={"overlap_chunks": 2})),
    "deepspeed": Contestant(partial(DeepSpeed, drop=True), drops=True),
    "deepspeed_dropless": Contestant(partial(DeepSpeed, drop=False)),
}
