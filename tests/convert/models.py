"""Small models to convert, a pass that breaks them, and what must stay as it was."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn

from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of

ALL4 = {"layers": [{"select": "all", "experts": 4}]}


class Mlp(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 12, out: int | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(layers))
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * self.scale
        return x


class Cifar(nn.Module):
    """The tutorial's head: fc2 84 wide, fc3 84 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(48, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


class Breaks(Exception):
    pass


@dataclass(frozen=True)
class ScaleHidden:
    """A user's pass that multiplies what the experts return."""

    factor: float
    fails: bool = False
    name: ClassVar[str] = "scale-hidden"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        if self.fails:
            raise Breaks
        for _, block in blocks_of(gm):
            node = next(n for n in block.graph.nodes if n.target == "experts")
            with block.graph.inserting_after(node):
                scaled = block.graph.call_function(torch.mul, (node, self.factor))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda u, s=scaled: u is not s)
            block.recompile()
        return PassResult(gm, True)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as before after a failed conversion."""
    return {
        "tensors": {k: (id(v), v._version, v.clone()) for k, v in model.state_dict().items()},
        "parameters": {k: id(v) for k, v in model.named_parameters(remove_duplicate=False)},
        "modules": {k: id(v) for k, v in model.named_modules(remove_duplicate=False)},
        "training": [m.training for m in model.modules()],
        "grads": [p.grad is None for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before["tensors"].items():
        assert torch.equal(value[2], after["tensors"][key][2]), key
    for key in ("parameters", "modules", "training", "grads", "hooks", "attributes"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"], after["rng"])
