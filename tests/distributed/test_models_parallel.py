"""Hugging Face models over ranks: sliced, sharded, compiled; equal to one process."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import moeify as mf
from moeify.distributed.dtensor import whole
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import WIDTH
from tests.distributed.test_experts_parallel import dense as net
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
    torch.save({"losses": [float(x.detach()) for x in losses], "grads": grads}, path)


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
@pytest.mark.thin(2)
def test_gradients(tmp_path, name, world, parallel):
    check(tmp_path, name, world, **parallel)


@pytest.mark.parametrize(
    ("world", "parallel"),
    [
        pytest.param(2, {"expert": 2, "all_to_all": "allgather"}, marks=pytest.mark.slow),
        (4, {"expert": 2, "tensor": 2, "all_to_all": "flat"}),
    ],
)
def test_compiled_in_one_graph(tmp_path, world, parallel):
    check(tmp_path, "llama", world, compiled=True, **parallel)


def _lengths(rank: int, made: dict[str, Any], name: str, backend: str) -> tuple[int, list[str]]:
    generator = torch.Generator().manual_seed(rank)

    def part(length: int) -> torch.Tensor:
        if name == "net":
            return torch.randn(2 * length, WIDTH, generator=generator)
        return torch.randint(3, 98, (2, length), generator=generator)

    def loss(model: Any, x: torch.Tensor) -> torch.Tensor:
        return step(model, x) if name == "llama" else model(x).square().mean()

    inputs = {"example_inputs": torch.ones(4, WIDTH)} if name == "net" else {}
    model = mf.moeify(net() if name == "net" else dense(name), made, **inputs).train()
    clone = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(model, fullgraph=True, backend=counter)
    wrong = []
    for length in (12, 19, 7, 30):
        x = part(length)
        compiled, eager = loss(run, x), loss(clone, x)
        if abs(float(compiled) - float(eager)) > 1e-5:
            wrong.append(f"{length}: {float(compiled)} and not {float(eager)}")
        compiled.backward(), eager.backward()
    for (key, parameter), other in zip(model.named_parameters(), clone.parameters(), strict=True):
        gap = float((whole(parameter.grad) - whole(other.grad)).abs().max())
        if gap > 1e-5:
            wrong.append(f"{key}: {gap:.1e}")
    return counter.frame_count, wrong


@pytest.mark.parametrize(
    ("name", "backend", "router"),
    [
        ("llama", "aot_eager", {}),
        pytest.param("llama", "aot_eager", {"capacity_factor": 1.0}, marks=pytest.mark.slow),
        pytest.param("net", "inductor", {}, marks=pytest.mark.slow),
    ],
)
def test_other_lengths_do_not_recompile(name, backend, router):
    parallel = {"expert": 2, "all_to_all": "flat"}
    made = {**BASE, "router": {**BASE["router"], **router}, "parallel": parallel}
    for frames, wrong in run_ranks(_lengths, 2, made, name, backend):
        assert not wrong
        assert frames <= 2


def _again(rank: int, made: dict[str, Any]) -> list[str]:
    """Compare with itself under activation checkpointing, and autocast loosely."""
    model = mf.moeify(dense("llama"), made).train()
    clone = copy.deepcopy(model)
    clone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    part = tokens(2).chunk(2)[rank]
    for each in (model, clone):
        step(each, part).backward()
    assert mf.router_stats(clone)["model.layers.0.mlp"]["tokens"] == 2 * part.numel()
    wrong = []
    for (name, parameter), other in zip(model.named_parameters(), clone.parameters(), strict=True):
        if not torch.equal(whole(parameter.grad), whole(other.grad)):
            wrong.append(name)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = step(clone, part)
    if abs(float(mixed) - float(step(model, part))) > 2e-2:
        wrong.append("autocast")
    mixed.backward()
    return wrong


@pytest.mark.parametrize("way", ["flat", "allgather"])
def test_checkpointing_and_autocast(way):
    made = {**BASE, "parallel": {"expert": 2, "all_to_all": way}}
    made["router"] = {**BASE["router"], "aux_loss": 0.01, "capacity_factor": 1.0}
    assert run_ranks(_again, 2, made) == [[], []]


def _generate(rank: int, made: dict[str, Any]) -> list[int]:
    model = mf.moeify(dense("llama"), made).eval()
    prompt = tokens(2).chunk(2)[rank][:, :5]
    return model.generate(prompt, max_new_tokens=6, do_sample=False).flatten().tolist()


@pytest.mark.parametrize("parallel", [{"expert": 2}, {"expert": 1, "tensor": 2}])
def test_generate(parallel):
    made = {**BASE, "parallel": parallel}
    single = mf.moeify(dense("llama"), BASE).eval()
    prompts = [part[:, :5] for part in tokens(2).chunk(2)]
    if "tensor" in parallel:
        assert (
            run_ranks(_generate_first, 2, made)
            == [single.generate(prompts[0], max_new_tokens=6, do_sample=False).flatten().tolist()]
            * 2
        )
        return
    want = [
        single.generate(p, max_new_tokens=6, do_sample=False).flatten().tolist() for p in prompts
    ]
    assert run_ranks(_generate, 2, made) == want


def _generate_first(rank: int, made: dict[str, Any]) -> list[int]:
    return _generate(0, made)


def _copied(rank: int, made: dict[str, Any]) -> list[str]:
    """Norms within slices have partial gradients, which a copy must sum as well."""
    model = mf.moeify(dense("qwen3"), made).train()
    part = tokens(1)
    clone = copy.deepcopy(model)
    clone.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    for each in (model, clone):
        step(each, part).backward()
    names = [name for name, _ in model.named_parameters() if "q_norm" in name]
    assert names
    return [
        name
        for (name, parameter), other in zip(
            model.named_parameters(), clone.parameters(), strict=True
        )
        if not torch.allclose(whole(parameter.grad), whole(other.grad), atol=1e-7)
    ]


def test_copies_of_slices_sum_their_norms():
    made = {**BASE, "parallel": {"expert": 1, "tensor": 2}}
    assert run_ranks(_copied, 2, made) == [[], []]
