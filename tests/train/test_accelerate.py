"""accelerate around a converted model: DDP, and FSDP2 as accelerate applies it.

On a CPU `Accelerator` takes no FSDP plugin and wraps in DDP without a word, so the wrapper's type
is asserted; FSDP2 is then tested with the function that `Accelerator.prepare` calls elsewhere.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.fx import GraphModule

import moeify as mf
from moeify.distributed.dtensor import is_sharded, whole
from tests.distributed.ranks import run_ranks
from tests.zoo_models import ZOO

WORLD = 2
PLAN = {
    "layers": [{"select": {"last": 1}, "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None, "aux_loss": 0.5},
    "init": {"experts": "noise", "router_std": 0.3},
}


def converted() -> nn.Module:
    torch.manual_seed(0)
    return mf.moeify(ZOO["llama"].build(), PLAN, verify=False).train()


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 98, (2, 8), generator=generator) for _ in range(WORLD)]


def loss_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    named = model.named_parameters()
    return {n.removeprefix("module."): whole(p.grad).clone() for n, p in named}


def definition(joined: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Return each rank's loss and the gradients of their mean, in one process.

    Args:
        joined: The router losses are over the tokens of both ranks, as in a joined conversion.
    """
    model = converted()
    if joined:
        task = [model(input_ids=b, labels=b).loss - mf.aux_loss(model) for b in batches()]
        model(input_ids=torch.cat(batches()))
        losses = [loss + mf.aux_loss(model) for loss in task]
    else:
        losses = [loss_of(model, batch) for batch in batches()]
    (sum(losses) / WORLD).backward()
    return [loss.item() for loss in losses], gradients(model)


def on_a_rank(rank: int, saved: str) -> list[dict[str, Any]]:
    """Wrap converted models as accelerate does, each way, and run them forward and backward."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils import fsdp2_prepare_model

    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    found = []
    for sharded in (False, True):
        for joined in (False, True):
            model = converted() if joined else torch.load(saved, weights_only=False)
            if sharded:
                accelerator.state.fsdp_plugin = plugin
                model = fsdp2_prepare_model(accelerator, model)
            else:
                model = accelerator.prepare(model)
            tokens = batches()[rank]
            options = {"labels": tokens, "use_cache": False, "output_router_logits": True}
            output = model(input_ids=tokens, **options)
            assert [tuple(logits.shape) for logits in output.router_logits] == [(tokens.numel(), 4)]
            loss = output.loss
            accelerator.backward(loss)
            found.append(
                {
                    "joined": joined,
                    "ddp": isinstance(model, nn.parallel.DistributedDataParallel),
                    "fsdp2": [n for n, m in model.named_modules() if isinstance(m, FSDPModule)],
                    "blocks": [n for n, m in model.named_modules() if isinstance(m, GraphModule)],
                    "whole": [n for n, p in model.named_parameters() if not is_sharded(p)],
                    "loss": loss.item(),
                    "gradients": gradients(model),
                }
            )
    return found


def test_ddp_and_fsdp2_as_accelerate_applies_them(tmp_path):
    saved = str(tmp_path / "model.pt")
    torch.save(converted(), saved)  # before the ranks met: each balances its own tokens
    want = {joined: definition(joined) for joined in (False, True)}
    for rank, results in enumerate(run_ranks(on_a_rank, WORLD, saved)):
        assert [result["ddp"] for result in results] == [True, True, False, False]
        for result in results:
            if result["ddp"]:  # asked for FSDP2
                assert result["fsdp2"] == []
            else:
                assert {"", "model.layers.0", "model.layers.1"} <= set(result["fsdp2"])
                assert result["whole"] == []
            assert [n.removeprefix("module.") for n in result["blocks"]] == ["model.layers.1.mlp"]
            losses, of_one = want[result["joined"]]
            assert result["loss"] == pytest.approx(losses[rank], rel=1e-6)
            assert result["gradients"].keys() == of_one.keys()
            for name, gradient in of_one.items():
                scale = max(1e-6, float(gradient.abs().max()))
                gap = float((result["gradients"][name] - gradient).abs().max())
                assert gap <= 1e-5 * scale, name
