"""The norm of all gradients equals that of one process, on every mesh, and clips as torch does."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import moeify as mf
from moeify.distributed.dtensor import is_sharded, whole
from moeify.train.clip_grad import clip_grad_norm_
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import (
    WIDTH,
    alone,
    batches,
    dense,
    mean_square,
    plan,
)

ORDERS = (2.0, 1.0, 3.5, math.inf, 0.0)
MOST = 0.7


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs() <= 1e-6 * max(1.0, float(want.abs())))


def reference(grads: dict[str, Tensor]) -> dict[str, Any]:
    """Norms and clipped gradients of whole tensors, by torch, in float64."""
    found: dict[str, Any] = {}
    for order in ORDERS:
        parameters = [
            nn.Parameter(torch.zeros_like(g, dtype=torch.float64)) for g in grads.values()
        ]
        for parameter, grad in zip(parameters, grads.values(), strict=True):
            parameter.grad = grad.double()
        norm = nn.utils.clip_grad_norm_(parameters, MOST, order)
        found[str(order)] = norm, dict(zip(grads, [p.grad for p in parameters], strict=True))
    return found


def copied(grad: Tensor) -> Tensor:
    """Return a copy; that of a DTensor would sum what is to be summed."""
    if not isinstance(grad, DTensor):
        return grad.clone()
    local = grad.to_local().clone()
    return DTensor.from_local(
        local,
        grad.device_mesh,
        grad.placements,
        run_check=False,
        shape=grad.shape,
        stride=grad.stride(),
    )


def compare(named: dict[str, nn.Parameter], want: dict[str, Any]) -> list[str]:
    wrong = []
    kept = {n: p.grad for n, p in named.items() if p.grad is not None}
    for order in ORDERS:
        for name, grad in kept.items():
            named[name].grad = copied(grad)
        norm, clipped = want[str(order)]
        got = clip_grad_norm_(iter(named.values()), MOST, order, foreach=order != 1.0)
        if type(got) is not Tensor or got.ndim or not close(got, norm):
            wrong.append(f"norm {order}: {got} instead of {norm}")
        for name in kept:
            error = float((whole(named[name].grad) - clipped[name]).abs().max())
            if not error <= 1e-6:
                wrong.append(f"order {order} {name}: {error:.1e}")
    return wrong


def mixed(rank: int, want: dict[str, Any], grads: dict[str, Tensor]) -> list[str]:
    """Parameters of all kinds of layouts at once."""
    grid = torch.arange(4).view(2, 2)
    dense_mesh = DeviceMesh("cpu", grid, mesh_dim_names=("dp", "tp"))
    sparse = DeviceMesh("cpu", grid, mesh_dim_names=("edp", "ep"))
    layouts: dict[str, Any] = {
        "plain": None,
        "experts": (sparse["ep"], [Shard(0)]),
        "cut experts": (sparse, [Shard(1), Shard(0)]),
        "slice": (dense_mesh["tp"], [Shard(1)]),
        "repeated": (dense_mesh["tp"], [Replicate()]),
        "uneven": (dense_mesh["dp"], [Shard(0)]),
        "twice": (dense_mesh, [Shard(0), Shard(0)]),
        "sum": (dense_mesh["tp"], [Replicate()]),
        "nobody": (sparse["ep"], [Shard(0)]),
    }
    named: dict[str, nn.Parameter] = {}
    for name, layout in layouts.items():
        grad = grads.get(name, torch.ones(4, 2))
        if layout is not None:
            grad = distribute_tensor(grad, *layout, src_data_rank=None)
        named[name] = nn.Parameter(torch.zeros_like(grad))
        if name == "sum":
            half = grads[name] * (0.25 if dense_mesh.get_local_rank("tp") else 0.75)
            grad = DTensor.from_local(half, dense_mesh["tp"], [Partial()], run_check=False)
        if name in grads:
            named[name].grad = grad
    wrong = compare(named, want)
    wrong += nonfinite(rank, named)
    # Rank 2 has no gradient at all, nor its twin in the expert group.
    for name, parameter in named.items():
        parameter.grad = torch.zeros_like(parameter) + 1 if name == "experts" else None
        if rank >= 2:
            parameter.grad = None
    count = grads["experts"].numel() if rank < 2 else 0
    if not close(clip_grad_norm_(named.values(), 1.0, 1), torch.tensor(float(count))):
        wrong.append("without gradients")
    return wrong


def nonfinite(rank: int, named: dict[str, nn.Parameter]) -> list[str]:
    """One bad element on one rank raises on all, before anything changes."""
    wrong = []
    for bad in (math.nan, math.inf):
        for name, parameter in named.items():
            parameter.grad = torch.ones_like(parameter) if name != "nobody" else None
        if rank == 3:
            named["cut experts"].grad.to_local()[0, 0] = bad
        before = {n: p.grad.clone() for n, p in named.items() if p.grad is not None}
        for order in (2.0, math.inf):
            with pytest.raises(RuntimeError, match=r"gradients is (nan|inf)"):
                clip_grad_norm_(named.values(), 0.1, order, error_if_nonfinite=True)
            for name, grad in before.items():
                local, now = (
                    (t.to_local() if is_sharded(t) else t) for t in (grad, named[name].grad)
                )
                if not torch.equal(local.nan_to_num(7.0), now.nan_to_num(7.0)):
                    wrong.append(f"{name} changed")
            norm = clip_grad_norm_(named.values(), math.inf, order)
            if not (norm.isnan() if math.isnan(bad) else norm.isinf()):
                wrong.append(f"{bad} became {norm} in order {order}")
            for name, grad in before.items():
                named[name].grad = grad.clone()
    return wrong


def test_mixed_meshes():
    generator = torch.Generator().manual_seed(2)
    shapes = {
        "plain": (5, 3),
        "experts": (4, 3, 2),
        "cut experts": (4, 6),
        "slice": (3, 4),
        "repeated": (4,),
        "uneven": (3, 2),
        "twice": (5, 2),
        "sum": (3,),
    }
    grads = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    grads["slice"][:, :2] = 0
    assert run_ranks(mixed, 4, reference(grads), grads) == [[]] * 4


def model_of(
    rank: int, made: dict[str, Any], counts: tuple[int, ...], want: dict[str, Any]
) -> list[str]:
    place = rank // made["parallel"].get("tensor", 1)
    model = mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH)).train()
    y = model(batches(counts)[place])
    (mean_square(y) + mf.aux_loss(model)).backward()
    return compare(dict(model.named_parameters()), want)


@pytest.mark.parametrize(
    ("changes", "counts"),
    [
        ({"expert": 2}, (3, 0, 7, 1)),
        ({"expert": 2, "tensor": 2, "experts_in_tp": "slice"}, (5, 5)),
    ],
)
def test_converted_model(changes, counts):
    made = plan(**changes)
    want = reference(alone(made, counts, 1)[0]["gradients"])
    assert run_ranks(model_of, 4, made, counts, want) == [[]] * 4


def fully_sharded(rank: int, want: dict[str, Any]) -> list[str]:
    mesh = DeviceMesh("cpu", torch.arange(2), mesh_dim_names=("dp",))
    model = dense()
    fully_shard(model.a, mesh=mesh)
    fully_shard(model, mesh=mesh)
    mean_square(model(batches((4, 4))[rank])).backward()
    wrong = compare(dict(model.named_parameters()), want)
    norm = clip_grad_norm_(model, 1e-3)
    return wrong + ([] if close(clip_grad_norm_(model, 1.0), norm.clamp(max=1e-3)) else ["twice"])


def test_fully_sharded():
    model = dense()
    (sum(mean_square(model(x)) for x in batches((4, 4))) / 2).backward()
    want = reference({n: p.grad for n, p in model.named_parameters()})
    assert run_ranks(fully_sharded, 2, want) == [[]] * 2


def test_alone():
    model = dense()
    half = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    half.grad = torch.full((3,), 3.0, dtype=torch.bfloat16)
    assert clip_grad_norm_(model, 1.0) == 0
    assert float(clip_grad_norm_([half, half], 1.0)) == pytest.approx(math.sqrt(27), rel=1e-6)
    assert half.grad.dtype == torch.bfloat16
    large = nn.Parameter(torch.zeros(3_000_000))
    large.grad = torch.full_like(large, 0.1)
    want = 0.1 * math.sqrt(3_000_000)
    assert float(clip_grad_norm_(large, 1.0)) == pytest.approx(want, rel=1e-6)
    with pytest.raises(ValueError, match="norm_type: -1"):
        clip_grad_norm_(model, 1.0, -1)
