"""Captures and conversions in several threads, beside forwards of other models."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import moeify as mf
from moeify import compat
from moeify.capture.on_meta import parameters_on_meta
from tests.threads import in_threads

D, H = 8, 12
PLAN = {"layers": [{"select": "all", "experts": 2}], "router": {"capacity_factor": None}}
CACHE: dict[str, Tensor] = {}


def custom(slope: float) -> Callable[[Tensor], Tensor]:
    """Return a relu whose gradient is `slope`; all have one name and one code."""

    class Act(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return torch.relu(x)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * slope * (ctx.saved_tensors[0] > 0)

    return Act.apply


class Mlp(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.act = nn.Linear(D, H), nn.Linear(H, D), act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Busy(nn.Module):
    """Keeps a tensor in a cache that all models share, and notes how many of them run at once."""

    now = most = 0

    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(nn.functional.gelu)

    def forward(self, x: Tensor) -> Tensor:
        Busy.now += 1
        Busy.most = max(Busy.most, Busy.now)
        offset = CACHE.setdefault("offset", torch.ones(D))
        time.sleep(0.02)
        out = self.mlp(x + offset)
        Busy.now -= 1
        return out


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]


def test_custom_gradients_stay_their_own() -> None:
    slopes = (1.0, 2.0, 0.5)

    def convert(index: int) -> None:
        for turn in range(2):
            model = nn.Sequential(Mlp(custom(slopes[(index + turn) % 3])), nn.LayerNorm(D))
            x = torch.randn(4, D)
            want = gradient(model, x)
            mf.moeify(model, PLAN, example_inputs=x)
            torch.testing.assert_close(gradient(model, x), want)

    in_threads(convert, 4)


def test_models_that_share_a_cache_run_one_at_a_time() -> None:
    x = torch.randn(4, D)
    models = [Busy() for _ in range(3)]
    wanted = [model(x) for model in models]

    def find(index: int) -> None:
        assert len(mf.find_mlps(models[index], x)) == 1

    def convert(index: int) -> None:
        mf.moeify(models[index], PLAN, example_inputs=x)

    for work in (find, convert):
        CACHE.clear()
        Busy.most = 0
        in_threads(work, len(models))
        assert Busy.most == 1
    assert not compat.is_fake(CACHE["offset"])
    for model, want in zip(models, wanted, strict=True):
        torch.testing.assert_close(model(x), want)


def test_exports_run_one_at_a_time() -> None:
    models = [nn.Sequential(Mlp(nn.functional.gelu)) for _ in range(3)]
    x = torch.randn(4, D)

    def export(index: int) -> None:
        graph = mf.export(models[index], x)
        torch.testing.assert_close(graph(x), models[index](x))

    in_threads(export, len(models))


def test_forwards_of_other_models_beside_conversions() -> None:
    dense = nn.Sequential(Mlp(custom(2.0)), Mlp(nn.functional.gelu))
    converted = nn.Sequential(Mlp(custom(2.0)), Mlp(nn.functional.gelu))
    x = torch.randn(4, D)
    mf.moeify(converted, PLAN, example_inputs=x)
    wanted = [gradient(model, x) for model in (dense, converted)]
    done = threading.Event()

    def work(index: int) -> None:
        if index:
            while not done.is_set():
                for model, want in zip((dense, converted), wanted, strict=True):
                    torch.testing.assert_close(gradient(model, x), want)
            return
        try:
            for _ in range(2):
                model = nn.Sequential(Mlp(custom(0.5)))
                mf.moeify(model, PLAN, example_inputs=x)
                mf.demoeify(model)
        finally:
            done.set()

    in_threads(work, 3)


def test_modules_are_built_beside_each_other() -> None:
    def build(index: int) -> None:
        for _ in range(150):
            if index % 2:
                assert not any(p.is_meta for p in nn.Sequential(nn.Linear(2, 2)).parameters())
                continue
            with parameters_on_meta():
                built = nn.Sequential(*(nn.Linear(2, 2) for _ in range(3)))
                with parameters_on_meta():
                    inner = nn.Linear(2, 2)
            assert all(p.is_meta for p in (*built.parameters(), *inner.parameters()))
            assert not nn.Linear(2, 2).weight.is_meta

    in_threads(build)


def test_a_logger_is_quiet_in_one_thread_only() -> None:
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    entered, left = threading.Barrier(2), threading.Barrier(2)

    def quiet(index: int) -> None:
        with compat.quiet_fake_tensors():
            entered.wait()
            assert logger.filter(_record()) is False
        left.wait()
        assert logger.filter(_record())

    in_threads(quiet, 2)
    assert not logger.disabled
    with compat.quiet_fake_tensors():
        in_threads(lambda index: _assert(logger.filter(_record())), 2)


def _record() -> logging.LogRecord:
    return logging.LogRecord("name", logging.ERROR, "", 0, "text", None, None)


def _assert(value: Any) -> None:
    assert value
