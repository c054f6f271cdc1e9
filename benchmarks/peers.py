"""The contestants: one MoE layer written by different people, over one set of weights.

Every contestant is a `Layer` that reads the shared weights (the layout of Hugging Face), maps
[T, D] to [T, D] and routes by softmax top-k: normalised for K >= 2, the probability for K = 1.
Peers run as their users run them. A peer that is not installed or does not support a case raises
`Refused`, and the reason is kept with the results. Formulations with a capacity drop tokens, which
is less work, so their drops are reported next to their time.

Shapes: T tokens, D model width, F expert width, E experts, K top-k, R = T * K rows, C capacity.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import CAPACITY_FACTOR, MIN_CAPACITY, Case, Weights
from benchmarks.machine import available_bytes

MOST_TRAFFIC = {"cpu": 60e9, "cuda": 2e12}


class Refused(Exception):
    """A contestant cannot, or should not, run a case; the message says why."""


class Layer(nn.Module):
    """A contestant; `bind` gives it other weights without building it again."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__()
        self.case = case
        trains = case.trains
        for name, tensor in self.shared(weights).items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=trains))
        self.train(trains)

    def shared(self, weights: Weights) -> dict[str, Tensor]:
        """Return what this layer reads, by the name of its own parameter."""
        return {"router": weights.router, "gate_up": weights.gate_up, "down": weights.down}

    def bind(self, weights: Weights) -> None:
        for name, tensor in self.shared(weights).items():
            self.get_parameter(name).data = tensor

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return combine weights [T, K] float32 and experts [T, K] int64 of tokens [T, D]."""
        scores = F.linear(x, self.get_parameter("router")).float().softmax(-1)
        chosen, ids = scores.topk(self.case.top_k, -1)
        if self.case.top_k > 1:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return chosen, ids

    def sort(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the routes by expert [R] and the end of each expert's rows [E] int32."""
        flat = ids.flatten()
        counts = torch.bincount(flat, minlength=self.case.experts)
        return flat.argsort(stable=True), counts.cumsum(0).to(torch.int32)


class Dense(Layer):
    """The MLP that a token's K experts equal in size: the practical limit."""

    def shared(self, weights: Weights) -> dict[str, Tensor]:
        return {"gate_up": weights.dense_gate_up, "down": weights.dense_down}

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.linear(x, self.get_parameter("gate_up")).chunk(2, -1)
        return self.linear(F.silu(gate) * up, self.get_parameter("down"))


class DenseOneDNN(Dense):
    """The same through oneDNN, which `F.linear` does not use for float32."""

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = _OneDNNLinear.apply(x, weight)  # type: ignore[no-untyped-call]
        return result


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return _onednn(grads[0], weight.t()), _onednn(grads[0].t(), x.t())


def _onednn(x: Tensor, weight: Tensor) -> Tensor:
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return result


class Einsum(Layer):
    """GShard's formulation: one-hot masks [T, E, C], dispatch and combine as einsums."""

    def forward(self, x: Tensor) -> Tensor:
        combine = einsum_gate(*self.route(x), self.case.experts, self.case.capacity).to(x.dtype)
        rows = torch.einsum("tec,td->ecd", (combine != 0).to(x.dtype), x)
        gate, up = torch.bmm(rows, self.get_parameter("gate_up").mT).chunk(2, -1)
        out = torch.bmm(F.silu(gate) * up, self.get_parameter("down").mT)
        return torch.einsum("tec,ecd->td", combine, out)


def einsum_gate(weights: Tensor, ids: Tensor, experts: int, capacity: int) -> Tensor:
    """Return the combine tensor [T, E, C] of combine weights [T, K] and experts [T, K]."""
    combine = weights.new_zeros(ids.shape[0], experts, capacity)
    taken = ids.new_zeros(experts)
    for weight, chosen in zip(weights.unbind(1), ids.unbind(1), strict=True):
        mask = F.one_hot(chosen, experts)
        place = ((mask.cumsum(0) - 1 + taken) * mask).sum(1)
        taken = taken + mask.sum(0)
        slot = F.one_hot(place.clamp_max(capacity - 1), capacity).to(weight.dtype)
        kept = (weight * (place < capacity))[:, None] * mask
        combine = combine + torch.einsum("te,tc->tec", kept, slot)
    return combine


class GroupedMm(Layer):
    """Sort, `F.grouped_mm` twice, scatter back: what torch alone offers."""

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        order, ends = self.sort(ids)
        source = order // self.case.top_k
        hidden = F.grouped_mm(x[source], self.get_parameter("gate_up").mT, offs=ends)
        gate, up = hidden.chunk(2, -1)
        out = F.grouped_mm(F.silu(gate) * up, self.get_parameter("down").mT, offs=ends)
        out = out * weights.flatten()[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, source, out)


class Moeify(Layer):
    """A converted MLP, as `moeify.moeify` returns it, dropless."""

    def __init__(self, case: Case, weights: Weights, kernel: str = "auto") -> None:
        super().__init__(case, weights)
        import moeify

        # On a CPU nothing need be allocated to be replaced; elsewhere the device decides the code.
        device = "meta" if case.device == "cpu" else case.device
        with torch.device(device):
            mlp = _Mlp(case.width, case.hidden).to(case.torch_dtype)
            example = torch.zeros(2, case.width, dtype=case.torch_dtype)
        combine = "normalized" if case.top_k > 1 else "probability"
        rule = {"select": "all", "experts": case.experts, "top_k": case.top_k, "kernel": kernel}
        plan = {"layers": [rule], "router": {"capacity_factor": None, "combine": combine}}
        model = nn.Sequential(mlp)
        converted: Any = moeify.moeify(model, plan, example_inputs=example, verify=False)
        block = converted[0]
        block.router.weight = self.router
        block.experts.gate_up_proj, block.experts.down_proj = self.gate_up, self.down
        self.block = block.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(x)
        return result


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return result


class HuggingFace(Layer):
    """transformers' Qwen3-MoE block with one of its experts implementations."""

    def __init__(self, case: Case, weights: Weights, implementation: str) -> None:
        super().__init__(case, weights)
        qwen = _module("transformers.models.qwen3_moe.modeling_qwen3_moe")
        config = _module("transformers").Qwen3MoeConfig(
            hidden_size=case.width,
            moe_intermediate_size=case.hidden,
            num_experts=case.experts,
            num_experts_per_tok=case.top_k,
            norm_topk_prob=case.top_k > 1,
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            block = qwen.Qwen3MoeSparseMoeBlock(config)
        block.gate.weight = self.router
        block.experts.gate_up_proj, block.experts.down_proj = self.gate_up, self.down
        self.block = block.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x[None])
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out.view(x.shape)


class DeepSpeed(Layer):
    """DeepSpeed's `MoE` in a group of one; a module per expert, each a view of the weights."""

    def __init__(self, case: Case, weights: Weights, drop: bool) -> None:
        nn.Module.__init__(self)
        self.case = case
        start_deepspeed(case.device)
        trains = case.trains
        with torch.device("meta"):
            self.moe = _module("deepspeed.moe.layer").MoE(
                case.width,
                _GateUpMlp(case.width, case.hidden),
                num_experts=case.experts,
                k=case.top_k,
                capacity_factor=CAPACITY_FACTOR,
                eval_capacity_factor=CAPACITY_FACTOR,
                min_capacity=MIN_CAPACITY,
                drop_tokens=drop,
                top2_2nd_expert_sampling=False,  # noise would make other outputs
            )
        self.moe.set_deepspeed_parallelism()
        inner = self.moe.deepspeed_moe
        self.experts = list(inner.experts.deepspeed_experts)
        inner.gate.wg.weight = nn.Parameter(weights.router.float(), requires_grad=trains)
        for i, expert in enumerate(self.experts):
            expert.gate_up.weight = nn.Parameter(weights.gate_up[i], requires_grad=trains)
            expert.down.weight = nn.Parameter(weights.down[i], requires_grad=trains)
        self.train(trains)

    def bind(self, weights: Weights) -> None:
        self.moe.deepspeed_moe.gate.wg.weight.data = weights.router.float()
        for i, expert in enumerate(self.experts):
            expert.gate_up.weight.data = weights.gate_up[i]
            expert.down.weight.data = weights.down[i]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.moe(x)[0]
        return out


class _GateUpMlp(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        out: Tensor = self.down(F.silu(gate) * up)
        return out


def start_deepspeed(device: str) -> None:
    """Open DeepSpeed's process group of one, once."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # 0.18's helpers fail to compile
    comm = _module("deepspeed.comm")
    if not torch.distributed.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    comm.init_distributed(auto_mpi_discovery=False, verbose=False)


class Liger(Layer):
    """Liger's fused MoE in Triton."""

    def forward(self, x: Tensor) -> Tensor:
        function = _module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
        weights, ids = self.route(x)
        gate_up, down = self.get_parameter("gate_up"), self.get_parameter("down")
        out: Tensor = function.apply(x, gate_up, down, ids, weights.to(x.dtype))
        return out


class ScatterMoE(Layer):
    """ScatterMoE's GLU MLP, whose gate is the second half of the first projection."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__(case, weights)
        mlp = _module("scattermoe.mlp")
        with torch.device("meta"):
            self.mlp = mlp.GLUMLP(case.width, case.hidden, case.experts, case.top_k)
        self.mlp.experts.weight, self.mlp.output_experts.weight = self.gate_up, self.down

    def shared(self, weights: Weights) -> dict[str, Tensor]:
        gate, up = weights.gate_up.chunk(2, 1)
        return super().shared(weights) | {"gate_up": torch.cat([up, gate], 1)}

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.route(x)
        out: Tensor = self.mlp(x, weights.to(x.dtype), ids)
        return out


@dataclass(frozen=True)
class Contestant:
    """How to build a layer, and what to know about it."""

    build: Callable[[Case, Weights], Layer]  # makes the layer, or raises `Refused`
    devices: tuple[str, ...] = ("cpu", "cuda")  # where it runs
    compiled: bool = False  # run through `torch.compile`
    graphed: bool = False  # captured as a CUDA graph and replayed, forward only
    drops: bool = False  # it has a capacity, and drops what exceeds it
    # bytes that a step takes beyond the weights, roughly, to skip what cannot fit
    needs: Callable[[Case], float] = lambda case: 0
    # bytes that a step moves without need, roughly, to skip what takes minutes
    traffic: Callable[[Case], float] = lambda case: 0

    def layer(self, case: Case, weights: Weights) -> Layer:
        """Build the layer.

        Raises:
            Refused: It is not installed, not for this device, or would not fit or not end.
        """
        if case.device not in self.devices:
            raise Refused(f"runs on {' and '.join(self.devices)} only")
        if self.graphed and case.trains:
            raise Refused("CUDA graphs are captured of the forward only")
        need, free = self.needs(case), available_bytes(case.device)
        if need > 0.5 * free:
            raise Refused(f"a step takes about {need / 1e9:.0f} GB; {free / 1e9:.0f} GB are free")
        if (traffic := self.traffic(case)) > MOST_TRAFFIC[case.device]:
            raise Refused(f"its backward moves about {traffic / 1e9:.0f} GB")
        return self.build(case, weights)


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise Refused(f"{package} is not installed or does not load: {error}") from None


def _masks(case: Case) -> float:
    return 4.0 * case.tokens * case.experts * case.capacity * (6 if case.trains else 3)


def _gathered(case: Case) -> float:
    return float(case.rows * case.expert_bytes * (3 if case.trains else 1))


def _gradient_stacks(case: Case) -> float:
    """An expert that is indexed out of a stack gets a gradient as large as the stack."""
    used = min(case.experts, case.rows) if case.trains else 0
    return float(used * case.experts * case.expert_bytes)


_HF_EAGER = partial(HuggingFace, implementation="eager")
_HF_BATCHED = partial(HuggingFace, implementation="batched_mm")
_HF_GROUPED = partial(HuggingFace, implementation="grouped_mm")
_CPU, _CUDA = ("cpu",), ("cuda",)

CONTESTANTS = {
    "dense": Contestant(Dense),
    "dense_onednn": Contestant(DenseOneDNN, devices=_CPU),
    "dense_compiled": Contestant(Dense, compiled=True),
    "moeify": Contestant(Moeify),
    "moeify_compiled": Contestant(Moeify, compiled=True),
    "moeify_reference": Contestant(partial(Moeify, kernel="reference")),
    "moeify_triton": Contestant(partial(Moeify, kernel="triton"), devices=_CUDA),
    "moeify_grouped_mm": Contestant(partial(Moeify, kernel="grouped_mm"), devices=_CUDA),
    "einsum": Contestant(Einsum, drops=True, needs=_masks),
    "hf_eager": Contestant(_HF_EAGER, traffic=_gradient_stacks),
    "hf_batched": Contestant(_HF_BATCHED, needs=_gathered),
    "hf_batched_compiled": Contestant(_HF_BATCHED, compiled=True, needs=_gathered),
    "hf_grouped": Contestant(_HF_GROUPED),
    "hf_grouped_compiled": Contestant(_HF_GROUPED, compiled=True),
    "grouped_mm": Contestant(GroupedMm),
    "deepspeed": Contestant(partial(DeepSpeed, drop=True), drops=True),
    "deepspeed_dropless": Contestant(partial(DeepSpeed, drop=False)),
    "liger": Contestant(Liger, devices=_CUDA),
    "scattermoe": Contestant(ScatterMoE, devices=_CUDA),
    "dense_graphed": Contestant(Dense, devices=_CUDA, graphed=True),
    "moeify_graphed": Contestant(Moeify, devices=_CUDA, graphed=True),
    "hf_grouped_graphed": Contestant(_HF_GROUPED, devices=_CUDA, graphed=True),
    "liger_graphed": Contestant(Liger, devices=_CUDA, graphed=True),
}
