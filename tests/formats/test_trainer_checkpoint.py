"""A Trainer over ranks that hold different experts: its gradients, its checkpoints, resuming."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import moeify as mf
from moeify.distributed.dtensor import local_of, whole
from moeify.errors import CheckpointError, MoeifyError
from tests.distributed.ranks import run_ranks
from tests.train.test_trainer import PLAN, by_hand, converted, differ, rows, train_once

SPREAD = {**PLAN, "parallel": {"expert": 2}}


def train(model: nn.Module, folder: Path, resume: Any = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        learning_rate=1e-2,
        per_device_train_batch_size=2,
        max_grad_norm=0.0,
        disable_tqdm=True,
        report_to="none",
        **settings | options,
    )
    made = Trainer(model, arguments, train_dataset=rows(16), eval_dataset=rows(2))
    made.train(resume_from_checkpoint=resume)
    return made


def weights(model: nn.Module) -> list[Tensor]:
    return [local_of(p.detach()).clone() for p in model.parameters()]


def over_ranks(rank: int, want: dict[str, Tensor], root: Path) -> dict[str, Tensor]:
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    _, found = train_once(converted(plan=SPREAD), 2, 1, True, str(root / "once"))
    assert differ({name: whole(grad) for name, grad in found.items()}, want) == []

    model = converted(plan=SPREAD)
    trainer = train(model, root / "out")
    assert (root / "out/checkpoint-2/step-00000002").is_dir()
    assert not (root / "out/checkpoint-2/config.json").exists()
    straight = weights(model)
    if rank == 0:
        with pytest.raises(MoeifyError, match="save_sharded saves from all ranks"):
            trainer.save_model(str(root / "final"))

    again = converted(plan=SPREAD)
    with torch.no_grad():
        for parameter in again.parameters():
            local_of(parameter).zero_()
    train(again, root / "out", resume=str(root / "out/checkpoint-2"))
    assert all(map(torch.equal, straight, weights(again)))

    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    with pytest.raises(MoeifyError, match="load_best_model_at_end"):
        train(converted(plan=SPREAD), root / "best", **best)
    train(again, root / "other", max_steps=2)
    before = weights(again)
    with pytest.raises(CheckpointError, match="resumes from: set"):
        train(again, root / "out", resume=str(root / "other/checkpoint-2"))
    assert all(map(torch.equal, before, weights(again)))
    return {name: whole(p.detach()) for name, p in model.named_parameters()}


@pytest.mark.filterwarnings("ignore")
def test_a_trainer_over_ranks(tmp_path: Path) -> None:
    _, want = by_hand(converted(), 1, True)
    trained, _ = run_ranks(over_ranks, 2, want, tmp_path)
    with pytest.raises((OSError, ValueError), match=r"model_type|config"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out/checkpoint-4")
    mf.to_single(tmp_path / "out/checkpoint-4", tmp_path / "single")
    single = dict(mf.load(tmp_path / "single").named_parameters())
    assert single.keys() == trained.keys()
    assert all(torch.equal(single[name], trained[name]) for name in trained)
