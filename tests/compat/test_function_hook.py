"""`autograd.Function.apply` is observed by thread while a context is open, and restored after."""

from __future__ import annotations

import logging
import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moeify.compat import custom_functions
from moeify.compat import function_hook as hook


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


bound = Double.apply  # before anybody watches
TORCHS_OWN = hook._APPLY.__code__


def noting(found: list[str]) -> Any:
    def around(function: type, call: Any, args: Any, kwargs: Any) -> Any:
        found.append(function.__name__)
        return call()

    return around


def test_methods_bound_before_are_seen_and_restored() -> None:
    found: list[str] = []
    x = torch.ones(2, requires_grad=True)

    def use() -> None:
        with custom_functions(noting(found)):
            assert hook._APPLY.__code__ is not TORCHS_OWN
            bound(x).sum().backward()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        use()
    assert found == ["Double"]
    assert x.grad is not None
    assert x.grad.tolist() == [2, 2]
    assert hook._APPLY.__code__ is TORCHS_OWN
    bound(x)
    assert found == ["Double"]


def test_the_outer_of_two_is_called_and_checkpoints_pass() -> None:
    outer: list[str] = []
    inner: list[str] = []
    x = torch.ones(2, requires_grad=True)
    with custom_functions(noting(outer)):
        with custom_functions(noting(inner)):
            checkpoint(bound, x, use_reentrant=True)
        bound(x)
    assert (outer, inner) == (["Double", "Double"], [])
    assert hook._APPLY.__code__ is TORCHS_OWN


def test_each_thread_has_its_own() -> None:
    mine: list[str] = []
    theirs: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with custom_functions(noting(theirs)):
            entered.set()
            leave.wait(10)
            bound(torch.ones(2))

    thread = threading.Thread(target=other)
    with custom_functions(noting(mine)):
        thread.start()
        assert entered.wait(10)
        bound(torch.ones(2))
    assert hook._APPLY.__code__ is not TORCHS_OWN  # the other thread still watches
    bound(torch.ones(2))
    leave.set()
    thread.join()
    assert (mine, theirs) == (["Double"], ["Double"])
    assert hook._APPLY.__code__ is TORCHS_OWN


def test_another_torch_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(hook, "_WRITTEN_FOR", (("__class__", "more"), ()))
    found: list[str] = []
    with caplog.at_level(logging.WARNING, "moeify"), custom_functions(noting(found)):
        assert hook._APPLY.__code__ is TORCHS_OWN
        assert bound(torch.ones(2)).tolist() == [2, 2]
    assert found == []
    assert "another autograd.Function.apply" in caplog.text
