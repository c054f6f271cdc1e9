"""ZeRO: five AdamW steps equal one process, and every rank holds the bytes that the plan says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.distributed.dtensor import whole
from moeify.kernels.route import route
from moeify.sites.record import conversion_of, routers_of
from moeify.zero.plan import ZeroPlan
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import WIDTH, batches, dense, mean_square, plan

STEPS = 5
# Adam divides noise by noise where a gradient is next to zero, unless eps is above it.
ADAM = {"lr": 3e-3, "weight_decay": 0.1, "eps": 1e-5}
SCHEMES: dict[str, dict[str, Any]] = {
    "E+Z": {"expert": 4},
    "E+D+Z": {"expert": 2},
    "E+Z-Off+M": {"expert": 2, "tensor": 2, "experts_in_tp": "slice", "offload": True},
}


def plan_of(scheme: str, **zero: Any) -> dict[str, Any]:
    parallel = dict(SCHEMES[scheme])
    if parallel.pop("offload", False) and zero.get("engine") != "graph":
        zero["offload"] = "all" if zero["stage"] == 3 else "optimizer"
    return plan(**parallel) | {"zero": zero}


def reference(made: dict[str, Any], counts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """One process on the mean of the ranks' losses, router losses over all tokens together."""
    single = {k: v for k, v in made.items() if k not in ("parallel", "zero")}
    model = mf.moeify(dense(), single, example_inputs=torch.ones(4, WIDTH)).train()
    optimizer = mf.optimizer(model, torch.optim.AdamW, **ADAM)
    seen: dict[Any, list[torch.Tensor]] = {router: [] for _, router in routers_of(model)}
    for router, tokens in seen.items():
        router.register_forward_pre_hook(lambda _, args, kept=tokens: kept.append(args[0]))
    for _ in range(STEPS):
        loss = sum(mean_square(model(x)) for x in batches(counts)) / len(counts)
        for router, tokens in seen.items():
            together = torch.cat(tokens)
            tokens.clear()
            found = route(together, router.weight, top_k=router.top_k, capacity=len(together))
            loss = loss + router.aux_loss * found.aux_loss + router.z_loss * found.z_loss
        loss.backward()
        mf.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def size(tensors: Any) -> int:
    return sum(local(t).numel() * t.element_size() for t in tensors if t.dim() > 0)


def held(model: nn.Module, optimizer: Any) -> dict[str, tuple[int, int, int]]:
    """Count this rank's bytes of parameters, gradients and optimizer state."""
    named = dict(model.named_parameters())
    inner = getattr(optimizer, "inner", optimizer)
    owner = {id(p): name for name, p in named.items()}
    if inner is not optimizer:
        owner = {id(optimizer.shard_of(p)): name for name, p in named.items()}
    found = {}
    for kind in ("dense", "expert"):
        ours = {n: p for n, p in named.items() if (".experts." in n) == (kind == "expert")}
        states = [
            value
            for shard, state in inner.state.items()
            if owner[id(shard)] in ours
            for value in state.values()
        ]
        if getattr(optimizer, "has_masters", False):
            states += [optimizer.shard_of(p) for p in ours.values()]
        gradients = [p.grad for p in ours.values() if p.grad is not None]
        found[kind] = (size(ours.values()), size(gradients), size(states))
    return found


def predicted(zero: ZeroPlan, model: nn.Module) -> dict[str, tuple[int, int, int]]:
    record = conversion_of(model)
    layout = record.parallel.layout
    dp = record.parallel.rank // layout.tensor
    places = {"dense": dp, "expert": dp if layout.expert == 1 else dp // layout.expert}
    made = {}
    for kind, place in places.items():
        memory = zero.memory(rank=place)[kind]
        made[kind] = (memory.parameters, memory.gradients, memory.optimizer)
    return made


def trained(
    rank: int, cases: list[dict[str, Any]], counts: tuple[int, ...], want: dict[str, torch.Tensor]
) -> list[str]:
    wrong = []
    for made in cases:
        torch.manual_seed(rank)
        title = str(made["zero"])
        place = rank // made["parallel"].get("tensor", 1)
        model = mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH)).train()
        optimizer = mf.optimizer(model, torch.optim.AdamW, **ADAM)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = mean_square(model(batches(counts)[place])) + mf.aux_loss(model)
            loss.backward()
            mf.clip_grad_norm_(model, 0.5)
            optimizer.step()
        for name, parameter in model.named_parameters():
            gap = float((whole(parameter).detach() - want[name]).abs().max())
            if not gap <= 1e-5:
                wrong.append(f"{title} {name}: {gap:.1e}")
        zero = conversion_of(model).parallel.zero
        counted, forecast = held(model, optimizer), predicted(zero, model)
        for kind, sizes in counted.items():
            for what, number, expected in zip(
                ("parameters", "gradients", "optimizer"), sizes, forecast[kind], strict=True
            ):
                if abs(number - expected) > 0.02 * expected:
                    wrong.append(f"{title} {kind} {what}: {number} bytes, not {expected}")
    return wrong


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.thin(2)
def test_numbers_and_bytes(scheme):
    stages = [{"stage": stage} for stage in range(0 if scheme == "E+D+Z" else 1, 4)]
    stages += [{"stage": stage, "engine": "graph"} for stage in (2, 3)]
    cases = [plan_of(scheme, **zero) for zero in stages]
    counts = (6, 3, 0, 5)[: 4 // cases[0]["parallel"].get("tensor", 1)]
    want = reference(cases[0], counts)
    assert run_ranks(trained, 4, cases, counts, want) == [[]] * 4
