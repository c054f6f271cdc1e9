"""Stage 1: the numbers of a plain optimizer, with a part of its memory on each rank."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import moeify as mf
from moeify.distributed.dtensor import is_sharded, whole
from moeify.errors import CheckpointError, MoeifyError
from moeify.train.optimizer import optimizer
from moeify.zero.stage1 import Cut, Guard, ShardedOptimizer
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import (
    WIDTH,
    alone,
    batches,
    dense,
    mean_square,
    plan,
)

STEPS = 5

DENSE: dict[str, tuple[tuple[int, ...], int | None]] = {
    "even": ((8, 6), 0),
    "uneven": ((7, 5), 0),
    "short": ((2, 3), 0),
    "second": ((3, 8), 1),
    "vector": ((5,), 0),
    "whole": ((3,), None),
    "frozen": ((4, 4), 0),
    "idle": ((6, 2), 0),
}
"""Shapes, and the dimension that is cut."""

EXPERTS = {"up": ((4, 6, 5), 1), "bias": ((4, 7), 1)}


class ByNorms(torch.optim.Optimizer):
    """Steps that depend on norms of whole parameters, as those of Adafactor and LAMB do."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if (grad := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(grad, 0.3)
                ratio = (parameter.norm() / mean.norm()).item()
                parameter.sub_(mean, alpha=group["lr"] * ratio)


OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"lr": 0.05, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 0.05, "foreach": True, "amsgrad": True}),
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (ByNorms, {"lr": 0.05}),
]


def values(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: shape for name, (shape, _) in (DENSE | EXPERTS).items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def gradients(step: int, now: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of some loss; different in every step."""
    noise = values(100 + step)
    return {n: 4 * noise[n] * (step == 1) + now[n] for n in noise if n not in ("frozen", "idle")}


def plain(cls: type, options: dict[str, Any]) -> list[dict[str, Tensor]]:
    """The same on one process."""
    parameters = {name: nn.Parameter(value) for name, value in values(0).items()}
    parameters["frozen"].requires_grad_(False)
    made = cls([{"params": [p for p in parameters.values() if p.ndim > 0]}], **options)
    schedule = torch.optim.lr_scheduler.StepLR(made, 2, gamma=0.5)
    history = []
    for step in range(STEPS):
        now = {n: p.detach().clone() for n, p in parameters.items()}
        for name, grad in gradients(step, now).items():
            parameters[name].grad = grad
        made.step()
        schedule.step()
        history.append({n: p.detach().clone() for n, p in parameters.items()})
    return history


def meshes() -> tuple[DeviceMesh, DeviceMesh]:
    dense_mesh = DeviceMesh("cpu", torch.arange(4), mesh_dim_names=("dp",))
    sparse = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("edp", "ep"))
    return dense_mesh, sparse


def parameters_of(
    start: dict[str, Tensor], dp: DeviceMesh, sparse: DeviceMesh
) -> tuple[dict[str, nn.Parameter], dict[int, Cut]]:
    parameters = {n: nn.Parameter(start[n].clone()) for n in DENSE}
    parameters["frozen"].requires_grad_(False)
    cuts = {id(parameters[n]): Cut(dp, dp, dim) for n, (_, dim) in DENSE.items()}
    place, ep = sparse.get_local_rank("ep"), sparse["ep"]
    for name, (shape, dim) in EXPERTS.items():
        part = start[name].chunk(2)[place].clone()
        made = DTensor.from_local(
            part,
            ep,
            [Shard(0)],
            shape=torch.Size(shape),
            run_check=False,
            stride=start[name].stride(),
        )
        parameters[name] = nn.Parameter(made)
        cuts[id(parameters[name])] = Cut(sparse["edp"], sparse, dim)
    return parameters, cuts


def grouped(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    return [
        {"params": [parameters[n] for n in DENSE], "param_names": list(DENSE), "name": "dense"},
        {"params": [parameters[n] for n in EXPERTS], "param_names": list(EXPERTS), "name": "ep"},
    ]


def give(parameters: dict[str, nn.Parameter], grads: dict[str, Tensor], place: int) -> None:
    for name, grad in grads.items():
        parameter = parameters[name]
        grad = grad.to(parameter.dtype)
        if is_sharded(parameter):
            grad = DTensor.from_local(
                grad.chunk(2)[place], parameter.device_mesh, parameter.placements, run_check=False
            )
        parameter.grad = grad


def gap(parameters: dict[str, nn.Parameter], want: dict[str, Tensor]) -> float:
    return max(float((whole(parameters[n]).detach() - want[n]).abs().max()) for n in want)


def local_bytes(optimizer: ShardedOptimizer, parameters: list[nn.Parameter]) -> int:
    total = 0
    for parameter in parameters:
        for value in optimizer.state[optimizer.shard_of(parameter)].values():
            value = value.to_local() if is_sharded(value) else value
            total += value.numel() * value.itemsize if value.ndim > 0 else 0
    return total


def trained(rank: int, want: list[list[dict[str, Tensor]]]) -> list[str]:
    dp, sparse = meshes()
    place = sparse.get_local_rank("ep")
    wrong = []
    for (cls, options), history in zip(OPTIMIZERS, want, strict=True):
        parameters, cuts = parameters_of(values(0), dp, sparse)
        made = ShardedOptimizer(grouped(parameters), cls, cuts, **options)
        assert not made.has_masters
        schedule = torch.optim.lr_scheduler.StepLR(made, 2, gamma=0.5)
        for step, expected in enumerate(history):
            made.zero_grad()
            now = {n: whole(p).detach().clone() for n, p in parameters.items()}
            give(parameters, gradients(step, now), place)
            made.step()
            schedule.step()
            if not (error := gap(parameters, expected)) <= 1e-6:
                wrong.append(f"{cls.__name__} step {step}: {error:.1e}")
        assert made.param_groups[0]["lr"] == made.inner.param_groups[0]["lr"] * 1.0
        if cls is torch.optim.AdamW and "foreach" not in options:
            sizes = local_bytes(made, [parameters["even"], parameters["second"]])
            assert sizes == 2 * 4 * (48 + 24) // 4, sizes
            assert local_bytes(made, [parameters["up"]]) == 2 * 4 * 120 // 4
            assert local_bytes(made, [parameters["uneven"]]) == 2 * 4 * (10 if rank < 3 else 5)
            shard = made.shard_of(parameters["even"])
            assert shard.to_local().data_ptr() == parameters["even"][2 * rank].data_ptr()
            for name in ("frozen", "idle"):
                assert not made.state.get(made.shard_of(parameters[name]))
            edited(made, parameters, rank)
            wrong += resumed(made, parameters, dp, sparse, place)
    wrong += masters(dp, sparse, place)
    refused(dp, sparse)
    return wrong


def edited(made: ShardedOptimizer, parameters: dict[str, nn.Parameter], rank: int) -> None:
    """Publishing gathers what was written into pieces."""
    for name in ("uneven", "second", "up"):
        made.shard_of(parameters[name]).detach().to_local().fill_(rank)
    made.publish()
    assert parameters["uneven"][:, 0].tolist() == [0, 0, 1, 1, 2, 2, 3]
    assert parameters["second"][0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    up = parameters["up"].to_local()[0, :, 0].tolist()
    assert up == ([0, 0, 0, 2, 2, 2] if rank % 2 == 0 else [1, 1, 1, 3, 3, 3])


def resumed(
    made: ShardedOptimizer,
    parameters: dict[str, nn.Parameter],
    dp: DeviceMesh,
    sparse: DeviceMesh,
    place: int,
) -> list[str]:
    """What an optimizer saved goes on in another one, in the same layout only."""
    start = {n: whole(p).detach().clone() for n, p in parameters.items()}
    others, cuts = parameters_of(start, dp, sparse)
    other = ShardedOptimizer(grouped(others), torch.optim.AdamW, cuts, lr=1.0)
    other.load_state_dict(pickle.loads(pickle.dumps(made.state_dict())))
    assert other.param_groups[0]["lr"] == made.param_groups[0]["lr"] != 1.0
    grads = gradients(1, start)
    for each, stepping in ((parameters, made), (others, other)):
        give(each, grads, place)
        stepping.step()
    error = gap(others, {n: whole(p).detach() for n, p in parameters.items()})
    cuts[id(others["even"])] = Cut(dp, dp, None)
    differently = ShardedOptimizer(grouped(others), torch.optim.AdamW, cuts, lr=1.0)
    with pytest.raises(CheckpointError, match=r"another layout.*parameter 0: .*\(8, 6\)|8, 6"):
        differently.load_state_dict(made.state_dict())
    return [f"resumed: {error:.1e}"] if error > 0 else []


def masters(dp: DeviceMesh, sparse: DeviceMesh, place: int) -> list[str]:
    """bfloat16 parameters with float32 masters, against the same scheme on whole tensors."""
    start = values(0)
    exact = {n: nn.Parameter(v.clone()) for n, v in start.items()}
    reference = torch.optim.AdamW(exact.values(), lr=0.01)
    parameters, cuts = parameters_of({n: v.bfloat16() for n, v in start.items()}, dp, sparse)
    givens = {}
    for name, parameter in parameters.items():
        local = start[name].chunk(2)[place] if is_sharded(parameter) else start[name]
        cut = cuts[id(parameter)]
        if cut.dim is not None:
            local = cut_of(local, cut)
        givens[id(parameter)] = local.clone()
    made = ShardedOptimizer(
        grouped(parameters), torch.optim.AdamW, cuts, master=torch.float32, masters=givens, lr=0.01
    )
    assert made.has_masters
    wrong = []
    for step in range(STEPS):
        if step == 3:  # somebody writes a few weights
            with torch.no_grad():
                parameters["even"][1:3] = 2.0
                exact["even"][1:3] = 2.0
        now = {n: whole(p).detach().float() for n, p in parameters.items()}
        grads = {n: g.bfloat16().float() for n, g in gradients(step, now).items()}
        give(parameters, grads, place)
        for name, grad in grads.items():
            exact[name].grad = grad
        made.step()
        reference.step()
        rounded = {n: p.detach().bfloat16() for n, p in exact.items()}
        if (error := gap(parameters, rounded)) > 0:
            wrong.append(f"bfloat16 step {step}: {error:.1e}")
        for name in exact:
            piece = whole(made.shard_of(parameters[name])).detach()
            if not (error := float((piece - exact[name].detach()).abs().max())) <= 1e-6:
                wrong.append(f"master of {name} step {step}: {error:.1e}")
    state = made.state_dict()
    others, cuts = parameters_of({n: v.bfloat16() for n, v in values(5).items()}, dp, sparse)
    other = ShardedOptimizer(
        grouped(others), torch.optim.AdamW, cuts, master=torch.float32, lr=0.01
    )
    with pytest.raises(CheckpointError, match="no master weights"):
        other.load_state_dict({k: v for k, v in state.items() if k != "masters"})
    other.load_state_dict(copy.deepcopy(state))
    if gap(others, {n: p.detach().bfloat16() for n, p in exact.items()}) > 0:
        wrong.append("masters were not loaded")
    return wrong


def cut_of(local: Tensor, cut: Cut) -> Tensor:
    chunks = local.chunk(cut.mesh.size(), cut.dim)
    place = cut.mesh.get_local_rank()
    return chunks[place] if place < len(chunks) else local.narrow(cut.dim, 0, 0)


def refused(dp: DeviceMesh, sparse: DeviceMesh) -> None:
    parameters, cuts = parameters_of(values(0), dp, sparse)
    made = ShardedOptimizer(grouped(parameters), torch.optim.SGD, cuts, lr=0.1)
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(MoeifyError, match="cannot be copied"):
            copied(made)
    factored = ShardedOptimizer(grouped(parameters), torch.optim.Adafactor, cuts, lr=0.1)
    give(parameters, values(1) | {"frozen": torch.zeros(4, 4)}, sparse.get_local_rank("ep"))
    with pytest.raises(MoeifyError, match="Adafactor cannot update pieces"):
        factored.step()
    parameters["even"].data = parameters["even"].data.clone()
    with pytest.raises(MoeifyError, match=r"after model\.to"):
        made.step()
    cuts[id(parameters["up"])] = Cut(sparse["edp"], sparse, 0)
    with pytest.raises(MoeifyError, match="cannot be cut along dimension 0"):
        ShardedOptimizer(grouped(parameters), torch.optim.SGD, cuts, lr=0.1)


def test_equal_to_a_plain_optimizer():
    want = [plain(cls, options) for cls, options in OPTIMIZERS]
    assert run_ranks(trained, 4, want) == [[]] * 4


def converted(rank: int, made: dict[str, Any], counts: tuple[int, ...], want: Any) -> list[str]:
    """Train a model whose plan says stage 1."""
    made = made | {"zero": {"stage": 1}}
    model = mf.moeify(dense(), made, example_inputs=torch.ones(4, WIDTH)).train()
    model.to("cpu")  # swaps what is sharded
    with pytest.raises(MoeifyError, match=r"mf\.optimizer"):
        torch.optim.SGD(model.a.experts.parameters(), lr=0.1).step()
    optim = optimizer(model, torch.optim.SGD, lr=0.1, momentum=0.9)
    assert isinstance(optim, ShardedOptimizer)
    assert {g["name"] for g in optim.param_groups} == {
        "dense, decay",
        "dense, no decay",
        "ep_size_2",
    }
    for _ in want[:-1]:
        optim.zero_grad()
        loss = mean_square(model(batches(counts)[rank])) + mf.aux_loss(model)
        loss.backward()
        optim.step()
    wrong = []
    for name, parameter in model.named_parameters():
        error = float((whole(parameter).detach() - want[-1][name]).abs().max())
        if not error <= 1e-5:
            wrong.append(f"{name}: {error:.1e}")
    return wrong


def test_converted_model():
    made, counts = plan(expert=2), (3, 0, 7, 1)
    assert run_ranks(converted, 4, made, counts, alone(made, counts, 3)) == [[]] * 4


def test_other_optimizers_are_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.guard = Guard.of(model[0])
    theirs = torch.optim.AdamW(model.parameters(), lr=0.1)
    with pytest.raises(MoeifyError, match=r"zero:.*mf\.optimizer\(model, torch\.optim\.AdamW"):
        theirs.step()
    clone = copy.deepcopy(model)
    with pytest.raises(MoeifyError, match=r"mf\.optimizer"):
        torch.optim.SGD(clone.parameters(), lr=0.1).step()
    torch.optim.SGD(model[1].parameters(), lr=0.1).step()
    ours = ShardedOptimizer(model.parameters(), torch.optim.AdamW, {}, lr=0.1)
    model(torch.ones(1, 3)).sum().backward()
    assert ours.step(lambda: torch.ones(())) == 1
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(MoeifyError, match=r"mf\.optimizer"):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.guard.remove()
    theirs.step()


def test_weights_loaded_before_the_optimizer_was_made_are_kept():
    layer = nn.Linear(3, 3)
    exact = layer.weight.detach().clone()
    layer.bfloat16()
    with torch.no_grad():
        layer.weight[0].fill_(7.0)
    made = ShardedOptimizer(
        layer.parameters(),
        torch.optim.SGD,
        {},
        master=torch.float32,
        masters={id(layer.weight): exact},
        lr=0.0,
    )
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    made.step()
    assert layer.weight[0].tolist() == [7.0] * 3
    assert torch.equal(made.shard_of(layer.weight)[1:], exact[1:])


def test_groups_can_be_added():
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    ours = ShardedOptimizer(first.parameters(), torch.optim.SGD, {}, lr=0.5)
    ours.add_param_group({"params": second.parameters(), "lr": 0.25})
    assert [group["lr"] for group in ours.inner.param_groups] == [0.5, 0.25]
    assert ours.param_groups[1]["momentum"] == 0
    before = second.bias.detach().clone()
    second(torch.ones(1, 2)).sum().backward()
    ours.step()
    torch.testing.assert_close(second.bias, before - 0.25)
    assert ours.shard_of(first.weight) is not None
    assert ours.shard_of(nn.Parameter(torch.ones(1))) is None
