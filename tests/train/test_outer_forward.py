"""Router losses belong to one forward of the model: skipped, repeated, interrupted or compiled."""

from __future__ import annotations

import copy
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import moeify as mf
from moeify.nn import outer_forward
from moeify.nn.router import Router
from moeify.sites.record import routers_of

PLAN = {
    "layers": [{"select": "all", "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None, "aux_loss": 0.5, "z_loss": 0.01},
    "init": {"router_std": 0.3},
}
X = torch.randn(12, 16, generator=torch.Generator().manual_seed(7))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Runs layers in any order, any number of times; what `breaks` names raises in between."""

    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.breaks: Callable[[], None] | None = None
        self.recompute = ""

    def forward(self, x: Tensor, order: Sequence[int] = (0, 1, 2)) -> Tensor:
        for place, index in enumerate(order):
            if place == 2 and self.breaks is not None:
                self.breaks()
            layer = self.layers[index]
            if self.recompute:
                x = checkpoint(layer, x, use_reentrant=self.recompute == "reentrant")
            else:
                x = layer(x)
        return x


def converted(layers: int = 3, **router: Any) -> Stack:
    torch.manual_seed(0)
    plan = {**PLAN, "router": {**PLAN["router"], **router}}
    inputs = {"x": X, "order": tuple(range(layers))}
    return mf.moeify(Stack(layers), plan, example_inputs=inputs).train()


def expected(model: nn.Module, *args: Any) -> Tensor:
    """Return the sum of what each call of a router gives, from the calls themselves."""
    found: list[Tensor] = []

    def add(router: Router, args: Any, routing: Any) -> None:
        found.append(router.aux_loss * routing.aux_loss + router.z_loss * routing.z_loss)

    hooks = [router.register_forward_hook(add) for _, router in routers_of(model)]
    model(*args)
    for hook in hooks:
        hook.remove()
    return torch.stack(found).sum()


def check(model: nn.Module, want: Tensor) -> None:
    """Compare losses and their gradients, by the routers' weights."""
    weights = [router.weight for _, router in routers_of(model)]
    got = mf.aux_loss(model)
    torch.testing.assert_close(got, want)
    pairs = zip(
        torch.autograd.grad(got, weights, allow_unused=True, retain_graph=True),
        torch.autograd.grad(want, weights, allow_unused=True),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


ORDERS = [(0, 1, 2), (0, 0, 0, 1, 2), (1,), (2, 1, 2, 1, 2, 1, 2, 1), (0, 2), ()]


def test_every_call_of_a_forward_counts_once_and_only_its_own() -> None:
    model = converted()
    for order in (*ORDERS, *reversed(ORDERS)):
        if not order:
            model(X, order)
            assert float(mf.aux_loss(model)) == 0
            assert mf.router_stats(model) == {}
            continue
        want = expected(model, X, order)
        check(model, want)
        tokens = {name: s["tokens"] for name, s in mf.router_stats(model).items()}
        assert tokens == {f"layers.{i}.mlp": 12 * order.count(i) for i in sorted({*order})}
        assert all(stats["masked"] == 0 for stats in mf.router_stats(model).values())
        (model(X, order).square().mean() + mf.aux_loss(model)).backward()


class Stop(BaseException):
    """Passes the hooks of modules, as KeyboardInterrupt does."""


@pytest.mark.parametrize("error", [MemoryError, Stop])
@pytest.mark.parametrize("part", ["model", "inner"])
def test_an_interrupted_forward_leaves_nothing(error: type[BaseException], part: str) -> None:
    whole = converted() if part == "model" else nn.Sequential(Stack())
    if part == "inner":
        torch.manual_seed(0)
        whole = mf.moeify(whole, PLAN, example_inputs=X).train()
    model = whole if part == "model" else whole[0]
    want = float(expected(whole, X).detach())

    def fail() -> None:
        raise error

    for again in (model, whole, model.layers[0]):
        model.breaks = fail
        with pytest.raises(error):
            model(X, (0, 0, 0))
        model.breaks = None
        again(X)
        if again is model.layers[0]:
            want = float(expected(model, X, (0,)).detach())
            again(X)
        assert float(mf.aux_loss(whole).detach()) == pytest.approx(want)


def test_the_address_of_an_interrupted_frame_may_be_used_again() -> None:
    model = converted()
    want = float(expected(model, X).detach())

    def fail() -> None:
        raise KeyboardInterrupt

    model.breaks = fail
    with pytest.raises(KeyboardInterrupt):
        model(X, (0, 0, 0))
    model.breaks = None
    assert outer_forward._threads.own.active
    outer_forward._threads.own.frame = id(sys._getframe())
    for _ in range(2):
        model.layers[0](X)  # any other module
        model(X)
    assert float(mf.aux_loss(model).detach()) == pytest.approx(want)


@pytest.mark.parametrize("kind", ["no reentrant", "whole"])
def test_checkpointing_counts_once(kind: str) -> None:
    model, order = converted(bias_update=0.1), (0, 1, 1, 0, 2)
    want = expected(model, X, order).detach()
    (model(X, order).square().mean() + mf.aux_loss(model)).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    stats = mf.router_stats(model)
    pending = [router.pending_counts.clone() for _, router in routers_of(model)]
    model.zero_grad()
    for _, router in routers_of(model):
        router.pending_counts.zero_()
    x = X.clone().requires_grad_()
    if kind == "whole":
        out = checkpoint(model, x, order, use_reentrant=False)
    else:
        model.recompute = kind
        out = model(x, order)
    loss = mf.aux_loss(model)
    (out.square().mean() + loss).backward()
    torch.testing.assert_close(loss.detach(), want)
    torch.testing.assert_close(mf.aux_loss(model).detach(), want)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(parameter.grad, grad)
    for (_, router), count in zip(routers_of(model), pending, strict=True):
        assert torch.equal(router.pending_counts * 2, count)  # `expected` ran it once more
    for name, layer in mf.router_stats(model).items():
        assert torch.equal(layer["counts"], stats[name]["counts"])


def test_each_forward_has_its_own_losses() -> None:
    model = converted()
    parts, total = [], torch.zeros(())
    for start in (0, 4, 8):
        part = X[start : start + 4]
        parts.append(expected(model, part).detach())
        model(part)
        total = total + mf.aux_loss(model)
    torch.testing.assert_close(total.detach(), torch.stack(parts).sum())
    total.backward()
    assert all(float(router.weight.grad.abs().sum()) > 0 for _, router in routers_of(model))


def test_parts_called_one_after_the_other() -> None:
    model = converted()
    wants = []
    for _ in range(2):
        x = model.layers[0](X)
        model.layers[1](x)
        model.layers[1](x)  # replaces the one before
        loss = mf.aux_loss(model)
        wants.append(float(loss.detach()))
        loss.backward()
    assert wants[0] == pytest.approx(wants[1])
    model.layers[0](X)  # the other layer's loss is read, and of an earlier forward
    alone = float(mf.aux_loss(model).detach())
    assert alone == pytest.approx(float(expected(model, X, (0,)).detach()))
    assert alone < wants[0]


def test_threads_do_not_see_each_other() -> None:
    model = converted()
    parts = torch.randn(4, 12, 16, generator=torch.Generator().manual_seed(3)).unbind()
    want = [float(expected(model, part).detach()) for part in parts]
    wrong: list[Any] = []

    def run(index: int) -> None:
        try:
            for _ in range(20):
                loss = None
                model(parts[index])
                loss = mf.aux_loss(model)
                if float(loss.detach()) != pytest.approx(want[index]):
                    wrong.append((index, float(loss.detach())))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"]
)
def test_copies_collect_their_own(duplicate: Any) -> None:
    model = converted()
    model(X)
    other = duplicate(model)
    check(other, expected(other, X, (0, 0, 1)))
    check(model, expected(model, X, (1, 1)))
    part = duplicate(model.layers[0])
    assert sum(isinstance(m, Router) for m in part.modules()) == 1
    part(X)
    assert float(mf.aux_loss(part).detach()) > 0


def test_demoeify_leaves_no_hooks() -> None:
    torch.manual_seed(0)
    model = mf.demoeify(mf.moeify(Stack(), PLAN, example_inputs=X))
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks, name
        assert not module._forward_hooks, name
        assert not module._forward_hooks_always_called, name


WAYS = ["model", "in place", "layers", "step"]


@pytest.mark.parametrize("way", WAYS)
def test_compiled(way: str) -> None:
    torch._dynamo.reset()
    model = converted(4, bias_update=0.1)
    counter = CompileCounterWithBackend("aot_eager")
    options: dict[str, Any] = {"fullgraph": True, "backend": counter}
    order = (0, 1, 2, 3, 3, 3)
    want = expected(model, X, order)
    sums = [router.pending_counts.clone() for _, router in routers_of(model)]

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        out = model(x, order)
        return out, mf.aux_loss(model)

    run: Any = step
    if way == "model":
        compiled = torch.compile(model, **options)
        run = lambda x: (compiled(x, order), mf.aux_loss(model))  # noqa: E731
    elif way == "in place":
        model.compile(**options)
    elif way == "layers":
        for layer in model.layers:
            layer.compile(**options)
    else:
        run = torch.compile(step, **options)
    frames = []
    for _ in range(3):
        out, loss = run(X)
        torch.testing.assert_close(loss, want)
        (out.square().mean() + loss).backward()
        frames.append(counter.frame_count)
        assert mf.router_stats(model)["layers.3.mlp"]["tokens"] == 36
    assert frames[0] == frames[-1]
    for (_, router), counts in zip(routers_of(model), sums, strict=True):
        assert torch.equal(router.pending_counts, 4 * counts)


def test_compiled_layers_in_an_eager_checkpoint_count_once() -> None:
    torch._dynamo.reset()
    model, order = converted(bias_update=0.1), (0, 1, 1, 2)
    want = expected(model, X, order).detach()
    pending = [router.pending_counts.clone() for _, router in routers_of(model)]
    counter = CompileCounterWithBackend("aot_eager")
    for layer in model.layers:
        layer.compile(fullgraph=True, backend=counter)
    model.recompute = "not reentrant"
    for number in (2, 3):
        out = model(X.clone().requires_grad_(), order)
        loss = mf.aux_loss(model)
        (out.square().mean() + loss).backward()
        torch.testing.assert_close(loss.detach(), want)
        torch.testing.assert_close(mf.aux_loss(model).detach(), want)
        for (_, router), counts in zip(routers_of(model), pending, strict=True):
            assert torch.equal(router.pending_counts, number * counts)
    assert counter.frame_count == 4  # a second call of a layer adds to the first one


def test_a_plain_loop_that_never_reads_the_losses_is_warned_once(caplog: Any) -> None:
    for reads, warned in ((False, 1), (True, 0)):
        model = converted()
        with caplog.at_level(logging.WARNING, "moeify"):
            for _ in range(3):
                loss = model(X).square().mean()
                if reads:
                    loss = loss + mf.aux_loss(model)
                loss.backward()
        assert [r.message[:31] for r in caplog.records] == [
            "the router losses of the last t"
        ] * warned
        caplog.clear()
    model = converted(aux_loss=0.0, z_loss=0.0)
    with caplog.at_level(logging.WARNING, "moeify"):
        for _ in range(2):
            model(X).sum().backward()
        model = converted()
        for _ in range(2):
            model.eval()(X)
        with torch.no_grad():
            model.train()(X), model(X)
    assert caplog.records == []


def hugging_face(name: str) -> nn.Module:
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 99}
    small["num_attention_heads"] = 4
    torch.manual_seed(0)
    if name == "bert":
        config = transformers.BertConfig(**small, chunk_size_feed_forward=4)
        dense: nn.Module = transformers.BertForMaskedLM(config)
    elif name == "albert":
        config = transformers.AlbertConfig(**small | {"num_hidden_layers": 3}, embedding_size=16)
        dense = transformers.AlbertForMaskedLM(config)
    else:
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = transformers.T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0)
        dense = transformers.T5ForConditionalGeneration(config)
    for module in dense.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return mf.moeify(dense, PLAN, verify=False).train()


@pytest.mark.parametrize("name", ["bert", "albert", "t5"])
def test_hugging_face_losses_hold_the_losses_of_all_calls(name: str) -> None:
    model = hugging_face(name)
    for length in (12, 32, 8):  # 3, 8 and 2 chunks
        tokens = torch.randint(3, 90, (2, length))
        inputs = {"input_ids": tokens, "labels": tokens}
        model.eval()
        task = model(**inputs).loss
        model.train()
        want = expected_of(model, inputs)
        got = model(**inputs).loss
        torch.testing.assert_close(got, task + want)
        got.backward()
        part = model.get_submodule(model.base_model_prefix) if name != "t5" else model.encoder
        stop = part.register_forward_hook(interrupt)
        with pytest.raises(Stop):
            model(**inputs)
        stop.remove()


def interrupt(*_: Any) -> None:
    raise Stop


def expected_of(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    run = nn.Module()
    run.model = model
    run.forward = lambda: model(**inputs)  # type: ignore[method-assign]
    return expected(run)


def test_layer_drop() -> None:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        conv_dim=[16, 16],
        conv_kernel=[8, 4],
        conv_stride=[4, 2],
        num_feat_extract_layers=2,
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        layerdrop=0.5,
        mask_time_prob=0.0,
    )
    model = mf.moeify(transformers.Wav2Vec2ForCTC(config), PLAN).train()
    ran = set()
    for _ in range(6):
        out = model(input_values=torch.randn(2, 400), labels=torch.randint(1, 30, (2, 4)))
        out.loss.backward()
        ran.add(len(mf.router_stats(model)))
    assert len(ran) > 1
