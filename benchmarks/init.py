"""How far each way to start experts is from the dense model at step 0, and what a token uses.

    python -m benchmarks.init

The first table is of tiny models with random weights: what is exact, and what is not. Random
neurons have no structure that a clustering could find, so the second splits a trained model, the
packaged all-MiniLM-L6-v2: clusters and routers are made from one half of the sentences, and
embeddings are compared on the other.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify.api import moeify
from moeify.hf.local_folder import transformers_offline

Row = tuple[str, str, float]


def relative(dense: Tensor, moe: Tensor) -> float:
    """Return the norm of the difference over the norm."""
    return float((dense - moe).norm() / dense.norm())


def tiny(kind: str, seed: int) -> nn.Module:
    """Return a causal language model of two layers with random weights of a useful size."""
    hf: Any = transformers_offline()
    torch.manual_seed(seed)
    if kind == "llama":
        config = hf.LlamaConfig(
            vocab_size=128,
            hidden_size=48,
            intermediate_size=144,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
        model = hf.LlamaForCausalLM(config)
    else:
        sizes = {"vocab_size": 128, "n_embd": 48, "n_inner": 144, "n_layer": 2, "n_head": 4}
        tokens = {"bos_token_id": 0, "eos_token_id": 0}
        model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, **tokens, initializer_range=0.1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()  # type: ignore[no-any-return]


def ways(folders: list[str]) -> Iterator[tuple[str, dict[str, Any], int, int]]:
    """Yield (name, init, experts, top_k) of every way to start."""
    yield "copy", {}, 4, 1
    yield "copy", {}, 4, 2
    yield "copy, router: hidden", {"router": "hidden"}, 4, 2
    yield "copy, router: prompts", {"router": "prompts"}, 4, 2
    for slices in (2, 3, 4):
        init = {"experts": "granular", "granularity": slices}
        yield f"granular, granularity: {slices}", init, 2 * slices, slices
    yield "granular, granularity: 2", {"experts": "granular", "granularity": 2}, 8, 4
    for clusters in ("weights", "coactivation", "random", "slices"):
        yield f"split, clusters: {clusters}", {"experts": "split", "clusters": clusters}, 4, 4
    split = {"experts": "split", "router": "clusters"}
    yield "split, router: clusters", split, 4, 2
    yield "noise", {"experts": "noise"}, 4, 2
    yield "drop", {"experts": "drop"}, 4, 2
    yield "random", {"experts": "random"}, 4, 2
    yield "models, the same twice", {"experts": "models", "from": folders[:1] * 2}, 2, 2
    yield "models, others", {"experts": "models", "from": folders}, 2, 2


def plan_of(init: dict[str, Any], experts: int, top_k: int) -> dict[str, Any]:
    """Return a plan for every MLP."""
    return {"layers": [{"select": "all", "experts": experts, "top_k": top_k}], "init": init}


def exactness(kind: str, seeds: int = 3) -> list[Row]:
    """Return (way, experts and top_k, largest error of the logits over some seeds)."""
    worst: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(seeds):
            model = tiny(kind, seed)
            folders = [str(Path(scratch, f"{seed}-{i}")) for i in range(2)]
            model.save_pretrained(folders[0])
            tiny(kind, 100 + seed).save_pretrained(folders[1])
            ids = torch.randint(0, 128, (8, 16))
            dense = model(ids).logits.detach()
            for name, init, experts, top_k in ways(folders):
                chosen = plan_of(init, experts, top_k)
                inputs = {"input_ids": ids}
                moe = moeify(copy.deepcopy(model), chosen, example_inputs=inputs)
                key = (name, f"{experts} / {top_k}")
                error = relative(dense, moe(ids).logits.detach())
                worst[key] = max(worst.get(key, 0.0), error)
    return [(*key, error) for key, error in worst.items()]


def trained(experts: int = 8) -> list[Row]:
    """Return (clusters and router, top_k, error of the embeddings) of all-MiniLM-L6-v2, split."""
    from moeify.cli.demo.data import find_weights, load_text
    from moeify.cli.demo.embed import embed, tokenize

    hf: Any = transformers_offline()
    folder = find_weights()
    model = hf.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    tokenizer = hf.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = [text for pair in load_text().held_out for text in pair]
    seen, others = texts[: len(texts) // 2], texts[len(texts) // 2 :]
    dense = embed(model, tokenizer, others)
    rows = []
    for clusters in ("weights", "coactivation", "random", "slices"):
        for router in ("normal", "clusters", "hidden"):
            init = {"experts": "split", "clusters": clusters, "router": router}
            for top_k in (experts, 3 * experts // 4, experts // 2, experts // 4):
                if top_k == experts and router != "normal":
                    continue
                moe = moeify(
                    copy.deepcopy(model),
                    plan_of(init, experts, top_k),
                    example_inputs=tokenize(tokenizer, seen),
                    verify=False,
                )
                error = relative(dense, embed(moe, tokenizer, others))
                rows.append((f"{clusters}, {router}", f"{top_k / experts:.0%}", error))
    return rows


def table(heads: tuple[str, str, str], rows: list[Row]) -> str:
    """Write rows as Markdown."""
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|"]
    return "\n".join(lines + [f"| {what} | {size} | {error:.1e} |" for what, size, error in rows])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.init", description=__doc__)
    parser.add_argument("--only", choices=("llama", "gpt2", "trained"))
    chosen = parser.parse_args(arguments).only
    parts: dict[str, Callable[[], list[Row]]] = {
        "llama": lambda: exactness("llama"),
        "gpt2": lambda: exactness("gpt2"),
        "trained": trained,
    }
    for name, part in parts.items():
        if chosen in (None, name):
            heads = ("way", "experts / top_k", "error")
            if name == "trained":
                heads = ("clusters, router", "active neurons", "error")
            sys.stdout.write(f"\n{name}\n\n{table(heads, part())}\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
