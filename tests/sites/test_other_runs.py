"""Constants that the example's sizes, earlier calls or the mode put into an MLP."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify import moeify
from moeify.capture.other_inputs import Sizes, resized, sizes_of
from moeify.sites.discovery import discover

D, H = 8, 24
PLAN = {"layers": [{"select": "all", "experts": 3}]}


class MLP(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(D, H), nn.Linear(H, D), how
        self.steps = 0

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        match self.how:
            case "length":
                h = h / x.shape[1] ** 0.5
            case "batch":
                h = h * (1 + 0.1 * x.shape[0])
            case "tokens":
                h = h / x.numel()
            case "branch":
                h = h if x.shape[1] < 9 else F.relu(h)
            case "single":
                h = h if x.shape[1] > 1 else h * 0.5
            case "counter":
                self.steps += 1
                h = h * min(1.0, self.steps / 3)
            case "training counter":
                self.steps += self.training
                h = h * (1 + self.steps)
            case "random":
                h = h * random.random()
            case "layers":
                self.steps += 1
                h = h * self.steps
        return self.down(h)


def x(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 5)), D)


def site(model: nn.Module, inputs: Any = None) -> Any:
    found = discover(model, x() if inputs is None else inputs)
    assert len(found.sites) == 1, found.near_misses
    return found.sites[0]


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("length", "length 16: a constant of `div` is 4.0 instead of 2.23"),
        ("batch", "a batch of 3 and length 16: a constant of `mul` is 1.3 instead of 1.2"),
        ("tokens", "a constant of `div` is 384 instead of 80"),
        ("branch", "it computes another program instead of gelu"),
        ("single", "length 1: it computes another program instead of gelu"),
        ("counter", "a constant of `mul` is 0.66"),
        ("training counter", "in training mode: it computes another program instead of gelu"),
        ("random", "a constant of `mul` is 0."),
    ],
)
def test_what_changes_is_no_constant(how: str, text: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), MLP(how))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = site(model)
    assert found.install == "refused"
    assert text in found.reason
    assert "between its projections it does something else" in found.reason
    assert model[1].steps == 0
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_random_constant_is_none() -> None:
    """Also where the random state is the same in the first run of each mode."""

    class Once(MLP):
        def forward(self, x: Tensor) -> Tensor:
            factor = 1.0 if self.training else random.random()
            return self.down(F.gelu(self.up(x)) * factor)

    assert site(nn.Sequential(nn.Linear(D, D), Once(""))).install == "refused"


def test_two_runs_of_one_mlp_that_differ() -> None:
    mlp = MLP("layers")
    found = site(nn.Sequential(nn.Linear(D, D), mlp, nn.LayerNorm(D), mlp))
    assert found.install == "refused"
    assert "when it runs again: " in found.reason


@pytest.mark.parametrize("shape", [(2, 5, D), (2, 1, D), (4, D), (1, 3, D), (1, 1, D)])
def test_an_ordinary_mlp_of_any_shape(shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(D, D), MLP(""))
    assert site(model, torch.randn(shape)).install == "module"


class Fixed(nn.Module):
    """Runs on inputs of few sizes only."""

    def __init__(self, sizes: set[tuple[int, int]], how: str = "") -> None:
        super().__init__()
        self.sizes, self.mlp, self.stem = sizes, MLP(how), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        if (x.shape[0], x.shape[1]) not in self.sizes:
            raise ValueError("not this size")
        return self.mlp(self.stem(x))


@pytest.mark.parametrize("other", [(3, 2), (3, 5), (3, 16), (2, 5)])
def test_models_of_fixed_sizes(other: tuple[int, int]) -> None:
    """Some other size is tried until one runs; the same size at last."""
    assert site(Fixed({(2, 5), other})).install == "module"
    assert site(Fixed({(2, 5), other}, "counter")).install == "refused"
    if other[0] == 3:
        assert site(Fixed({(2, 5), other}, "batch")).install == "refused"


def test_models_that_read_values_run_on_real_tensors() -> None:
    class Reads(nn.Module):
        def __init__(self, how: str) -> None:
            super().__init__()
            self.stem, self.mlp = nn.Linear(D, D), MLP(how)

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                return x
            return self.mlp(self.stem(x))

    for how in ("length", "counter"):
        found = discover(Reads(how), x())
        assert found.capture.mode == "real"
        assert found.sites[0].install == "refused"
    assert site(Reads("")).install == "module"


def test_sizes() -> None:
    ids, mask = torch.arange(10).reshape(2, 5), torch.ones(2, 5)
    inputs = {"input_ids": ids, "mask": mask, "wide": torch.ones(2, 1, 5, 5), "flag": True}
    sizes = sizes_of(inputs)
    assert sizes == Sizes(2, 5)
    assert str(sizes) == "a batch of 2 and length 5"
    made = resized(inputs, Sizes(2, 5), Sizes(3, 11))
    assert made["flag"] is True
    assert made["input_ids"].shape == (3, 11)
    assert made["wide"].shape == (3, 1, 11, 11)
    assert int(made["input_ids"].max()) == 9
    assert sizes_of(torch.randn(2, 3, 8, 8)) == Sizes(2, None)
    assert sizes_of([torch.randn(4, 8)]) == Sizes(4, None)
    assert sizes_of({"n": 3}) is None
    rows = resized(torch.randn(2, 5, 5), Sizes(2, 5), Sizes(3, 11))
    assert rows.shape == (3, 11, 5)


def test_what_was_refused_stays_exact() -> None:
    """The other MLPs of such a model are converted, and the model is right at other sizes."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(D, D), MLP("length"), MLP("")).eval()
    moe = nn.Sequential(nn.Linear(D, D), MLP("length"), MLP("")).eval()
    moe.load_state_dict(dense.state_dict())
    moeify(moe, PLAN, example_inputs=x())
    assert isinstance(moe[1], MLP)
    assert not isinstance(moe[2], MLP)
    for shape in ((2, 5), (1, 1), (3, 17)):
        torch.testing.assert_close(moe(v := x(*shape)), dense(v), rtol=1e-5, atol=1e-6)


class Cut(MLP):
    """Changes the gradient of its hidden value without changing the value."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.up(x))
        match self.how:
            case "no_grad":
                with torch.no_grad():
                    scale = h.abs().mean(-1, keepdim=True)
                h = h / (1 + scale)
            case "all of it":
                with torch.no_grad():
                    return self.down(h * 2)
            case "hook":
                if h.requires_grad:
                    h.register_hook(lambda grad: grad * 2)
            case "kept":
                if h.requires_grad:
                    h.retain_grad()
            case "grad mode":
                h = F.relu(h) if torch.is_grad_enabled() else h
            case "frozen":
                with torch.set_grad_enabled(not self.training):
                    h = h * 2
        return self.down(h)


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("no_grad", "in training mode it is not such an MLP: `abs` between its projections runs"),
        ("all of it", "between its projections runs without gradients"),
        ("hook", "its hidden value is also used by `register_hook`"),
        ("kept", "its hidden value is also used by `retain_grad`"),
        ("grad mode", "something else in training mode"),
        ("frozen", "`mul` between its projections runs without gradients"),
    ],
)
@pytest.mark.parametrize("trains", [True, False])
def test_what_changes_gradients(how: str, text: str, trains: bool) -> None:
    model = nn.Sequential(nn.Linear(D, D), Cut(how)).requires_grad_(trains)
    found = site(model)
    if how in ("hook", "kept") and not trains:  # there is no gradient
        assert found.install == "module"
        return
    assert found.install == "refused"
    assert text in found.reason


def test_a_model_without_gradients() -> None:
    class Inference(nn.Sequential):
        @torch.no_grad()
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    assert site(Inference(nn.Linear(D, D), MLP(""))).install == "module"


class Dropped(nn.Module):
    """An MLP with a dropout behind it that is on at some times."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.up, self.down, self.how = nn.Linear(D, H), nn.Linear(H, D), how

    def forward(self, x: Tensor) -> Tensor:
        on = {"always": True, "never": False, "inverse": not self.training}
        return F.dropout(self.down(F.gelu(self.up(x))), 0.1, on.get(self.how, self.training))


@pytest.mark.parametrize("how", ["always", "never", "inverse", "training"])
def test_a_dropout_behind_the_mlp_is_one_of_training(how: str) -> None:
    """Any other is not taken into the block: it stays in the layer around."""
    found = discover(nn.Sequential(nn.Linear(D, D), Dropped(how)), x()).found[0]
    if how == "training":
        assert (found.placement.install, found.placement.tail_dropout) == ("module", 0.1)
    else:
        assert (found.placement.install, found.placement.tail_dropout) == ("across modules", 0.0)
