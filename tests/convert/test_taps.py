"""Blocks written across modules: what their taps hand over stays within one call of one thread."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import moeify as mf
from moeify.sites.record import conversion_of
from tests.threads import in_threads

D, H = 8, 12
PLAN = {"layers": [{"select": "all", "experts": 2}], "router": {"capacity_factor": None}}


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(D, H)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(nn.Module):
    """Like a layer of BERT; `how` makes it do something else where `flag` is set."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.first, self.last, self.how = Half(), nn.Linear(H, D), how
        self.flag = False
        self.norm = nn.LayerNorm(D)

    def mlp(self, x: Tensor) -> Tensor:
        how = self.how if self.flag else ""
        h = self.first(x)
        if how == "again":
            self.first(2 * x)
        if how == "stop":
            raise KeyError("stop")
        if how == "interrupt":
            raise KeyboardInterrupt
        if how == "skip":
            return x
        if how == "write":
            x.mul_(2)
        y = self.last(h)
        if how == "twice":
            y = self.last(h)
        return y + h.mean() if how == "leak" else y

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.mlp(x))


class Gated(nn.Module):
    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(D, H), nn.Linear(D, H), nn.Linear(H, D)
        self.how, self.flag = how, False
        self.scale = nn.Parameter(torch.ones(D))

    def forward(self, x: Tensor) -> Tensor:
        how, other = self.how if self.flag else "", x
        if how == "differs":
            other = x + 1
        elif how == "detached":
            other = x.detach()
        elif how == "cloned":
            other = x.clone()
        elif how == "viewed":
            other = x.reshape(-1, D).reshape(x.shape)
        return x + self.scale * self.down(F.silu(self.gate(x)) * self.up(other))


def convert(model: nn.Module, x: Tensor | None = None) -> nn.Module:
    mf.moeify(model, PLAN, example_inputs=torch.randn(2, 3, D) if x is None else x)
    record = conversion_of(model)
    assert record is not None
    assert all(layer.layer.site.install == "across modules" for layer in record.layers)
    return model


def assert_runs(model: nn.Module, dense: nn.Module) -> None:
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(model(x), dense(x))


def test_concurrent_forwards_do_not_meet() -> None:
    dense = nn.Sequential(*(Layer() for _ in range(3))).eval()
    model = convert(copy.deepcopy(dense)).eval()
    inputs = [torch.randn(1 + i % 3, 2 + i % 5, D) for i in range(60)]
    with torch.no_grad():
        wanted = [dense(x) for x in inputs]

    def serve(index: int) -> None:
        for x, want in zip(inputs, wanted, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(model(x), want)

    in_threads(serve)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_concurrent_training_does_not_meet(reentrant: bool | None) -> None:
    dense = nn.ModuleList(Layer() for _ in range(3))
    whole = nn.Sequential(*dense)
    model = convert(copy.deepcopy(whole))

    def gradient(layers: Any, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        y = x
        for layer in layers:
            if reentrant is None:
                y = layer(y)
            else:
                y = checkpoint(layer, y, use_reentrant=reentrant)
        return torch.autograd.grad(y.square().sum(), x)[0] if not reentrant else backward(y, x)

    def backward(y: Tensor, x: Tensor) -> Tensor:
        y.square().sum().backward()
        assert x.grad is not None
        return x.grad

    inputs = [torch.randn(2, 2 + i % 3, D) for i in range(20)]
    wanted = [gradient(whole, x) for x in inputs]

    def train(index: int) -> None:
        for x, want in zip(inputs, wanted, strict=True):
            torch.testing.assert_close(gradient(model, x), want)

    in_threads(train)


def test_replicas_of_one_model_do_not_meet() -> None:
    """What DataParallel does: shallow copies that share everything but the tables of modules."""
    dense = nn.Sequential(Layer(), Layer()).eval()
    model = convert(copy.deepcopy(dense)).eval()

    def shallow(module: nn.Module) -> nn.Module:
        replica = module._replicate_for_data_parallel()
        replica._modules = {k: shallow(m) for k, m in module._modules.items() if m is not None}
        replica._parameters = dict(module._parameters)
        return replica

    def serve(index: int) -> None:
        replica = shallow(model)
        for _ in range(40):
            with torch.no_grad():
                assert_runs(replica, dense)

    in_threads(serve)


@pytest.mark.parametrize("how", ["stop", "interrupt"])
def test_an_interrupted_forward_leaves_nothing(how: str) -> None:
    dense = Layer(how)
    model: Any = convert(copy.deepcopy(dense))
    model.flag = True
    with pytest.raises((KeyError, KeyboardInterrupt)):
        model(torch.randn(2, 5, D))
    if how == "stop":
        assert not model.first.dense.slot.is_full
    model.flag = False
    assert_runs(model, dense)
    assert not model.first.dense.slot.is_full


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("again", "first.dense was called again before last had run"),
        ("twice", "last ran before its tap first.dense"),
        ("skip", "first.dense was called, but last was not called after it"),
        ("write", "input of first.dense was changed in place before last"),
    ],
)
@pytest.mark.parametrize("compiled", [False, True])
def test_another_use_than_the_recorded_one_is_an_error(
    how: str, message: str, compiled: bool
) -> None:
    if compiled and how == "write":
        pytest.skip("a compiler copies what is written in place")
    dense = Layer(how)
    model: Any = convert(copy.deepcopy(dense))
    run = torch.compile(model, backend="aot_eager") if compiled else model
    model.flag = True
    with pytest.raises(RuntimeError, match=message) as raised:
        run(torch.randn(2, 5, D))
    assert compiled or isinstance(raised.value, mf.ForwardError)
    model.flag = False
    assert_runs(run, dense)


def test_a_hidden_value_that_is_used_elsewhere_is_nan() -> None:
    model: Any = convert(Layer("leak"))
    model.flag = True
    assert model(torch.randn(2, 5, D)).isnan().all()


def test_a_method_called_on_its_own() -> None:
    """No call of the module around bounds it, but the checks hold all the same."""
    dense = Layer("again")
    model: Any = convert(copy.deepcopy(dense))
    x = torch.randn(2, 5, D)
    torch.testing.assert_close(model.mlp(x), dense.mlp(x))
    model.flag = True
    with pytest.raises(mf.ForwardError, match="called again"):
        model.mlp(x)
    model.flag = False
    torch.testing.assert_close(model.mlp(x), dense.mlp(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_inside_the_layer(reentrant: bool) -> None:
    class Inside(Layer):
        def forward(self, x: Tensor) -> Tensor:
            y = checkpoint(self.mlp, x, use_reentrant=reentrant) if self.flag else self.mlp(x)
            return self.norm(x + y)

    dense = Inside()
    model: Any = convert(copy.deepcopy(dense))
    dense.flag = model.flag = True
    for _ in range(2):
        x, y = (torch.ones(2, 5, D).requires_grad_() for _ in range(2))
        model(x).square().sum().backward()
        dense(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("how", "refused"),
    [("differs", True), ("detached", True), ("cloned", False), ("viewed", False)],
)
def test_first_projections_have_one_input(how: str, refused: bool, compiled: bool) -> None:
    dense = Gated(how)
    model: Any = convert(copy.deepcopy(dense))
    model.flag = True
    run = torch.compile(model, backend="aot_eager") if compiled else model
    x = torch.randn(2, 5, D, requires_grad=True)
    if refused:
        with pytest.raises(RuntimeError, match="got different inputs") as raised:
            run(x)
        assert compiled or isinstance(raised.value, mf.ForwardError)
    else:
        torch.testing.assert_close(run(x), dense(x))
    model.flag = False
    assert_runs(run, dense)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_copies_hand_over_to_themselves(how: str) -> None:
    dense = nn.Sequential(Layer("skip"), Gated()).eval()
    model: Any = convert(copy.deepcopy(dense)).eval()
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    assert other[0].first.dense.slot is other[0].last.tap_reader.slots[0]
    assert other[0].first.dense.slot is not model[0].first.dense.slot
    assert_runs(other, dense)
    other[0].flag = True
    with pytest.raises(mf.ForwardError, match="was not called after it"):
        other(torch.randn(2, 5, D))
    assert not model[0].first.dense.slot.is_full


def test_demoeify_and_a_failed_conversion_leave_no_hooks() -> None:
    model = nn.Sequential(Layer(), Gated())
    convert(model)
    mf.demoeify(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_in_threads(fullgraph: bool) -> None:
    """Also with a graph break between the tap and the block."""

    class Broken(Layer):
        def mlp(self, x: Tensor) -> Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.last(h)

    dense = nn.Sequential((Layer if fullgraph else Broken)()).eval()
    model = convert(copy.deepcopy(dense)).eval()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=fullgraph, dynamic=True)
    inputs = [torch.randn(2 + i % 3, 3 + i % 2, D) for i in range(12)]
    with torch.no_grad():
        wanted = [dense(x) for x in inputs]
        torch.testing.assert_close(compiled(inputs[0]), wanted[0])

    def serve(index: int) -> None:
        for x, want in zip(inputs, wanted, strict=True):
            with torch.no_grad():
                torch.testing.assert_close(compiled(x), want)

    in_threads(serve)


def test_parts_compiled_on_their_own() -> None:
    dense = nn.Sequential(Layer(), Gated())
    model: Any = convert(copy.deepcopy(dense))
    for part in (model[0].first, model[0].last, model[1].gate, model[1].down):
        part.compile(backend="aot_eager")
    for _ in range(2):
        assert_runs(model, dense)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool) -> None:
    dense = nn.Sequential(Layer(), Gated()).eval()
    model = convert(copy.deepcopy(dense)).eval()
    x = torch.randn(2, 5, D)
    program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), dense(x))
    assert_runs(model, dense)
