"""Hugging Face models in pieces: gradients of one process, also compiled, checkpointed, sliced."""

from __future__ import annotations

import os
import re
from typing import Any

import torch

import moeify as mf
from moeify.distributed.dtensor import whole
from moeify.sites.record import conversion_of
from tests.distributed.ranks import run_ranks
from tests.distributed.test_models_parallel import BASE, dense, reference, step, tokens

Case = tuple[str, dict[str, Any], dict[str, Any], str]


def compared(rank: int, cases: list[tuple[Case, str]]) -> list[str]:
    """Run each case and compare loss and gradients with one process; return what differs."""
    wrong = []
    for (name, parallel, zero, mode), path in cases:
        tensor = parallel.get("tensor", 1)
        ranks, place = int(os.environ["WORLD_SIZE"]) // tensor, rank // tensor
        part = tokens(ranks).chunk(ranks)[place]
        model = mf.moeify(dense(name), {**BASE, "parallel": parallel, "zero": zero}).train()
        assert conversion_of(model).parallel.zero.units[1].around, "layers are units"
        if mode == "checkpoint":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if mode == "compile":
            for path_of, module in model.named_modules():
                if re.fullmatch(r".*\.(h|layers)\.\d", path_of):
                    module.compile(fullgraph=True, backend="aot_eager")
        loss = step(model, part)
        loss.backward()
        want = torch.load(path)
        title = f"{name} {parallel} {zero} {mode}"
        if abs(float(loss) - want["losses"][place]) > 1e-5 * abs(want["losses"][place]):
            wrong.append(f"{title}: loss {float(loss)}, not {want['losses'][place]}")
        for key, parameter in model.named_parameters():
            grad, expected = whole(parameter.grad), want["grads"][key]
            gap = float((grad - expected).abs().max())
            if not gap <= 1e-5 * max(1.0, float(expected.abs().max())):
                wrong.append(f"{title}: {key}: {gap:.1e}")
        if mode == "generate":
            model.eval()
            made = model.generate(part[:, :4], max_new_tokens=3, do_sample=False)
            assert made.shape == (len(part), 7)
    return wrong


def check(tmp_path: Any, world: int, cases: list[Case]) -> None:
    paths = []
    for number, (name, parallel, _, _) in enumerate(cases):
        paths.append(str(tmp_path / f"{number}.pt"))
        reference(
            name, {**BASE, "parallel": parallel}, world // parallel.get("tensor", 1), paths[-1]
        )
    assert run_ranks(compared, world, list(zip(cases, paths, strict=True))) == [[]] * world


def test_layers_in_pieces(tmp_path):
    cases: list[Case] = [
        ("gpt2", {"expert": 2}, {"stage": 3}, "generate"),  # ties its embeddings
        ("llama", {"expert": 2}, {"stage": 3, "prefetch": 0}, "checkpoint"),
        ("llama", {"expert": 2}, {"stage": 3}, "compile"),
    ]
    check(tmp_path, 4, cases)


def test_layers_sliced_and_in_pieces(tmp_path):
    cases: list[Case] = [
        ("llama", {"expert": 2, "tensor": 2}, {"stage": 3}, "generate"),
        ("qwen3", {"tensor": 2, "experts_in_tp": "slice"}, {"stage": 2}, ""),  # norms in slices
        ("qwen3", {"expert": 2, "tensor": 2}, {"stage": 3, "prefetch": 2}, ""),
    ]
    check(tmp_path, 4, cases)
