"""Recording a forward pass: what is recorded, and that the model is as before."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from moeify.capture.capture import Capture, capture
from moeify.capture.preserve import preserved
from moeify.errors import CaptureError
from moeify.passes.infra.printer import print_graph

D = 8


def ran(recorded: Capture) -> list[str]:
    """Return the operations of a capture, in order."""
    names = []
    for node in recorded.nodes:
        names.append(str(getattr(node.target, "__name__", node.target)))
    return names


def state(model: nn.Module) -> dict[str, Any]:
    """Return all of a model that could change."""
    return {
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": {k: id(v) for k, v in [*model.named_parameters(), *model.named_buffers()]},
        "grads": {k: v.grad for k, v in model.named_parameters()},
        "training": [m.training for m in model.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before.items():
        if key == "values":
            assert value.keys() == after[key].keys()
            assert all(torch.equal(v, after[key][k]) for k, v in value.items())
        elif key == "random":
            assert torch.equal(value[0], after[key][0])
            assert value[1:] == after[key][1:]
        else:
            assert value == after[key], key


class Helper:
    """A plain object that remembers."""

    def __init__(self) -> None:
        self.table: Tensor | None = None
        self.calls = 0

    def __call__(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.table is None:
            self.table = torch.ones(x.shape[-1])
        return x * self.table


class Busy(nn.Module):
    """Does everything that a forward should not."""

    def __init__(self, real: bool, fails: bool = False) -> None:
        super().__init__()
        self.real, self.fails = real, fails
        self.linear, self.drop = nn.Linear(D, D), nn.Dropout(0.5)
        self.norm = parametrizations.spectral_norm(nn.Linear(D, D))
        self.batch = nn.BatchNorm1d(D)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("moving", torch.zeros(D))
        self.plain = torch.zeros(D)
        self.counter, self.log, self.cache = 0, [0], {"a": 1}
        self.helper = Helper()

    def forward(self, x: Tensor) -> Tensor:
        self.counter += 1
        self.log.append(self.counter)
        self.cache["x"] = x
        self.last = x
        self.steps += 1
        self.moving.data.mul_(0.9).add_(1)
        self.plain.add_(1)
        self.drop.train()
        y = self.drop(self.linear(x)) + torch.rand(D) * random.random() * np.random.rand()
        y = F.batch_norm(y, self.batch.running_mean, self.batch.running_var, training=True)
        y = self.helper(self.norm(y))
        self.linear.bias.grad = torch.ones(D)
        self.register_buffer("late", torch.ones(1))
        if self.real and float(y.detach().sum()) > 1e9:
            return x
        if self.fails:
            raise ValueError("no such thing")
        return y


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(real: bool, fails: bool) -> None:
    model = Busy(real, fails).train()
    model.batch.eval()
    model.linear.register_forward_hook(lambda m, a, o: o + 0)
    x = torch.randn(4, D)
    before = state(model)
    if fails:
        with pytest.raises(CaptureError, match="no such thing"):
            capture(model, x)
    else:
        assert capture(model, x).mode == ("real" if real else "fake")
    assert_same(before, state(model))
    assert (model.counter, model.log, model.cache) == (0, [0], {"a": 1})
    assert (model.helper.calls, model.helper.table) == (0, None)
    assert torch.equal(model.plain, torch.zeros(D))


def test_preserved_copies_only_what_is_written() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    versions = [p._version for p in model.parameters()]
    before = state(model)
    with preserved(model), torch.no_grad():
        model[0].weight.view(-1)[3:].mul_(2)
        model[1].bias.data = torch.zeros(D)
        model[1].weight.requires_grad_(False)
        model.extra = nn.Linear(1, 1)
    assert_same(before, state(model))
    assert all(p.requires_grad for p in model.parameters())
    assert [p._version for p in model.parameters()][1:] == versions[1:]


@functools.lru_cache(maxsize=8)
def cached_ones(width: int) -> Tensor:
    return torch.ones(width)


_TABLES: dict[int, Tensor] = {}
_LIST: list[Tensor] = []


class Caches(nn.Module):
    """Keeps tensors in global caches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        if D not in _TABLES:
            _TABLES[D] = torch.full((D,), 2.0)
        y = self.linear(x) * cached_ones(D) * _TABLES[D]
        _LIST.append(y)
        return y


def test_global_caches_keep_no_fakes() -> None:
    model, x = Caches(), torch.randn(2, D)
    assert capture(model, x).mode == "fake"
    assert not _LIST
    assert type(model(x)) is Tensor
    _TABLES.clear(), _LIST.clear(), cached_ones.cache_clear()


_SCALE: Any = 3.0
_PAIR: Any = None


def closed_over() -> tuple[Callable[[Tensor], Tensor], Callable[[], None]]:
    kept = None

    def double(x: Tensor) -> Tensor:
        nonlocal kept
        if kept is None:
            kept = torch.full((D,), 2.0)
        return x * kept

    def reset() -> None:
        nonlocal kept
        kept = None

    return double, reset


class Variables(nn.Module):
    """Keeps tensors in global variables, and in attributes of its class."""

    table: Any = "none yet"

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        global _SCALE, _PAIR
        if isinstance(_SCALE, float):
            _SCALE = torch.full((D,), _SCALE)
        if isinstance(type(self).table, str):
            type(self).table = torch.full((D,), 2.0)
        if _PAIR is None:
            _PAIR = (torch.ones(D), torch.zeros(D))
        type(self).shift = x.sum()
        return self.linear(x) * _SCALE * type(self).table * _PAIR[0]


def test_variables_are_restored() -> None:
    model, x = Variables(), torch.randn(2, D)
    assert capture(model, x).mode == "fake"
    assert (_SCALE, _PAIR, Variables.table) == (3.0, None, "none yet")
    assert not hasattr(Variables, "shift")
    torch.testing.assert_close(model(x), model.linear(x) * 6)
    globals().update(_SCALE=3.0, _PAIR=None)


def test_a_place_that_cannot_be_restored_is_refused() -> None:
    double, reset = closed_over()

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return double(x)

    with pytest.raises(CaptureError, match=r"in `kept` of .*closed_over.*run the model once"):
        capture(Model(), torch.randn(2, D))
    reset()
    torch.testing.assert_close(Model()(torch.ones(2, D)), torch.full((2, D), 2.0))
    assert capture(Model(), torch.randn(2, D)).mode == "fake"  # filled already
    reset()


# -- the recorder


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.relu(x) + 1.0


class Everything(nn.Module):
    """Many kinds of calls."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)
        self.attention = nn.MultiheadAttention(D, 2, batch_first=True)
        self.norm = nn.LayerNorm(D)
        self.register_buffer("scale", torch.full((D,), 1.5))
        self.constant = torch.linspace(0, 1, D)

    def forward(self, x: Tensor, pair: dict[str, Tensor], flag: bool = False) -> Any:
        y = self.linear(x) * self.scale + pair["a"] - self.constant
        y[..., 0] = 2.0
        y += pair["b"]
        a, (b, c) = y[:, ::2], y.split([D // 2, D // 2], -1)
        z = self.attention(y, y, y)[0].mT.transpose(1, 2) + Swish.apply(y)
        z = scripted(z) + torch.cat([b, c], -1) + torch.ops.aten.mul.Tensor(z, z)
        out = torch.empty_like(z)
        torch.add(z, y, out=out)
        values, _ = torch.max(out, -1, keepdim=True)
        return {"z": self.norm(z).mean(), "parts": (a.sum(), values), "e": F.relu(out, True)}


@pytest.mark.parametrize("fake", [True, False])
def test_the_recorded_graph_computes_what_the_model_does(
    fake: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Everything().eval()
    if not fake:
        monkeypatch.setattr("moeify.compat.fake_mode", lambda: 1 / 0)
    inputs = {"x": torch.randn(2, 6, D), "pair": {"a": torch.randn(D), "b": torch.randn(6, D)}}
    recorded = capture(model, {**inputs, "flag": True})
    assert recorded.mode == ("fake" if fake else "real")
    holders = [n for n in recorded.graph_module.graph.nodes if n.op == "placeholder"]
    values = {"x": inputs["x"], "pair_0": inputs["pair"]["a"], "pair_1": inputs["pair"]["b"]}
    named = [values.get(str(n.target), model.constant) for n in holders]
    with torch.no_grad():
        replayed = recorded.graph_module(*named)
        expected = model(**inputs)
    flat = (expected["z"], *expected["parts"], expected["e"])
    assert len(replayed) == 4
    for got, want in zip(replayed, flat, strict=True):
        torch.testing.assert_close(got, want)


def test_custom_functions_and_scripts_are_recorded() -> None:
    model = Everything().eval()
    pair = {"a": torch.randn(D), "b": torch.randn(6, D)}
    names = ran(capture(model, (torch.randn(2, 6, D), pair)))
    assert "Swish_apply" in names
    assert "relu.default" in names  # inside the script
    assert names.count("sigmoid") == 0  # inside the function


def test_functions_that_run_modules_are_not_one_node() -> None:
    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
            return x + module(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(D, 24), nn.GELU(), nn.Linear(24, D))

        def forward(self, x: Tensor) -> Tensor:
            return Reversible.apply(x, self.inner)

    recorded = capture(Model(), torch.randn(2, D))
    assert ran(recorded) == ["linear", "gelu", "linear", "add"]


def test_calls_have_their_nodes() -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.ReLU())
    model[0].register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    model[0].register_forward_hook(lambda m, a, o: o + 1)
    recorded = capture(model, torch.randn(2, D))
    call = next(c for c in recorded.calls if c.path == "0")
    assert [n.name for n in recorded.nodes[call.start : call.end]] == ["linear"]
    assert call.plain
    assert str(call.inputs[0][1].target) == "mul"
    assert [c.path for c in recorded.chain(recorded.nodes[1])] == ["0", ""]


def test_golden(golden: Callable[[str, str], None]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(D, 24), nn.Sequential(nn.GELU(), nn.Linear(24, D)))
    golden(print_graph(capture(model, torch.randn(2, D)).graph_module), "capture.txt")


# -- falling back, and refusing


class Looks(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] == D, "the width is wrong"
        return self.linear(x) if x.sum().item() < 1e9 else x


def test_reading_values_needs_real_tensors() -> None:
    recorded = capture(Looks(), torch.randn(2, D))
    assert recorded.mode == "real"
    assert "DataDependent" in recorded.fallback


def test_meta_models() -> None:
    with torch.device("meta"):
        model, looks = nn.Linear(D, D), Looks()
    assert capture(model, torch.randn(2, D)).mode == "fake"
    with pytest.raises(CaptureError, match=r"on meta .* load its weights first"):
        capture(looks, torch.randn(2, D))


@pytest.mark.parametrize(
    ("model", "inputs", "text"),
    [
        (Looks(), torch.randn(2, 3), "AssertionError: the width is wrong"),
        (Looks(), "text", "must be a dict"),
        (nn.LazyLinear(3), torch.randn(2, D), "uninitialised"),
        (nn.Linear(D, D), {"y": torch.ones(2)}, r"unexpected keyword.*example_inputs={y: \(2,\)"),
        (torch.compile(nn.Linear(D, D)), torch.randn(2, D), "convert first, compile after"),
    ],
)
def test_clear_errors(model: nn.Module, inputs: Any, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        capture(model, inputs)


def test_scripted_modules_are_left_alone() -> None:
    scripted_module = torch.jit.script(nn.Sequential(nn.Linear(D, D), nn.Dropout(0.5)))
    model = nn.Sequential(nn.Linear(D, D), scripted_module).train()
    recorded = capture(model, torch.randn(2, D))
    assert recorded.mode == "real"
    assert "TorchScript" in recorded.fallback
    assert model.training
    assert scripted_module.training
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_operators_that_take_functions() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))

    assert capture(Branches(), torch.randn(2, D)).nodes
