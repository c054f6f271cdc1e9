"""Experts over ranks: a converted GPT-2 trained on one process or on four, with the same losses.

    python examples/train_expert_parallel.py
    torchrun --nproc-per-node 4 examples/train_expert_parallel.py

Of the four ranks each pair shares the experts, and the two pairs are replicas; everything else is
replicated four times. Each rank trains on its quarter of the batch. The loop is the same for one
process: `loss.backward()` leaves reduced gradients behind. The plan drops no routes, because a
capacity would be each rank's own, and the text is Python's own library, so nothing is downloaded.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from moeify import moeify, router_stats
from moeify.cli.demo.data import load_text

LENGTH, BATCH, STEPS = 64, 16, 20
PLAN = {
    "layers": [{"select": {"every": 2, "start": 1}, "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None, "aux_loss": 0.02},
    "init": {"experts": "noise"},
}
EXPERT_RANKS = 2


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)  # the same dense model on every rank
    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 256, "n_positions": LENGTH}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # each rank draws its own
    others = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **others))


def read_text() -> Tensor:
    pairs = load_text().train
    text = "\n".join(f"{signature}\n    {description}\n" for signature, description in pairs)
    return torch.tensor(list(text.encode()))


def mean_over_ranks(value: Tensor) -> float:
    value = value.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return float(value)


def train(rank: int, world: int) -> None:
    model = build()
    plan = PLAN if world == 1 else PLAN | {"parallel": {"expert": EXPERT_RANKS}}
    moeify(model, plan).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    text = read_text()
    generator = torch.Generator().manual_seed(1)  # the same batches on every rank
    for step in range(STEPS):
        starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
        ids = text[starts.chunk(world)[rank][:, None] + torch.arange(LENGTH)]
        loss = model(ids, labels=ids).loss  # with the router losses
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = mean_over_ranks(loss)
        if rank == 0:
            loads = [stats["load"].tolist() for stats in router_stats(model).values()]
            shares = " | ".join(" ".join(f"{100 * share:3.0f}" for share in load) for load in loads)
            print(f"step {step:2}  loss {mean:.6f}  % of the routes to each expert: {shares}")
    report(model, rank, world)


def report(model: GPT2LMHeadModel, rank: int, world: int) -> None:
    """Print what each rank holds."""
    held = [local(parameter) for parameter in model.parameters()]
    experts = len(local(model.transformer.h[1].mlp.experts.up_proj))
    line = (
        f"rank {rank}: {experts} of 4 experts per layer, {sum(p.numel() for p in held):,} weights"
    )
    lines = [line] * world
    if world > 1:
        dist.all_gather_object(lines, line)
    if rank == 0:
        print("\n".join(lines))


def local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def main() -> None:
    torch.set_num_threads(1)
    if "WORLD_SIZE" not in os.environ:  # not started by torchrun
        train(0, 1)
        return
    dist.init_process_group("gloo")
    train(dist.get_rank(), dist.get_world_size())
    dist.barrier()  # nothing is under way any more
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
