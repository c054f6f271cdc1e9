"""The contestants of `benchmarks.zero`: one small language model, trained by AdamW over all ranks.

Each keeps what its engine leaves on this rank, and trains on this rank's [B, S] token ids. In the
MoE layers, every second one, routes over the capacity are dropped, by moeify by position, and the
balance loss is added with weight 0.01.

Shapes: B sequences of a rank, S their length, T = B * S tokens, D model width, F hidden width of an
MLP and of an expert, V vocabulary, E experts, K top-k, N ranks.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.case import CAPACITY_FACTOR, MIN_CAPACITY
from benchmarks.peers import _module

LEARNING_RATE, BALANCE = 1e-3, 0.01
BUCKET = 2**23


@dataclass(frozen=True)
class Sizes:
    """One model and one load."""

    layers: int  # transformer layers; each second one becomes MoE
    width: int  # D
    hidden: int  # F
    vocabulary: int  # V
    sequences: int  # B
    length: int  # S
    experts: int  # E
    top_k: int  # K
    expert_ranks: int  # ranks that share the experts of a layer
    ranks: int  # N

    @property
    def key(self) -> str:
        """Name of the case in a file of results."""
        return " ".join(f"{name}={value}" for name, value in asdict(self).items())

    def ids(self, rank: int) -> Tensor:
        """Return a rank's token ids [B, S]."""
        generator = torch.Generator().manual_seed(rank)
        return torch.randint(self.vocabulary, (self.sequences, self.length), generator=generator)


class Layer(nn.Module):
    """A transformer layer with a plain MLP."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.heads = max(width // 64, 1)
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp: nn.Module = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.mlp(self.mlp_norm(x))
        return out


class Language(nn.Module):
    """A small dense language model: ids [B, S] to logits [B, S, V]."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        self.places = nn.Embedding(sizes.length, sizes.width)
        self.layers = nn.ModuleList(Layer(sizes.width, sizes.hidden) for _ in range(sizes.layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def dense(sizes: Sizes) -> Language:
    """Return the dense model, the same on every rank."""
    torch.manual_seed(0)
    return Language(sizes)


class Trainer:
    """A contestant on this rank: a model, its optimizer, and one batch."""

    model: Any
    optimizer: Any

    def __init__(self, sizes: Sizes) -> None:
        self.sizes = sizes
        self.ids = sizes.ids(dist.get_rank())

    def balance(self) -> Tensor | float:
        """Return the weighted balance loss of the last forward pass."""
        return 0.0

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def gradients(self) -> float:
        """Run forward and backward; return this rank's loss without the balance loss."""
        logits = self.model(self.ids)
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten())
        self.backward(loss + self.balance())
        return float(loss.detach())

    def backward(self, loss: Any) -> None:
        loss.backward()

    def update(self) -> None:
        """Run the optimizer."""
        self.optimizer.step()

    def states(self) -> list[Tensor]:
        """Return what the optimizer keeps, with weights of its own."""
        owned = [p for group in self.optimizer.param_groups for p in group["params"]]
        model = {id(parameter) for parameter in self.model.parameters()}
        kept = [value for state in self.optimizer.state.values() for value in state.values()]
        masters = [p for p in owned if id(p) not in model]
        return [value for value in (*kept, *masters) if isinstance(value, Tensor)]

    def kept_gradients(self) -> list[Tensor]:
        """Return what a backward pass leaves."""
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def planned(self) -> dict[str, float]:
        """Return what the engine itself expects the fullest rank to hold, in MB; may be empty."""
        return {}


class Moeify(Trainer):
    """A model converted by `moeify.moeify`, with `moeify.optimizer`."""

    def __init__(self, sizes: Sizes, zero: dict[str, Any]) -> None:
        super().__init__(sizes)
        import moeify

        plan = plan_of(sizes, zero)
        self.model = moeify.moeify(dense(sizes), plan, example_inputs=self.ids).train()
        self.optimizer = moeify.optimizer(self.model, torch.optim.AdamW, lr=LEARNING_RATE)
        self._balance = moeify.aux_loss

    def balance(self) -> Tensor:
        return self._balance(self.model)

    def planned(self) -> dict[str, float]:
        from moeify.sites.record import require_conversion

        zero: Any = require_conversion(self.model).parallel.zero
        if zero is None:
            return {}
        kinds = list(zero.memory(states=2).values())
        names = {"parameters": "parameters", "states": "optimizer", "gradients": "gradients"}
        return {
            name: sum(getattr(kind, field) for kind in kinds) / 1e6 for name, field in names.items()
        }


def plan_of(sizes: Sizes, zero: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of the contestants, at a setting of `zero`."""
    select = {"every": 2, "start": 1}
    return {
        "layers": [{"select": select, "experts": sizes.experts, "top_k": sizes.top_k}],
        "router": {
            "capacity_factor": CAPACITY_FACTOR,
            "min_capacity": MIN_CAPACITY,
            "drop": "position",
            "balance": "first",
            "aux_loss": BALANCE,
            "combine": "normalized" if sizes.top_k > 1 else "probability",
        },
        "parallel": {"expert": sizes.expert_ranks},
        "zero": zero,
    }


class Dense(Trainer):
    """The dense model under plain FSDP2, a unit per layer."""

    def __init__(self, sizes: Sizes, reshard: bool) -> None:
        super().__init__(sizes)
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (sizes.ranks,))
        self.model = dense(sizes)
        for module in (*self.model.layers, self.model):
            wrapped: Any = fully_shard(module, mesh=mesh, reshard_after_forward=reshard)
            wrapped.set_gradient_divide_factor(float(sizes.ranks))
            wrapped.set_force_sum_reduction_for_comms(True)  # gloo has no average
        # `foreach` is what moeify's optimizer chooses for pieces, too.
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, foreach=True)


class DeepSpeed(Trainer):
    """DeepSpeed's engine around a model with its own `MoE` layers, a module per expert."""

    def __init__(self, sizes: Sizes, stage: int) -> None:
        super().__init__(sizes)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed, moe = _module("deepspeed"), _module("deepspeed.moe.layer")
            groups = _module("deepspeed.moe.utils")
            deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
            model, self.layers = dense(sizes), []
            sparse: Any = model.layers[1::2]
            for layer, router in zip(sparse, _routers(sizes), strict=True):
                layer.mlp = _DeepSpeedMoE(moe.MoE, layer.mlp, sizes, router)
                self.layers.append(layer.mlp)
            parameters = {"params": list(model.parameters()), "name": "all"}
            split = groups.split_params_into_different_moe_groups_for_optimizer(parameters)
            self.model, self.optimizer, _, _ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.AdamW(split, lr=LEARNING_RATE),
                config={
                    "train_micro_batch_size_per_gpu": sizes.sequences,
                    # By default its buckets hold 5e8 elements, 2 GB; these hold this whole model.
                    "zero_optimization": {
                        "stage": stage,
                        "reduce_bucket_size": BUCKET,
                        "allgather_bucket_size": BUCKET,
                    },
                    "steps_per_print": 2**31,
                },
            )

    def balance(self) -> Tensor:
        return BALANCE * sum((layer.balance for layer in self.layers), torch.zeros(()))

    def clear(self) -> None:
        pass  # `update` does it

    def backward(self, loss: Any) -> None:
        self.model.backward(loss)

    def update(self) -> None:
        self.model.step()

    def kept_gradients(self) -> list[Tensor]:
        lists = self.optimizer.averaged_gradients.values()
        return super().kept_gradients() + [part for parts in lists for part in parts or ()]


class _DeepSpeedMoE(nn.Module):
    def __init__(self, kind: Any, mlp: nn.Module, sizes: Sizes, router: Tensor) -> None:
        super().__init__()
        self.moe = kind(
            sizes.width,
            copy.deepcopy(mlp),
            num_experts=sizes.experts,
            ep_size=sizes.expert_ranks,
            k=sizes.top_k,
            capacity_factor=CAPACITY_FACTOR,
            min_capacity=MIN_CAPACITY,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        with torch.no_grad():
            self.moe.deepspeed_moe.gate.wg.weight.copy_(router)
        self.balance = torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        out, self.balance, _ = self.moe(x)
        return out  # type: ignore[no-any-return]


def _routers(sizes: Sizes) -> list[Tensor]:
    """Return the weights [E, D] that moeify gives its routers."""
    import moeify
    from moeify.sites.record import routers_of

    plan = plan_of(sizes, {"stage": 0})
    model = moeify.moeify(dense(sizes), plan, example_inputs=sizes.ids(0), verify=False)
    return [router.weight.detach().clone() for _, router in routers_of(model)]


@dataclass(frozen=True)
class Contestant:
    """How to build a trainer, and what to compare it with."""

    build: Callable[[Sizes], Trainer]  # makes it; raises where it cannot run
    same: str | None = None  # contestant whose losses it must have, or None
    steps: int = 1  # how many of them: one if it only starts alike
    tolerance: float = 1e-4  # how far they may be apart, relative


def _moeify(stage: int, engine: str = "fsdp2") -> Contestant:
    build = partial(Moeify, zero={"stage": stage, "engine": engine})
    return Contestant(build, None if stage == 0 else "moeify_0", steps=3)


# Without random selection it drops as many routes, but `topk` over ones and zeros says which.
_deepspeed = partial(Contestant, same="moeify_0", tolerance=1e-3)

CONTESTANTS = {
    "fsdp2_3_dense": Contestant(partial(Dense, reshard=True)),
    "fsdp2_2_dense": Contestant(partial(Dense, reshard=False), "fsdp2_3_dense", steps=3),
    "moeify_0": _moeify(0),
    "moeify_1": _moeify(1),
    "moeify_2": _moeify(2),
    "moeify_3": _moeify(3),
    "moeify_2_graph": _moeify(2, "graph"),
    "moeify_3_graph": _moeify(3, "graph"),
    "deepspeed_1": _deepspeed(partial(DeepSpeed, stage=1)),
    "deepspeed_2": _deepspeed(partial(DeepSpeed, stage=2)),
}
