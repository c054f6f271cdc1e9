"""The JSON form of a converted layer: all that is written of it is read back."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import moeify as mf
from moeify.plan.layer_description import LayerDescription, describe_layer

PLAN = {
    "layers": [
        {
            "select": "all",
            "experts": 4,
            "top_k": 2,
            "residual": "sigmoid",
            "router": {"capacity_factor": None, "bias_update": 0.001},
            "init": {"experts": "split", "clusters": "random", "seed": 7},
        }
    ]
}


def layer() -> mf.LayerPlan:
    mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    return mf.Plan.of(PLAN).resolve(nn.Sequential(mlp), torch.randn(4, 8))[0]


def test_what_is_written_is_read_back() -> None:
    plan = layer()
    described = describe_layer(plan)
    again = LayerDescription.model_validate(json.loads(json.dumps(plan.to_dict())))
    assert again == described
    assert (again.router, again.init) == (plan.router, plan.init)
    assert again.parameters_after == plan.parameters_after
    short = described.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    assert "noise" not in short["router"]
    assert LayerDescription.model_validate(json.loads(json.dumps(short))) == described


@pytest.mark.parametrize(
    "change",
    [{"experts": 0}, {"experts": "4"}, {"gated": 1}, {"more": 1}, {"active_neurons": -1.0}],
)
def test_nothing_else_is_read(change: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LayerDescription.model_validate(layer().to_dict() | change)
