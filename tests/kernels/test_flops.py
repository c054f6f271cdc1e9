"""What `FlopCounterMode` and a profiler see of converted models."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from moeify import moeify
from moeify.kernels.flops import FORMULAS
from moeify.kernels.registry import reference_only
from moeify.nn.experts import Experts

WIDTH, HIDDEN, TOKENS = 8, 16, 15

MULTIPLIES_NOTHING = {
    "assign",
    "check_counts",
    "combine",  # weights rows
    "combine_backward",
    "combine_weights",
    "combine_weights_backward",
    "dispatch",
    "local_routes",
    "receive_layout",
    "send_layout",
}


class Mlp(nn.Module):
    def __init__(self, gated: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.gate = nn.Linear(WIDTH, HIDDEN) if gated else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.up(x)
        if self.gate is None:
            hidden = nn.functional.gelu(hidden)
        else:
            hidden = nn.functional.silu(self.gate(x)) * hidden
        return self.down(self.dropout(hidden))


def converted(model: nn.Module, **layer: Any) -> nn.Module:
    made = {
        "layers": [{"select": "all", "experts": 1, "top_k": 1} | layer],
        "router": {"capacity_factor": None},
    }
    return moeify(copy.deepcopy(model), made, example_inputs=torch.randn(3, 5, WIDTH))


def flops(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """Return the operations of a forward pass and of its backward pass."""
    with FlopCounterMode(display=False) as counter:
        out = model(x)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_every_op_multiplies_matrices_or_does_not():
    names = (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("moeify::"))
    ours = {name.removeprefix("moeify::").partition(".")[0] for name in names}
    assert ours <= {*FORMULAS, *MULTIPLIES_NOTHING}
    assert not FORMULAS.keys() & MULTIPLIES_NOTHING


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["one op", "several ops"])
@pytest.mark.parametrize("needs_input", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_expert_costs_what_the_mlp_costs_and_its_router(gated, dropout, needs_input, dtype):
    dense = Mlp(gated, dropout).train().to(dtype)
    block = converted(dense.float()).train().to(dtype)
    dense = dense.to(dtype)
    x = torch.randn(3, 5, WIDTH, dtype=dtype, requires_grad=needs_input)
    forward, backward = flops(dense, x)
    router = 2 * TOKENS * WIDTH
    assert flops(block, x) == (forward + router, backward + 2 * router)


def test_k_experts_cost_k_times_the_mlp_whatever_the_capacity():
    dense = Mlp()
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    forward, backward = flops(dense, x)
    router = 2 * TOKENS * WIDTH * 4
    for factor in (None, 0.5, 2.0):
        made = {
            "layers": [{"select": "all", "experts": 4, "top_k": 2}],
            "router": {"capacity_factor": factor},
        }
        block = moeify(copy.deepcopy(dense), made, example_inputs=x.detach())
        assert flops(block, x) == (2 * forward + router, 2 * backward + 2 * router)


def test_frozen_experts_cost_no_gradients_of_their_own():
    experts = Experts(experts=2, d_in=4, d_ff=6, bias=False)
    x = torch.randn(5, 4, requires_grad=True)
    order = torch.arange(5, dtype=torch.int32)
    args = torch.tensor([2, 5]).int(), None, order, order[:, None].contiguous()
    product = 2 * 5 * 4 * 6

    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return experts(x, *args)

    assert flops(Wrapped(), x) == (2 * product, 4 * product)
    experts.requires_grad_(False)
    assert flops(Wrapped(), x) == (2 * product, 2 * product)
    with reference_only():
        assert flops(Wrapped(), x) == (2 * product, 2 * product)


UNPICKLES = """
import pickle, sys, torch
assert "torch.utils.flop_counter" not in sys.modules
model = pickle.load(open(sys.argv[1], "rb"))
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    model(torch.randn(5, 4), torch.tensor([2, 5]).int())
assert counter.get_total_flops() == 2 * 2 * 5 * 4 * 6, counter.get_total_flops()
"""


def test_importing_moeify_does_not_import_the_counter_and_unpickling_registers(tmp_path):
    file = tmp_path / "experts.pkl"
    file.write_bytes(pickle.dumps(Experts(experts=2, d_in=4, d_ff=6)))
    code = "import moeify" + UNPICKLES
    subprocess.run([sys.executable, "-c", code, str(file)], check=True)


@pytest.mark.parametrize("dropout", [0.0, 0.5], ids=["one op", "several ops"])
def test_a_profile_names_what_runs(dropout):
    block = converted(Mlp(dropout=dropout), experts=2).train()
    x = torch.randn(3, 5, WIDTH, requires_grad=True)
    with torch.profiler.profile() as profile:
        block(x).sum().backward()
    names = {event.key for event in profile.key_averages()}
    ops = {"gate", "combine_weights"}
    ops |= {"experts"} if not dropout else {"dispatch", "grouped_linear", "combine"}
    for op in ops:
        assert f"moeify::{op}" in names
        title = "".join(word.capitalize() for word in op.split("_"))
        assert f"Moeify{title}Backward" in names
    assert {"moeify::assign", "moeify::gate_backward"} <= names
    own = {n for n in names if "Backward" in n and "Generated" in n}
    assert not own
