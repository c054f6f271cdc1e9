"""Sentence embeddings for the demo: computed, trained, measured, and computed in a new process.

Shapes: n sentences, D model width.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moeify.checkpoint import single
from moeify.cli.child_process import run_python
from moeify.errors import MoeifyError
from moeify.hf.local_folder import transformers_offline
from moeify.train.losses import router_stats

LENGTH = 32
TEMPERATURE = 20.0


def tokenize(tokenizer: Any, sentences: Sequence[str]) -> dict[str, Tensor]:
    """Return input ids and mask [n, LENGTH]."""
    batch = tokenizer(
        list(sentences),
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_tensors="pt",
    )
    return dict(batch)


def pooled(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return mean-pooled, normalised embeddings [n, D], as sentence-transformers does."""
    hidden: Tensor = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


@torch.no_grad()
def embed(model: nn.Module, tokenizer: Any, sentences: Sequence[str]) -> Tensor:
    """Return the embeddings [n, D] of sentences in evaluation mode."""
    model.eval()
    return pooled(model, tokenize(tokenizer, sentences))


def contrastive(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Return the in-batch contrastive loss: each signature must find its own description."""
    scores = _scores(model, tokenizer, pairs, TEMPERATURE)
    return F.cross_entropy(scores, torch.arange(len(pairs)))


def _scores(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]], scale: float = 1.0
) -> Tensor:
    """Return the scaled cosine of every signature with every description [n, n]."""
    texts = [signature for signature, _ in pairs] + [text for _, text in pairs]
    both = pooled(model, tokenize(tokenizer, texts))
    return scale * both[: len(pairs)] @ both[len(pairs) :].T


@torch.no_grad()
def measure(model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return loss, retrieval at first rank and expert load over pairs, in evaluation mode."""
    model.eval()
    scores, target = _scores(model, tokenizer, pairs), torch.arange(len(pairs))
    load = {name: stats["load"].tolist() for name, stats in router_stats(model).items()}
    return {
        "loss": float(F.cross_entropy(TEMPERATURE * scores, target)),
        "top1": float((scores.argmax(1) == target).float().mean()),
        "load": load,
        "busiest": statistics.mean(max(shares) * len(shares) for shares in load.values()),
    }


def embed_in_new_process(folder: Path, sentences: Sequence[str]) -> Tensor:
    """Return the embeddings that a new Python process computes with a saved model."""
    code = f"import sys; from {__name__} import embed_saved; embed_saved(*sys.argv[1:])"
    with tempfile.TemporaryDirectory() as scratch:
        texts, result = Path(scratch, "sentences.json"), Path(scratch, "embeddings.safetensors")
        texts.write_text(json.dumps(list(sentences)), encoding="utf-8")
        arguments = [str(folder), str(texts), str(result), str(torch.get_num_threads())]
        done = run_python("-c", code, *arguments)
        if done.returncode != 0:
            raise MoeifyError(f"{folder}: does not load in a fresh process:\n{done.stderr[-2000:]}")
        return load_file(result)["embeddings"]


def embed_saved(folder: str, sentences: str, result: str, threads: str) -> None:
    """Load a saved model and write its embeddings to `result`; arguments are those of a command."""
    torch.set_num_threads(int(threads))
    transformers = transformers_offline()
    model = single.load(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = json.loads(Path(sentences).read_text(encoding="utf-8"))
    save_file({"embeddings": embed(model, tokenizer, texts).contiguous()}, result)
