"""Training that continues after a rank was killed, on as many ranks as are left.

    torchrun --nproc-per-node 4 --max-restarts 3 examples/train_elastic.py --folder run
    torchrun --nproc-per-node 2 examples/train_elastic.py --folder run --steps 40

Every few steps all ranks save their pieces; torchrun starts the ranks again when one dies, and they
load the newest complete checkpoint, whatever layout wrote it. A step's batch depends on its number
only and is divided over the ranks, so that the losses are those of a run that nothing happened to.
`--die 7` kills a rank in step 7, once, to see it.
"""

import argparse
import os
import signal

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import moeify as mf
from moeify.cli.demo.data import load_text

LENGTH, BATCH = 64, 16
PLAN = {
    "layers": [{"select": {"every": 2, "start": 1}, "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None, "aux_loss": 0.02},
    "init": {"experts": "noise"},
}


def build() -> GPT2LMHeadModel:
    torch.manual_seed(0)  # the same dense model on every rank
    sizes = {"n_layer": 4, "n_embd": 64, "n_head": 4, "vocab_size": 256, "n_positions": LENGTH}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # each rank draws its own
    others = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropout, **others))


def batch(text: Tensor, step: int, rank: int, world: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH, (BATCH,), generator=generator)
    return text[starts.chunk(world)[rank][:, None] + torch.arange(LENGTH)]


def mean_over_ranks(value: Tensor, world: int) -> float:
    value = value.detach().clone()
    dist.all_reduce(value)
    return float(value) / world


def attempt() -> int:
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def join() -> None:
    """Start the process group; torchrun's store still has the addresses of ranks that are gone."""
    store, rank, world = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt {attempt()}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)


def train(options: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    parallel = {"expert": min(2, world)}
    model = mf.moeify(build(), PLAN | {"parallel": parallel, "zero": {"stage": options.stage}})
    optimizer = mf.optimizer(model.train(), torch.optim.AdamW, lr=1e-3)
    first = 0
    if (newest := mf.latest(options.folder)) is not None:
        first = mf.load_sharded(model, newest, optimizer=optimizer).step
        if rank == 0:
            print(f"{world} ranks go on from {newest}", flush=True)
    pairs = load_text().train
    text = torch.tensor(list("\n".join(f"{a}\n    {b}\n" for a, b in pairs).encode()))
    for step in range(first, options.steps):
        if step == options.die and attempt() == 0 and rank == world - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ids = batch(text, step, rank, world)
        loss = model(ids, labels=ids).loss  # with the router losses
        loss.backward()
        mf.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = mean_over_ranks(loss, world)
        if rank == 0:
            print(f"step {step:2}  loss {mean:.6f}", flush=True)
        if (step + 1) % options.every == 0:
            mf.save_sharded(model, options.folder, optimizer=optimizer, step=step + 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="where checkpoints go")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--every", type=int, default=5, help="steps between checkpoints")
    parser.add_argument("--stage", type=int, default=3, help="ZeRO stage")
    parser.add_argument("--die", type=int, default=-1, help="step in which a rank is killed, once")
    options = parser.parse_args()
    torch.set_num_threads(1)
    join()
    train(options)
    dist.barrier()  # nothing is under way any more
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
