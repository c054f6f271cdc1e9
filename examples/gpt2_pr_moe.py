"""GPT-2 to PR-MoE: a plan of six lines, and what one block is afterwards.

    python examples/gpt2_pr_moe.py

The model is small and random, so nothing is downloaded; a pretrained one goes the same way.
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from moeify import Plan, moeify

PLAN = """
version: 1
layers:
  - {select: {every: 2, start: 1}, experts: 4, residual: coefficient}
  - {select: {last: 2, of: selected}, experts: 8}
router: {aux_loss: 0.01}
init: {experts: copy}
"""


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=8, n_embd=128, n_head=4, vocab_size=1000, n_positions=128)
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, config.vocab_size, (2, 32))
    with torch.no_grad():
        dense = model(ids).logits

    plan = Plan.loads(PLAN)
    print(plan.resolve(model))

    moeify(model, plan)

    with torch.no_grad():
        difference = (model(ids).logits - dense).abs().max()
    print(f"\nlargest difference of the logits to the dense model: {difference:.1e}")
    print(f"\n{type(model).__name__}.transformer.h[1].mlp is now this graph:")
    print(model.transformer.h[1].mlp.code)


if __name__ == "__main__":
    main()
