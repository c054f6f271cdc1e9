"""Hugging Face models over ranks: sliced, sharded, compiled; equal to one process."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.sharding import whole
from tests.distributed.ranks import run_ranks
from tests.zoo_models import ZOO

BASE: dict[str, Any] = {
    "layers": [{"select": {"index": [0]}, "experts": 4, "top_k": 2}],
    "router": {"drop": "position", "capacity_factor": None, "aux_loss": 0.0},
    "init": {"experts": "noise", "noise_std": 0.5, "router_std": 0.3},
}
RESIDUAL = {"select": {"index": [0]}, "experts": 4, "top_k": 1, "residual": "coefficient"}


def tokens(ranks: int) -> torch.Tensor:
    return torch.randint(3, 98, (2 * ranks, 12), generator=torch.Generator().manual_seed(5))


def dense(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = ZOO[name].build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def step(model: nn.Module, part: torch.Tensor) -> torch.Tensor:
    return model(input_ids=part, labels=part, use_cache=False).loss


def compared(rank: int, name: str, made: dict[str, Any], compiled: bool) -> list[str]:
    parallel = made["parallel"]
    ranks = int(os.environ["WORLD_SIZE"]) // parallel.get("tensor", 1)
    place = rank // parallel.get("tensor", 1)
    parts = tokens(ranks).chunk(ranks)
    model = mf.moeify(dense(name), made).train()
    run: Any = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    loss = step(run, parts[place])
    loss.backward()
    want = torch.load(os.environ["WANT"])
    wrong = []
    if abs(float(loss) - want["losses"][place]) > 1e-5 * abs(want["losses"][place]):
        wrong.append(f"loss {float(loss)} {want['losses'][place]}")
    for key, parameter in model.named_parameters():
        grad, expected = whole(parameter.grad), want["grads"][key]
        gap = float((grad - expected).abs().max())
        if not gap <= 1e-5 * max(1.0, float(expected.abs().max())):
            wrong.append(f"{key}: {gap:.1e}")
    return wrong


def reference(name: str, made: dict[str, Any], ranks: int, path: str) -> None:
    single = {k: v for k, v in made.items() if k != "parallel"}
    model = mf.moeify(dense(name), single).train()
    losses = [step(model, part) for part in tokens(ranks).chunk(ranks)]
    (sum(losses) / ranks).backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    torch.save({"losses": [float(x) for x in losses], "grads": grads}, path)


def check(tmp_path, name, world, compiled=False, layers=(), router=(), **parallel):
    made = {**BASE, "layers": [*BASE["layers"], *layers], "parallel": parallel}
    made["router"] = {**BASE["router"], **dict(router)}
    path = str(tmp_path / "want.pt")
    reference(name, made, world // parallel.get("tensor", 1), path)
    assert run_ranks(compared_at, world, path, name, made, compiled) == [[]] * world


def compared_at(rank: int, path: str, *args: Any) -> list[str]:
    os.environ["WANT"] = path
    return compared(rank, *args)


@pytest.mark.parametrize(
    ("name", "world", "parallel"),
    [
        ("llama", 2, {"expert": 2, "all_to_all": "flat"}),
        ("gpt2", 4, {"expert": 2, "layers": [RESIDUAL]}),
        ("llama", 4, {"expert": 2, "tensor": 2, "all_to_all": "flat"}),
        ("llama", 4, {"expert": 2, "tensor": 2, "experts_in_tp": "slice"}),
        ("llama", 2, {"tensor": 2, "experts_in_tp": "slice", "layers": [RESIDUAL]}),
        ("mistral", 4, {"expert": 4, "tensor": 2, "experts_in_tp": "fold", "all_to_all": "flat"}),
    ],
)
def test_gradients(tmp_path, name, world, parallel):
    check(tmp_path, name, world, **parallel)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        (2, {"expert": 2, "all_to_all": "flat"}),
        (2, {"expert": 2, "all_to_all": "flat", "router": {"capacity_factor": 1.0}}),
        (2, {"expert": 2, "all_to_all": "allgather"}),
        (4, {"expert": 2, "tensor": 2, "all_to_all": "flat"}),
    ],
)
def test_compiled_in_one_graph(tmp_path, world, parallel):
    check(tmp_path, "llama", world, compiled=True, **parallel)
