"""Parameter groups: who is an expert, what is decayed, and that optimizers take them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.nn.experts import Experts
from moeify.train.optimizer import optimizer, param_groups
from tests.distributed.test_experts_parallel import WIDTH, dense, plan


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.scale


def names(groups: list[dict]) -> dict[tuple[str, float], set[str]]:
    return {(g["name"], g["weight_decay"]): set(g["param_names"]) for g in groups}


def test_dense_model():
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(4, 4),
            "norm": nn.LayerNorm((3, 4)),
            "own": OwnNorm(),
            "words": nn.Embedding(5, 4),
            "frozen": nn.Linear(2, 2).requires_grad_(False),
        }
    )
    model["tied"] = model["words"]
    groups = param_groups(model, weight_decay=0.2, lr=0.5, expert_lr=1.0)
    assert names(groups) == {
        ("dense, decay", 0.2): {"linear.weight", "words.weight"},
        ("dense, no decay", 0.0): {"linear.bias", "norm.weight", "norm.bias", "own.scale"},
    }
    assert all(g["lr"] == 0.5 and "moe" not in g for g in groups)
    for group in groups:
        named = dict(model.named_parameters())
        assert all(
            named[n] is p for n, p in zip(group["param_names"], group["params"], strict=True)
        )


def converted() -> nn.Module:
    made = plan(
        more=[
            {"select": {"last": 1}, "experts": 2},
            {"select": {"first": 1}, "residual": "coefficient"},
        ]
    )
    del made["parallel"]
    return mf.moeify(dense(), made, example_inputs=torch.randn(4, WIDTH)).train()


def test_converted_model():
    model = converted()
    groups = param_groups(model, expert_lr=0.1, expert_weight_decay=0.5)
    found = names(groups)
    assert found["ep_size_1", 0.5] == {
        "a.experts.up_proj",
        "a.experts.down_proj",
        "b.experts.gate_up_proj",
        "b.experts.down_proj",
    }
    assert found["ep_size_1", 0.0] == {
        "a.experts.up_bias",
        "a.experts.down_bias",
        "b.experts.gate_up_bias",
    }
    assert {"a.router.weight", "b.router.weight"} <= found["dense, decay", 0.01]
    assert {"norm.weight", "norm.bias"} <= found["dense, no decay", 0.0]
    every = [name for group in groups for name in group["param_names"]]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())
    assert [g.get("moe", False) for g in groups] == [False, False, True, True]
    assert [g.get("lr") for g in groups] == [None, None, 0.1, 0.1]
    # Wrapped, the experts are still found.
    again = param_groups(nn.Sequential(model))
    assert [g["name"] for g in again] == [g["name"] for g in groups]


def test_layers_by_hand():
    layer = mf.MoE(WIDTH, nn.Sequential(nn.Linear(WIDTH, WIDTH)), num_experts=2, use_residual=True)
    found = names(param_groups(layer))
    assert found["ep_size_1", 0.01] == {f"experts.experts.{i}.0.weight" for i in range(2)}
    assert found["ep_size_1", 0.0] == {f"experts.experts.{i}.0.bias" for i in range(2)}
    assert "mlp.0.weight" in found["dense, decay", 0.01]


def test_norms_within_experts_are_not_decayed():
    experts = Experts(experts=2, d_in=4, d_ff=8, inner=nn.Identity(), inner_params=["inner_0"])
    found = names(param_groups(experts))
    assert found["ep_size_1", 0.01] == {"up_proj", "down_proj"}
    assert found["ep_size_1", 0.0] == {"up_bias", "down_bias", "inner_0"}


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
        (torch.optim.SGD, {}),
        (torch.optim.Adafactor, {}),
        (torch.optim.Adafactor, {"foreach": True}),
    ],
)
def test_optimizers_accept_them(cls, options):
    model = converted()
    made = optimizer(model, cls, lr=0.01, weight_decay=0.3, **options)
    assert type(made) is cls
    assert {g["weight_decay"] for g in made.param_groups} == {0.3, 0.0}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    (model(torch.randn(6, WIDTH)).square().sum() + mf.aux_loss(model)).backward()
    made.step()
    assert all(not torch.equal(p, before[n]) for n, p in model.named_parameters() if "proj" in n)
    other = optimizer(converted(), cls, lr=0.5, **options)
    other.load_state_dict(made.state_dict())
    assert [g["param_names"] for g in other.param_groups] == [
        g["param_names"] for g in made.param_groups
    ]
    assert {g["lr"] for g in other.param_groups} == {0.01}


def test_default_weight_decay_is_the_optimizers_own():
    assert {g["weight_decay"] for g in optimizer(nn.Linear(2, 2)).param_groups} == {0.01, 0.0}
    sgd = optimizer(nn.Linear(2, 2), torch.optim.SGD, lr=0.1)
    assert {g["weight_decay"] for g in sgd.param_groups} == {0.0}
    plain = optimizer(nn.Linear(2, 2), torch.optim.SGD, [nn.Parameter(torch.ones(2))], lr=0.1)
    assert len(plain.param_groups) == 1
