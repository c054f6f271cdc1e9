"""Gradients reduced over ranks equal those of one process whose loss is the mean of all."""

from __future__ import annotations

import copy
import io
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from moeify.distributed import gradient_buckets
from moeify.distributed.dtensor import local
from moeify.distributed.gradient_reducer import GradientReducer, Reduction
from moeify.errors import DispatchError
from tests.distributed.ranks import run_ranks

Loss = Callable[[nn.Module, int], Tensor]


class Net(nn.Module):
    """Three layers, the middle ones perhaps checkpointed, and a side branch that some skip."""

    def __init__(self, checkpointing: str = "") -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.middle = nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Tanh())
        self.side, self.last = nn.Linear(8, 8), nn.Linear(8, 3)
        self.unused = nn.Linear(2, 2)
        self.checkpointing = checkpointing

    def forward(self, x: Tensor, side: bool = True) -> Tensor:
        x = self.first(x).tanh()
        if self.checkpointing:
            reentrant = self.checkpointing == "reentrant"
            x = checkpoint(self.middle, x, use_reentrant=reentrant)
            x = checkpoint(self.middle, x, use_reentrant=reentrant)  # shared: reached twice
        else:
            x = self.middle(self.middle(x))
        return self.last(x + self.side(x) if side else x)


def batch(rank: int, step: int = 0) -> tuple[Tensor, Tensor]:
    """A batch of its own size for each rank."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    rows = 3 + 2 * rank
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


def loss_of(model: nn.Module, rank: int, step: int = 0, **options: Any) -> Tensor:
    x, y = batch(rank, step)
    return (model(x, **options) - y).square().mean()


def world_name() -> str:
    return dist.group.WORLD.group_name


def all_of(model: nn.Module, group: str, size: int) -> Reduction:
    return Reduction.of(model, [name for name, _ in model.named_parameters()], group, size)


def reducer_of(model: nn.Module, size: int, **options: Any) -> GradientReducer:
    return GradientReducer([all_of(model, world_name(), size)], **options)


def assert_mean(model: nn.Module, size: int, loss: Loss) -> None:
    """Compare with one process, which computes the mean of the losses of all ranks."""
    plain = Net()
    plain.load_state_dict(model.state_dict())
    torch.stack([loss(plain, rank) for rank in range(size)]).mean().backward()
    assert_grads(model, {n: p.grad for n, p in plain.named_parameters()})


def assert_grads(model: nn.Module, expected: dict[str, Tensor | None]) -> None:
    for name, parameter in model.named_parameters():
        want, found = expected[name], parameter.grad
        if want is None:
            assert found is None, name
        else:
            assert found is not None, name
            torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6, msg=name)


@contextmanager
def counted() -> Iterator[list[int]]:
    """Count the elements of each all-reduce."""
    sent: list[int] = []
    original = dist.all_reduce

    def count(tensor: Tensor, *args: Any, **options: Any) -> Any:
        sent.append(tensor.numel())
        return original(tensor, *args, **options)

    gradient_buckets.dist.all_reduce = count
    try:
        yield sent
    finally:
        gradient_buckets.dist.all_reduce = original


def plain_loops(rank: int, size: int) -> None:
    for options in ({}, {"bucket_bytes": 200}, {"bucket_bytes": 1}):
        model = Net()
        reducer = reducer_of(model, size, **options)
        for _ in range(2):
            model.zero_grad()
            loss_of(model, rank).backward()
            assert_mean(model, size, loss_of)
        for step in (1, 2):  # accumulates to the gradient of the loss above
            loss_of(model, rank, step).backward()
        total: Loss = lambda m, r: sum(loss_of(m, r, s) for s in range(3))  # noqa: E731
        assert_mean(model, size, total)

        model.zero_grad()
        with reducer.paused():
            loss_of(model, rank, 0).backward()
            loss_of(model, rank, 1, side=False).backward()
        local = model.first.weight.grad.clone()
        loss_of(model, rank, 2, side=False).backward()
        assert not torch.allclose(local, model.first.weight.grad)
        mixed: Loss = lambda m, r: sum(loss_of(m, r, s, side=s == 0) for s in range(3))  # noqa: E731
        assert_mean(model, size, mixed)


@pytest.mark.parametrize("size", [2, 3])
def test_equals_one_process_with_the_mean_of_the_losses(size: int) -> None:
    run_ranks(plain_loops, size, size)


def unused_somewhere(rank: int, bucket_bytes: int) -> None:
    model = Net()
    reducer = reducer_of(model, 4, bucket_bytes=bucket_bytes)
    first: Loss = lambda m, r: loss_of(m, r, side=r == 1)  # noqa: E731
    first(model, rank).backward()
    assert_mean(model, 4, first)
    assert model.unused.weight.grad is None
    grad = model.side.weight.grad
    assert grad.untyped_storage().nbytes() == 4 * grad.numel()  # does not keep a buffer alive
    loss_of(model, rank, 1, side=False).backward()
    both: Loss = lambda m, r: first(m, r) + loss_of(m, r, 1, side=False)  # noqa: E731
    assert_mean(model, 4, both)

    model.zero_grad()
    model.middle.requires_grad_(False)  # no longer sent
    with counted() as sent:
        loss_of(model, rank).backward()
    assert sum(sent) < sum(p.numel() + 1 for p in model.parameters())
    assert model.middle[0].weight.grad is None
    model.middle.requires_grad_(True)
    model.zero_grad()
    loss_of(model, rank).backward()
    assert_mean(model, 4, loss_of)

    reducer.remove()
    model.zero_grad()
    loss_of(model, rank).backward()
    single = Net()
    loss_of(single, rank).backward()
    assert_grads(model, {n: p.grad for n, p in single.named_parameters()})


@pytest.mark.parametrize("bucket_bytes", [1, 300, 25 << 20])
def test_parameters_unused_on_some_ranks(bucket_bytes: int) -> None:
    run_ranks(unused_somewhere, 4, bucket_bytes)


def buckets(rank: int) -> list[list[int]]:
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(100)))
    counts = []
    for bucket_bytes in (25 << 20, 40):
        reducer = reducer_of(model, 2, bucket_bytes=bucket_bytes)
        with counted() as sent:
            model(torch.ones(1, 1)).sum().backward()
            counts.append(sent)
        reducer.remove()
    return counts


def test_a_bucket_is_one_all_reduce() -> None:
    for counts in run_ranks(buckets, 2):
        assert counts == [[200], [20] * 10]  # a gradient and a flag each


def overlapped(rank: int) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(6)))
    reducer = reducer_of(model, 2, bucket_bytes=1)
    early: list[int] = []
    with counted() as sent:
        model[0].weight.register_post_accumulate_grad_hook(lambda _: early.append(len(sent)))
        model(torch.ones(1, 4)).sum().backward()
    assert early == [6]
    assert len(sent) == 6
    reducer.remove()


def test_sends_while_the_backward_pass_runs() -> None:
    run_ranks(overlapped, 2)


class Experts(nn.Module):
    """A dense layer, and stacked experts of which every one sees every row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.dense, self.weight = nn.Linear(3, 3), nn.Parameter(weight)

    def dense_loss(self, x: Tensor) -> Tensor:
        return self.dense(x).square().sum()

    def expert_loss(self, x: Tensor) -> Tensor:
        whole = self.weight
        own = local(whole, isinstance(whole, DTensor), 0.5)
        return torch.einsum("td,eod->teo", x, own).square().sum()


def expert_world() -> tuple[Experts, Experts, GradientReducer, int]:
    """Return a model of 4 experts over 2 x 2 ranks, the whole one, the reducer, the ep rank."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    full = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(3))
    place = mesh["ep"].get_local_rank()
    shard = DTensor.from_local(full[2 * place :][:2].clone(), mesh["ep"], [Shard(0)])
    model = Experts(shard)
    reducer = GradientReducer(
        [
            Reduction.of(model, ["dense.weight", "dense.bias"], world_name(), 4),
            Reduction.of(model, ["weight"], mesh.get_group("edp").group_name, 2),
        ]
    )
    return model, Experts(full), reducer, place


def rows(ranks: Iterable[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rows of some ranks, of each another number."""
    parts = [torch.randn(r + 1, 3, generator=torch.Generator().manual_seed(r)) for r in ranks]
    return torch.cat(parts).to(dtype)


def assert_shard(model: Experts, whole: Experts, place: int) -> None:
    grad, close = model.weight.grad, {"rtol": 1e-5, "atol": 1e-5}
    assert isinstance(grad, DTensor)
    assert grad.placements == (Shard(0),)
    assert grad.shape == whole.weight.shape
    torch.testing.assert_close(grad.to_local(), whole.weight.grad[2 * place :][:2], **close)
    torch.testing.assert_close(model.dense.weight.grad, whole.dense.weight.grad, **close)


def sharded(rank: int) -> None:
    model, whole, reducer, place = expert_world()
    # A rank's experts see the rows of both ranks of its ep group; `used` are those with any.
    for used in ((0, 1, 2, 3), (0, 1)):
        model.zero_grad()
        whole.zero_grad()
        loss = model.dense_loss(rows([rank]))
        if peers := [r for r in (rank - place, rank - place + 1) if r in used]:
            loss = loss + model.expert_loss(rows(peers))
        loss.backward()
        total = whole.dense_loss(rows(range(4))) + whole.expert_loss(rows(used))
        (total / 4).backward()
        assert_shard(model, whole, place)
    reducer.remove()


def moved(rank: int, experts_first: bool) -> None:
    model, whole, reducer, place = expert_world()
    model.double()  # exchanges the insides of a DTensor: its hooks are lost
    whole.double()

    def backward() -> None:
        model.zero_grad()
        peers = rows([rank - place, rank - place + 1], torch.float64)
        parts = [lambda: model.dense_loss(rows([rank], torch.float64))]
        parts.insert(0 if not experts_first else 1, lambda: model.expert_loss(peers))
        sum(part() for part in parts).backward()  # what came last goes first

    backward()
    x = rows(range(4), torch.float64)
    ((whole.dense_loss(x) + whole.expert_loss(x)) / 4).backward()
    assert_shard(model, whole, place)
    reducer.remove()


@pytest.mark.parametrize("experts_first", [False, True])
def test_a_model_may_be_moved_later(experts_first: bool) -> None:
    run_ranks(moved, 4, experts_first)


def test_a_shard_is_reduced_over_its_own_group() -> None:
    run_ranks(sharded, 4)


def under_ddp(rank: int, options: dict[str, Any], size: int) -> None:
    model = Net()
    side = not options.get("find_unused_parameters")
    if side:
        del model.unused
    group = dist.new_group(list(range(size)))
    reducer = GradientReducer([all_of(model, group.group_name, size)], bucket_bytes=300)
    wrapped = DistributedDataParallel(model, **options)
    loss: Loss = lambda m, r: loss_of(m, r, side=side or r == 0)  # noqa: E731
    for _ in range(3):
        model.zero_grad(set_to_none=not side)
        loss(wrapped, rank).backward()
        single = Net()
        torch.stack([loss(single, r) for r in range(size)]).mean().backward()
        assert_grads(model, {n: p.grad for n, p in single.named_parameters()})
    reducer.remove()


@pytest.mark.parametrize(
    "options", [{}, {"gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str
)
def test_under_ddp(options: dict[str, Any]) -> None:
    run_ranks(under_ddp, 2, options, 2)


def copies(rank: int) -> None:
    model = Net()
    model.__dict__["reducer"] = reducer_of(model, 2)
    clone = copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (clone, loaded):
        parameters = {id(p) for p in other.parameters()}
        assert {id(p) for p in other.reducer.reductions[0].parameters} == parameters
        loss_of(other, rank).backward()
        assert_mean(other, 2, loss_of)
    assert model.first.weight.grad is None
    clone.reducer.remove()
    loss_of(model, rank).backward()
    assert_mean(model, 2, loss_of)


def test_copies_have_their_own_hooks() -> None:
    run_ranks(copies, 2)


def test_the_first_backward_without_the_process_group_is_an_error() -> None:
    model = Net()
    model.__dict__["reducer"] = GradientReducer([all_of(model, "nowhere", 2)])
    again = copy.deepcopy(model)
    with pytest.raises(DispatchError, match=r"last\.bias.*'nowhere' of 2 ranks does not exist"):
        loss_of(again, 0).backward()


def other_group(rank: int) -> None:
    model = Net()
    reducer = reducer_of(model, 3)
    with pytest.raises(DispatchError, match="has 2 ranks instead of 3"):
        loss_of(model, rank).backward()
    reducer.remove()


def test_a_group_of_another_size_is_an_error() -> None:
    run_ranks(other_group, 2)


def test_one_rank_needs_no_group() -> None:
    model = Net()
    reducer = GradientReducer([all_of(model, "none", 1)])
    loss_of(model, 0).backward()
    assert_mean(model, 1, loss_of)
    reducer.remove()


class Stop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ZeroDivisionError("half-way")


def half_way(rank: int) -> None:
    model = Net()
    reducer = reducer_of(model, 2, bucket_bytes=100)
    kept = []
    for _ in range(2):
        x, _ = batch(rank)
        hidden = Stop.apply(model.first(x).tanh())
        with counted() as sent, pytest.raises(ZeroDivisionError) as info:
            model.last(model.middle(hidden)).sum().backward()
        kept.append(info)  # a traceback that is kept
        assert sent == []  # `unused` comes first in order and waits
        model.zero_grad()
        loss_of(model, rank).backward()
        assert_mean(model, 2, loss_of)
    reducer.remove()
    del model.unused
    reducer = reducer_of(model, 2, bucket_bytes=100)
    hidden = Stop.apply(model.first(batch(rank)[0]).tanh())
    with counted() as sent, pytest.raises(ZeroDivisionError):
        model.last(model.middle(hidden)).sum().backward()
    assert len(sent) == 1
    model.zero_grad()
    loss_of(model, rank).backward()
    single = Net()
    torch.stack([loss_of(single, r) for r in range(2)]).mean().backward()
    assert_grads(model, {n: p.grad for n, p in single.named_parameters()})
    reducer.remove()


def test_a_backward_pass_that_raised_leaves_nothing_behind() -> None:
    run_ranks(half_way, 2)


def compiled(rank: int) -> None:
    model = Net()
    reducer = reducer_of(model, 2)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        model.zero_grad()
        loss_of(fast, rank).backward()
        assert_mean(model, 2, loss_of)
    reducer.remove()


def test_compiled() -> None:
    run_ranks(compiled, 2)


def checkpointed(rank: int, kind: str) -> None:
    for bucket_bytes in (1, 25 << 20):
        model = Net(kind)
        reducer = reducer_of(model, 2, bucket_bytes=bucket_bytes)
        with counted() as sent:
            for _ in range(2):
                model.zero_grad()
                loss_of(model, rank).backward()
                assert_mean(model, 2, loss_of)
        assert len(sent) == 2 * len(reducer._buckets)

        # Nothing outside has a gradient before the nested backward passes end.
        model.zero_grad()
        model.last.requires_grad_(False)
        model.side.requires_grad_(False)
        loss_of(model, rank).backward()
        single = Net()
        torch.stack([loss_of(single, r) for r in range(2)]).mean().backward()
        expected = {n: p.grad for n, p in single.named_parameters()}
        expected |= {n: None for n in expected if n.startswith(("last", "side"))}
        assert_grads(model, expected)


@pytest.mark.parametrize("kind", ["reentrant", "saved"])
def test_checkpointed(kind: str) -> None:
    run_ranks(checkpointed, 2, kind)


def reached_late(rank: int) -> str:
    layer, x = nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True)
    reducer = reducer_of(layer, 2)
    y = layer(checkpoint(layer, x, use_reentrant=True)).sum()
    with pytest.raises(DispatchError, match="use_reentrant=False") as info:
        y.backward()
    reducer.remove()
    return str(info.value)


def test_a_gradient_after_its_bucket_was_sent_is_an_error() -> None:
    assert all(text.startswith(("bias", "weight")) for text in run_ranks(reached_late, 2))


def half_precision(rank: int) -> None:
    for dtype, value in (
        (torch.float16, 30000.0),
        (torch.float16, 2.0**-23),
        (torch.bfloat16, 3.0),
    ):
        model = nn.Linear(4, 1, bias=False).to(dtype)
        reducer = reducer_of(model, 4)
        (model.weight * torch.full_like(model.weight, value)).sum().backward()
        want = torch.full_like(model.weight, value)
        assert torch.equal(model.weight.grad, want)
        assert model.weight.grad.dtype == dtype
        reducer.remove()


def test_half_precision_neither_overflows_nor_underflows() -> None:
    run_ranks(half_precision, 4)


def sparse(rank: int) -> None:
    model = nn.Embedding(4, 2, sparse=True)
    reducer = reducer_of(model, 2)
    with pytest.raises(DispatchError, match=r"weight: gradients of layout.*sparse=False"):
        model(torch.tensor([1])).sum().backward()
    reducer.remove()


def test_sparse_gradients_are_refused() -> None:
    run_ranks(sparse, 2)


def peer_dies(rank: int) -> str:
    model = Net()
    reducer = reducer_of(model, 2)
    loss_of(model, rank).backward()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(DispatchError) as info:
        loss_of(model, rank).backward()
    reducer.remove()
    return str(info.value)


def test_a_dead_peer_is_an_error_that_names_the_bucket() -> None:
    text = run_ranks(peer_dies, 2, timeout=10.0, dies=(1,))[0]
    wanted = "rank 0: gradient reduction of unused.bias, unused.weight, last.bias and 7 more"
    assert text.startswith(f"{wanted} over 2 ranks failed")
