"""A plain training loop: a small character model on real text, dense first, then as an MoE.

    python examples/train_loop.py

The text is Python's own library, so nothing is downloaded. The model is ordinary PyTorch: no
config, no base class, nothing of moeify in it.
"""

import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeify as mf
from moeify import moeify

LENGTH, BATCH, WIDTH = 64, 16, 128
PLAN = {
    "layers": [{"select": {"last": 2}, "experts": 4, "residual": "coefficient"}],
    "router": {"aux_loss": 0.02},
}


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, 4, WIDTH // 4).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharModel(nn.Module):
    def __init__(self, layers: int = 4) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(128, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


def read_text() -> Tensor:
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    text = b"".join(path.read_bytes() for path in sources)
    return torch.tensor([byte for byte in text if byte < 128])


def loss_of(model: nn.Module, text: Tensor, starts: Tensor) -> Tensor:
    rows = text[starts[:, None] + torch.arange(LENGTH + 1)]
    logits = model(rows[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


def train(model: nn.Module, text: Tensor, steps: int, *, moe: bool) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(steps):
        loss = loss_of(model, text, torch.randint(len(text) // 2, (BATCH,)))
        if moe:
            loss = loss + mf.aux_loss(model)  # all that an MoE adds to the loop
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor) -> float:
    """Return the loss on text that `train` never sees."""
    model.eval()
    starts = torch.arange(len(text) // 2, len(text) - LENGTH - 1, len(text) // 256)
    return float(loss_of(model, text, starts))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the fastest for matrices this small
    text = read_text()
    model = CharModel()
    print(f"{len(text):,} characters; untrained: loss {evaluate(model, text):.3f}")
    train(model, text, 100, moe=False)
    print(f"dense, 100 steps:            loss {evaluate(model, text):.3f}")

    moeify(model, PLAN, example_inputs=torch.zeros(2, LENGTH, dtype=torch.long))
    print(f"converted, not trained yet:  loss {evaluate(model, text):.3f}")
    train(model, text, 100, moe=True)
    print(f"MoE, 100 steps more:         loss {evaluate(model, text):.3f}")
    for name, stats in mf.router_stats(model).items():
        shares = ", ".join(f"{100 * share:.0f}" for share in stats["load"].tolist())
        print(f"  {name}: {shares} % of the tokens to its experts")


if __name__ == "__main__":
    main()
