"""Mixture-of-Students: a PR-MoE teacher, and a student with fewer layers that learns from it.

    python examples/distill.py

The teacher is a small character model on Python's own library, turned into a PR-MoE and trained on.
Its students keep three of four layers as they were after the conversion, and see the same text:
without the teacher, with it to the end, and with it for the first half only, which is staged
distillation. (A student that starts from its trained teacher soon overtakes it, and is then held
back.) Nothing is downloaded.
"""

import copy
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moeify as mf
from moeify import moeify

LENGTH, BATCH, WIDTH, STEPS = 48, 16, 64, 45
PLAN = {
    "layers": [
        {"select": "all", "experts": 2, "residual": "coefficient"},
        {"select": {"last": 1}, "experts": 4},
    ],
    "router": {"aux_loss": 0.02},
    "student": {"keep": [0, 1, 3], "distill": {"schedule": "staged", "stop": 0.5}},
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


def rows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    found = text[starts[:, None] + torch.arange(LENGTH + 1)]
    return found[:, :-1], found[:, 1:]


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())


def train(model: nn.Module, text: Tensor, steps: int, loss_of_batch: object, rate: float) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    drawn = torch.Generator().manual_seed(1)  # the same batches for every student
    model.train()
    for _ in range(steps):
        batch = rows(text, torch.randint(len(text) // 2, (BATCH,), generator=drawn))
        loss_of_batch(batch).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def evaluate(model: nn.Module, text: Tensor) -> float:
    """Return the loss on text that `train` never sees."""
    model.eval()
    starts = torch.arange(len(text) // 2, len(text) - LENGTH - 1, len(text) // 256)
    return float(loss_of(model, rows(text, starts)))


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)  # the fastest for matrices this small
    text, plan = read_text(), mf.Plan.of(PLAN)
    example = torch.zeros(2, LENGTH, dtype=torch.long)
    teacher = CharModel()
    train(teacher, text, 2 * STEPS, lambda batch: loss_of(teacher, batch), 2e-3)
    moeify(teacher, plan, example_inputs=example)
    start = mf.student(teacher, example_inputs=example)
    train(teacher, text, STEPS, lambda b: loss_of(teacher, b) + mf.aux_loss(teacher), 2e-3)
    print(f"teacher, 4 layers:                   loss {evaluate(teacher, text):.3f}")

    ways = {"without the teacher": {"alpha": 0.0}, "with it to the end": {"schedule": "constant"}}
    for name, options in {**ways, "staged": {}}.items():
        student = copy.deepcopy(start)
        if not options.get("alpha", 1):
            print(
                f"student, {len(student.layers)} layers, not trained yet:  "
                f"loss {evaluate(student, text):.3f}"
            )
        kd = mf.distill(student, teacher, spec=plan, steps=STEPS, **options)
        train(student, text, STEPS, kd, 2e-3)
        last = kd.last
        print(
            f"student, {name + ':':<27} loss {evaluate(student, text):.3f} "
            f"(at the end ce {last['ce']:.3f}, alpha {last['alpha']:g})"
        )


if __name__ == "__main__":
    main()
