"""One converted layer against the dense MLP and against transformers' own experts.

Reference ops, before any fused kernel: the point of the table is to know where they stand. One
process, all contestants in turn in every round, medians of the ratios to the dense MLP of equal
active size; the outputs are compared first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ROUNDS, WIDTH, HIDDEN, TOP_K = 7, 512, 1024, 2
CASES = [(1, 8), (64, 8), (1024, 8), (1024, 32)]


class Dense(nn.Module):
    """The gated MLP that a token's two experts equal in size."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, TOP_K * HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, TOP_K * HIDDEN, bias=False)
        self.down = nn.Linear(TOP_K * HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


def _ours(experts: int) -> nn.Module:
    import moeify as mf

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
            self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
            self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.silu(self.gate(x)) * self.up(x))

    plan = {
        "layers": [{"select": "all", "experts": experts, "top_k": TOP_K}],
        "router": {"capacity_factor": None},
        "init": {"experts": "noise", "noise_std": 1.0},
    }
    return mf.moeify(nn.Sequential(Mlp()), plan, example_inputs=torch.randn(2, WIDTH))


def _theirs(ours: nn.Module, experts: int, implementation: str) -> nn.Module:
    import transformers as hf
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = hf.MixtralConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_local_experts=experts,
        num_experts_per_tok=TOP_K,
    )
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    moe: Any = ours[0]
    with torch.no_grad():
        block.gate.weight.copy_(moe.router.weight)
        block.experts.gate_up_proj.copy_(moe.experts.gate_up_proj)
        block.experts.down_proj.copy_(moe.experts.down_proj)
    return block


def _call(module: nn.Module, x: Tensor) -> Tensor:
    out = module(x[None])
    return out[0] if isinstance(out, tuple) else out


def _time(step: Callable[[], object]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started


def run() -> dict[str, dict[str, float]]:
    """Return the time of each contestant over the dense MLP, forward and with backward."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results = {}
    for tokens, experts in CASES:
        ours, dense = _ours(experts).eval(), Dense()
        field = {
            "dense": dense,
            "moeify": ours,
            "hf_eager": _theirs(ours, experts, "eager"),
            "hf_grouped": _theirs(ours, experts, "grouped_mm"),
        }
        x = torch.randn(tokens, WIDTH)
        with torch.no_grad():
            want = _call(ours, x)
            for name in ("hf_eager", "hf_grouped"):
                torch.testing.assert_close(_call(field[name], x), want, rtol=1e-3, atol=1e-4)
        for what in ("forward", "train"):
            results[f"T {tokens}, E {experts}, {what}"] = _race(field, x, what == "train")
    return results


def _race(field: dict[str, nn.Module], x: Tensor, train: bool) -> dict[str, float]:
    def step(module: nn.Module) -> None:
        if train:
            module.zero_grad()
            _call(module, x).square().mean().backward()
        else:
            with torch.no_grad():
                _call(module, x)

    names = list(field)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(ROUNDS + 2):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name in order:
            took = _time(lambda n=name: step(field[n]))  # type: ignore[misc]
            if turn >= 2:
                times[name].append(took)
    dense = times["dense"]
    ratios = {
        name: statistics.median(a / b for a, b in zip(taken, dense, strict=True))
        for name, taken in times.items()
        if name != "dense"
    }
    return {"dense_ms": 1000 * statistics.median(dense), **ratios}
