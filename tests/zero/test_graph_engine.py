"""ZeRO by gathers in the graph: equal to one process, eager and compiled; what stays in memory."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import moeify as mf
from moeify.convert import install
from moeify.distributed.dtensor import whole
from moeify.errors import MoeifyError
from moeify.zero import gather, graph_engine
from tests.distributed import test_models_parallel as models
from tests.distributed.ranks import run_ranks
from tests.distributed.test_experts_parallel import (
    CAPACITY,
    PYRAMID,
    RESIDUAL,
    WIDTH,
    Net,
    alone,
    batches,
    dense,
    mean_square,
    plan,
    trained,
)

EVEN = (5, 5, 5, 5)
UNEVEN = (5, 0, 4, 5)

LAYOUTS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    (UNEVEN, {"expert": 2}),
    (EVEN, {"expert": 2, "more": RESIDUAL, "router": CAPACITY}),
    (EVEN, {"expert": 4, "more": PYRAMID, "top_k": 1}),
    (EVEN, {}),
    ((5, 5), {"expert": 2, "tensor": 2, "experts_in_tp": "slice", "more": RESIDUAL}),
    ((5, 0), {"expert": 2, "tensor": 2, "coordinated": False}),
    ((5, 5), {"expert": 2, "tensor": 2, "experts_in_tp": "fold"}),
]


def graph(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero": {"engine": "graph", "stage": stage, **more}}


def converted(made: dict[str, Any], net: nn.Module | None = None) -> nn.Module:
    inputs = torch.ones(4, WIDTH)
    return mf.moeify(dense() if net is None else net, made, example_inputs=inputs).train()


def loss_of(model: Any, x: torch.Tensor) -> torch.Tensor:
    return mean_square(model(x)) + mf.aux_loss(model)


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.detach() - want.detach()).abs().max())


def each(rank: int, path: str) -> list[Any]:
    cases = torch.load(path, weights_only=False)  # too many tensors to send
    return [(str(made), w) for made, *rest in cases if (w := trained(rank, made, *rest))]


def test_steps_equal_one_process(tmp_path):
    """Of stage 3; the numbers of stage 2 are in test_zero.py."""
    cases = []
    for counts, changes in LAYOUTS:
        made = plan(**copy.deepcopy(changes))
        cases.append(({**made, **graph(3)}, counts, alone(made, counts, 2)))
    path = str(tmp_path / "cases.pt")
    torch.save(cases, path)
    assert run_ranks(each, 4, path) == [[]] * 4


def compiled(rank: int, stage: int, want: list[dict[str, Any]]) -> tuple[Any, ...]:
    """Compile the whole model; return what differs, and the collectives of its two graphs."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    counted: dict[str, list[Any]] = {"forward": [], "backward": []}

    def counter(kind: str) -> Any:
        def compiler(gm: Any, inputs: Any) -> Any:
            calls = gm.graph.find_nodes
            ops = torch.ops._c10d_functional
            gathers = len(calls(op="call_function", target=ops.all_gather_into_tensor.default))
            scatters = len(calls(op="call_function", target=ops.reduce_scatter_tensor.default))
            counted[kind].append((gathers, scatters))
            return make_boxed_func(gm.forward)

        return compiler

    model = converted({**plan(expert=2), **graph(stage)})
    nodes = [node.target for node in model.a.graph.nodes]
    wrong = [] if graph_engine.gather in nodes else ["no gathers in the block's graph"]
    optimizer = torch.optim.AdamW(model.parameters())
    backend = aot_autograd(
        fw_compiler=counter("forward"),
        bw_compiler=counter("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    run = torch.compile(model, fullgraph=True, backend=backend)
    y = run(batches(EVEN)[rank])
    if gap(y, want[0]["outputs"][rank]) > 1e-5:
        wrong.append("output")
    (mean_square(y) + mf.aux_loss(model)).backward()
    for name, parameter in model.named_parameters():
        if gap(whole(parameter.grad), want[0]["gradients"][name]) > 1e-5:
            wrong.append(name)
    optimizer.step()
    return wrong, counted["forward"], counted["backward"]


@pytest.mark.parametrize("stage", [3, 2])
@pytest.mark.thin(2)
def test_one_graph(stage):
    """Each of 11 parameters is a gather forward, at stage 3 most are again backward."""
    want = alone(plan(expert=2), EVEN, 1)
    for wrong, forward, backward in run_ranks(compiled, 4, stage, want):
        assert wrong == []
        assert forward == [(11, 0)]
        ((gathers, scatters),) = backward
        assert scatters == 11
        assert gathers == (9 if stage == 3 else 0)  # no gradient reads the two biases after GELU


class Checkpointed(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + checkpoint(self.a, x, use_reentrant=False)
        return x + checkpoint(lambda y: self.b(self.norm(y)), x, use_reentrant=False)


def checkpointed() -> Net:
    torch.manual_seed(3)
    return Checkpointed()


def watched() -> tuple[list[StorageWeakRef], Any]:
    """Remember the memory of everything that is gathered from now on."""
    alive: list[StorageWeakRef] = []
    former = gather._whole

    def gathered(*args: Any) -> torch.Tensor:
        made = former(*args)
        alive.append(StorageWeakRef(made.untyped_storage()))
        return made

    gather._whole = gathered
    return alive, former


def eager(rank: int, stage: int, want: list[dict[str, Any]]) -> dict[str, Any]:
    """Everything that one eager model can be asked."""
    results: dict[str, Any] = {}
    x = batches(UNEVEN)[rank]
    model = converted({**plan(expert=2), **graph(stage)})
    alive, former = watched()
    loss = loss_of(model, x)
    gc.collect()
    results["gathered forward"] = len(alive)
    results["alive after forward"] = sum(not ref.expired() for ref in alive)
    loss.backward()
    results["gathered"] = len(alive)
    del loss
    gc.collect()
    results["alive in the end"] = sum(not ref.expired() for ref in alive)
    gather._whole = former

    loss_of(model, x).backward()  # a second micro-batch
    twice = [gap(whole(p.grad), 2 * want[0]["gradients"][n]) for n, p in model.named_parameters()]
    results["two passes"] = max(twice) < 2e-5

    frozen = copy.deepcopy(model)
    results["class of a copy"] = type(frozen.norm) is type(model.norm)
    frozen.zero_grad()
    frozen.norm._parameters["weight"].requires_grad_(False)
    with torch.no_grad():
        y = model(x)
    results["copy"] = torch.equal(frozen(x), y)
    loss_of(frozen, x).backward()
    results["frozen"] = frozen.norm._parameters["weight"].grad is None
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    results["pickled"] = torch.equal(torch.load(file, weights_only=False)(x), y)

    thrifty = converted({**plan(expert=2), **graph(stage)}, checkpointed())
    loss_of(thrifty, x).backward()
    once = [gap(whole(p.grad), want[0]["gradients"][n]) for n, p in thrifty.named_parameters()]
    results["checkpointed"] = max(once) < 1e-5

    loss = loss_of(model, x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    try:
        loss.backward()
        results["changed before backward"] = "no error"
    except (MoeifyError, RuntimeError) as error:
        results["changed before backward"] = type(error).__name__
    return results


@pytest.mark.parametrize("stage", [2, 3])
def test_eager(stage):
    want = alone(plan(expert=2), UNEVEN, 1)
    again = stage == 3
    for results in run_ranks(eager, 4, stage, want):
        assert results == {
            "gathered forward": 11,
            "alive after forward": 0 if again else 9,
            "gathered": 20 if again else 11,
            "alive in the end": 0,
            "two passes": True,
            "class of a copy": True,
            "copy": True,
            "frozen": True,
            "pickled": True,
            "checkpointed": True,
            "changed before backward": "MoeifyError" if again else "no error",
        }


def stepped(rank: int, zero: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    model = converted({**plan(expert=2), "zero": zero})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        y = model(batches(EVEN)[rank])
        (mean_square(y.float()) + mf.aux_loss(model)).backward()
        optimizer.step()
    dtypes = {(str(p.dtype), str(p.grad.dtype)) for p in model.parameters()}
    values = {name: whole(p).detach().float() for name, p in model.named_parameters()}
    return f"{y.dtype} {dtypes}", values


def engines(rank: int) -> list[str]:
    wrong = []
    for options in ({}, {"master": "same", "reduce": "same"}):
        zero = {"stage": 3, "precision": "bf16", **options}
        ours, theirs = stepped(rank, {**zero, "engine": "graph"}), stepped(rank, zero)
        wrong += [name for name, value in ours[1].items() if gap(value, theirs[1][name]) > 1e-6]
        if ours[0] != theirs[0]:
            wrong.append(f"{ours[0]}, fsdp2: {theirs[0]}")
    return wrong


def test_precision_is_that_of_fsdp2():
    assert run_ranks(engines, 4) == [[]] * 4


def test_norms_within_slices(tmp_path):
    """Norms over heads, whose gradients are sums over tensor ranks; tied embeddings."""
    made = {**models.BASE, "parallel": {"tensor": 2}}
    path = str(tmp_path / "want.pt")
    models.reference("qwen3", made, 2, path)
    made = {**made, **graph(3)}
    assert run_ranks(models.compared_at, 4, path, "qwen3", made, False) == [[]] * 4


def undone(rank: int) -> list[Any]:
    def fails(*args: Any) -> None:
        raise MoeifyError("no")

    net, x = dense(), batches(EVEN)[rank]
    before, y = dict(net.named_parameters()), net(x)
    former, install.reduce_gradients = install.reduce_gradients, fails  # type: ignore[attr-defined]
    try:
        converted({**plan(expert=2), **graph(3, precision="bf16")}, net)
        raise AssertionError("it did not fail")
    except MoeifyError:
        pass
    finally:
        install.reduce_gradients = former  # type: ignore[attr-defined]
    after = dict(net.named_parameters())
    same = after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    hooks = len(net._forward_hooks) + len(net._forward_pre_hooks)
    return [same, torch.equal(net(x), y), type(net.norm) is nn.LayerNorm, hooks]


def test_a_conversion_that_fails_leaves_the_model_as_it_was():
    assert run_ranks(undone, 2) == [[True, True, True, 0]] * 2
