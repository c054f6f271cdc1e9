"""Gradients by dense weights over ranks: the mean of the ranks' dense models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.convert import install
from moeify.convert.verify import Difference
from tests.convert.models import Mlp
from tests.convert.test_dense_gradients import Gated, HalveHidden
from tests.distributed.ranks import run_ranks
from tests.zoo_models import ZOO

EXPERT = [("none", {"expert": 2}), ("coefficient", {"expert": 2, "gradients": "experts"})]
TENSOR = [("none", {"tensor": 2}), ("add", {"tensor": 2}), ("none", {"tensor": 2, "expert": 2})]


def differences(rank: int, cases: list[tuple[str, dict[str, Any]]]) -> list[Any]:
    """Convert models with inputs that differ from rank to rank, and a faulty one."""
    seen: list[Difference] = []
    real = install.compare

    def compare(*args: Any) -> Difference:
        seen.append(real(*args))
        return seen[-1]

    install.compare = compare
    found: list[Any] = []
    for residual, parallel in cases:
        plan = {
            "layers": [{"select": "all", "experts": 4, "top_k": 2, "residual": residual}],
            "parallel": parallel,
        }
        torch.manual_seed(0)
        if "tensor" in parallel:
            model, inputs = ZOO["llama"].build().double(), None
        else:
            model = nn.Sequential(Mlp(), nn.LayerNorm(8), Gated()).double()
            inputs = torch.randn(6, 8, generator=torch.Generator().manual_seed(rank)).double()
        mf.moeify(model, plan, example_inputs=inputs)
        found.append((len(seen[-1].layers), max(seen[-1].gradients, *seen[-1].layers.values())))
    try:
        mf.moeify(
            nn.Sequential(nn.Linear(8, 8), Mlp()).requires_grad_(False),
            {"layers": [{"select": "all", "experts": 4}], "parallel": {"expert": 2}},
            example_inputs=torch.randn(6, 8),
            passes=[HalveHidden(1.0)],
        )
    except mf.VerificationError as error:
        found.append(str(error))
    return found


@pytest.mark.parametrize(
    ("ranks", "cases"), [(2, [*EXPERT, *TENSOR[:2]]), (4, [EXPERT[0], TENSOR[2]])], ids=["2", "4"]
)
def test_experts_of_all_ranks_give_the_dense_gradient(ranks, cases):
    for result in run_ranks(differences, ranks, cases):
        *numbers, error = result
        assert len(numbers) == len(cases)
        for layers, difference in numbers:
            assert layers == 2
            assert difference < 1e-12
        assert "gradients" in error
