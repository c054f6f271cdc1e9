"""Hugging Face's Trainer on real text: a small Llama, dense first, then as an MoE.

    python examples/train_trainer.py
    torchrun --nproc-per-node 2 examples/train_trainer.py

Nothing of moeify is in the training but a callback, which puts what the routers do into the logs.
The text is what Python's own library says of itself, read as bytes, so nothing is downloaded.
"""

import os
import tempfile

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

import moeify as mf
from moeify import RouterCallback, moeify
from moeify.cli.demo.data import load_text

LENGTH, BATCH, STEPS = 64, 16, 60
PLAN = {
    "layers": [{"select": {"last": 2}, "experts": 4, "top_k": 2}],
    "router": {"aux_loss": 0.02},
    "init": {"experts": "noise"},
}


def build() -> LlamaForCausalLM:
    torch.manual_seed(0)  # the same dense model on every rank
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 4}
    others = {"num_attention_heads": 4, "vocab_size": 256, "max_position_embeddings": LENGTH}
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    return LlamaForCausalLM(LlamaConfig(**sizes, **others, **ids))


def read_rows(pairs: tuple[tuple[str, str], ...]) -> list[dict[str, torch.Tensor]]:
    text = "\n".join(f"{signature}\n    {description}\n" for signature, description in pairs)
    rows = torch.tensor(list(text.encode())).unfold(0, LENGTH, LENGTH)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model: LlamaForCausalLM, folder: str) -> Trainer:
    text = load_text()
    arguments = TrainingArguments(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // int(os.environ.get("WORLD_SIZE", 1)),
        learning_rate=3e-3,
        logging_steps=STEPS // 3,
        eval_on_start=True,  # not run.evaluate(): on several ranks no DDP would come after it
        eval_strategy="steps",
        eval_steps=STEPS,
        save_strategy="no",
        report_to="none",  # "tensorboard" draws the callback's values
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        log_level="error",
    )
    sets = {"train_dataset": read_rows(text.train), "eval_dataset": read_rows(text.held_out)}
    run = Trainer(model, arguments, **sets)
    run.remove_callback(PrinterCallback)  # `main` prints
    return run


def train(run: Trainer, what: str) -> None:
    run.train()
    if run.is_world_process_zero():
        logs = run.state.log_history
        before, after = (log["eval_loss"] for log in logs if "eval_loss" in log)
        losses = ", ".join(f"{log['loss']:.2f}" for log in logs if "loss" in log)
        print(f"{what}: held-out loss {before:.3f} -> {after:.3f}; in training {losses}")


def main(folder: str) -> None:
    torch.set_num_threads(1)  # the fastest for matrices this small
    model = build()
    train(trainer(model, folder), f"dense, {STEPS} steps")
    moeify(model, PLAN)
    run = trainer(model, folder)  # a new one: the experts are new parameters
    RouterCallback().attach(run)
    train(run, f"MoE, {STEPS} steps more")
    if not run.is_world_process_zero():
        return
    logged = [log for log in run.state.log_history if "loss" in log][-1]
    for layer in mf.router_stats(model):
        most, least, entropy, dropped = (
            logged[f"router/{layer}/{key}"]
            for key in ("load_max", "load_min", "entropy", "dropped")
        )
        print(
            f"  {layer}: {least:.2f} to {most:.2f} of an even load per expert, "
            f"entropy {entropy:.2f}, {100 * dropped:.1f} % dropped"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
