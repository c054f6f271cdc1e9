"""Converted models equal dense ones at points that verification never saw.

Models are drawn: what their MLPs compute, how their layers are called, what they branch on. Either
`moeify` refuses one, and leaves it as it was, or it converts it, and outputs and gradients are the
dense model's for other lengths, batches, modes and magnitudes, in threads, cast and copied. A
converted model may also refuse an input with an error of ours; it may never be silently wrong.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import Phase, event, given, settings
from torch import Tensor, nn

from moeify import moeify
from moeify.errors import MoeifyError
from moeify.nn.experts import Experts
from tests.convert.drawn_models import SPECS, WIDTH, Model, Spec

SEEN = 5
"""Length of the example that a conversion gets."""

Layout = dict[str, list[str]]

LENGTHS = (1, 3, 17, 64)
MAGNITUDES = (1e-3, 1.0, 1e2, 1e4)


def built(spec: Spec) -> Model:
    torch.manual_seed(0)
    return Model(spec).double()


def drawn(spec: Spec, length: int, magnitude: float = 1.0, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    size = (batch, length, WIDTH) if spec.batched else (length, WIDTH)
    return torch.randn(size, generator=generator, dtype=torch.float64) * magnitude


def plan(spec: Spec) -> dict[str, Any]:
    return {
        "layers": [{"select": "all", "experts": spec.experts, "top_k": spec.top_k}],
        "router": {
            "combine": "straight_through" if spec.top_k == 1 else "normalized",
            "capacity_factor": None,
        },
        "init": {"experts": "copy"},
    }


def projections(moe: nn.Module, dense: nn.Module, spec: Spec) -> Layout:
    """Return for each parameter of experts the dense ones of which it is a stack of copies."""
    found: Layout = {}
    weights = dense.state_dict()
    for name, module in moe.named_modules():
        if not isinstance(module, Experts):
            continue
        prefix = ".".join(name.split(".")[:2]) + ("." if spec.written else ".mlp.")
        for kind, parameter in module.named_parameters(recurse=False):
            what = "weight" if kind.endswith("_proj") else "bias"
            first = kind.removesuffix("_proj").removesuffix("_bias")
            names = [f"{prefix}{part}.{what}" for part in first.split("_")]
            # Which half is which depends on the activation; a copy tells.
            if not torch.equal(parameter[0], torch.cat([weights[n] for n in names])):
                names.reverse()
            assert torch.equal(parameter[0], torch.cat([weights[n] for n in names])), kind
            found[f"{name}.{kind}"] = names
    return found


def gradients(model: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """Return the gradient of each dense parameter by name; of experts, their sum.

    A projection that is used elsewhere too has a part of its gradient there.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is None or "router" in name:
            continue
        parts: list[tuple[str, Tensor]] = [(name, parameter.grad)]
        if name in layout:
            total = parameter.grad.sum(0)
            parts = list(zip(layout[name], total.chunk(len(layout[name])), strict=True))
        for dense, gradient in parts:
            found[dense] = found[dense] + gradient if dense in found else gradient
    return found


def run(
    model: nn.Module, layout: Layout, x: Tensor, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output and the gradients of the input and all parameters."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    out = model(leaf, **options)
    (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
    found = gradients(model, layout)
    if leaf.grad is not None:
        found["input"] = leaf.grad
    return out.detach(), found


def check(where: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    scale = float(theirs.abs().max()) if theirs.numel() else 0.0
    gap = float((ours.double() - theirs.double()).abs().max()) if theirs.numel() else 0.0
    assert ours.shape == theirs.shape, where
    assert gap <= tolerance * max(scale, 1e-6), f"{where}: {gap:.1e} of {scale:.1e}"


def compare(
    where: str, dense: nn.Module, moe: nn.Module, layout: Layout, x: Tensor, **options: Any
) -> None:
    """Compare one call's output and gradients; raises what the converted model refuses with."""
    want, wanted = run(dense, {}, x, **options)
    got, ours = run(moe, layout, x, **options)
    check(f"{where}: output", got, want, 1e-9)
    largest = max((float(g.abs().max()) for g in wanted.values()), default=0.0)
    for name, theirs in wanted.items():
        mine = ours.get(name, torch.zeros_like(theirs))
        # Cancellation leaves a gradient that is small beside what it is a sum of.
        floor = 1e-3 * largest
        gap = float((mine - theirs).abs().max())
        assert gap <= 1e-9 * max(float(theirs.abs().max()), floor), f"{where}: {name}: {gap:.1e}"


def outputs(model: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return [model(x) for x in inputs]


def at_once(model: nn.Module, inputs: list[Tensor]) -> list[list[Tensor]]:
    """Return the outputs of four threads that each run all inputs, in another order."""
    orders = [inputs[i:] + inputs[:i] for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda order: outputs(model, order * 3), orders))
    return [[found[i][(j - i) % len(inputs)] for j in range(len(inputs))] for i in range(4)]


def holds(spec: Spec) -> str:
    """Check all of it for one model; return whether it was converted."""
    dense = built(spec)
    seen = drawn(spec, SEEN)
    given_model = copy.deepcopy(dense)
    try:
        moe = moeify(given_model, plan(spec), example_inputs=seen)
    except MoeifyError:
        before, after = dense.state_dict(), given_model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert torch.equal(given_model.eval()(seen), dense.eval()(seen))
        return "refused"
    layout = projections(moe, dense, spec)
    refusals = 0

    def attempt(check: Callable[..., None], *args: Any, **options: Any) -> None:
        nonlocal refusals
        try:
            check(*args, **options)
        except MoeifyError:  # never silently wrong; but the next input is to be right again
            refusals += 1

    for mode in ("eval", "train"):
        dense.train(mode == "train"), moe.train(mode == "train")
        for length in LENGTHS:
            x = drawn(spec, length, batch=1 if length == 17 else 3)
            attempt(compare, f"{mode}, length {length}", dense, moe, layout, x)
        for magnitude in MAGNITUDES:
            x = drawn(spec, 3, magnitude)
            attempt(compare, f"{mode}, magnitude {magnitude:g}", dense, moe, layout, x)
        for place in range(spec.layers):
            where = f"{mode}, without layer {place}"
            attempt(compare, where, dense, moe, layout, seen, skip=place)
    dense.eval(), moe.eval()
    attempt(copies_and_threads, dense, moe, layout, [drawn(spec, length) for length in LENGTHS])
    return "converted, but refuses some inputs" if refusals else "converted"


def copies_and_threads(
    dense: nn.Module, moe: nn.Module, layout: Layout, inputs: list[Tensor]
) -> None:
    """Compare outputs in threads and of copies, and all of it after casts."""
    want = outputs(dense, inputs)
    for thread in at_once(moe, inputs):
        for ours, theirs in zip(thread, want, strict=True):
            check("in threads", ours, theirs, 1e-9)
    for how, copied in (
        ("deepcopy", copy.deepcopy(moe)),
        ("pickle", pickle.loads(pickle.dumps(moe))),
    ):
        for ours, theirs in zip(outputs(copied, inputs), want, strict=True):
            check(how, ours, theirs, 1e-9)
    dense.float(), moe.float()
    narrow = [x.float() for x in inputs]
    for ours, theirs in zip(outputs(moe, narrow), outputs(dense, narrow), strict=True):
        check("in float32", ours, theirs, 1e-4)
    dense.double(), moe.double()
    for x in inputs:
        compare("in float64 again", dense, moe, layout, x)


KINDS = {
    "clamped above": Spec(activation="clamped silu", gated=True, limit=16.0),
    "clamped on both sides": Spec(activation="hardtanh", limit=20.0, written=True),
    "clamped by relu6": Spec(activation="relu6"),
    "another slope beyond a limit": Spec(activation="where", limit=100.0),
    "capped": Spec(activation="softcap", gated=True, scale=0.5),
    "written in the layer": Spec(written=True, layers=2, gated=True, norm=True),
    "called once more in training": Spec(written=True, again="training"),
    "called once more for long inputs": Spec(again="long"),
    "divided by a function of the length": Spec(length="hidden", top_k=2),
    "a branch on the length": Spec(written=True, length="hidden branch"),
    "a branch on the number of rows": Spec(length="hidden branch", batched=False),
    "called once more for many rows": Spec(again="long", batched=False),
    "called once more for many rows, in the layer": Spec(written=True, again="long", batched=False),
    "a branch on the mode": Spec(written=True, training="branch"),
    "repeated layers": Spec(written=True, calls="repeated", layers=2),
    "chunks": Spec(written=True, calls="chunked", batched=False),
    "more calls for long inputs": Spec(written=True, calls="called again for long inputs"),
}


@pytest.mark.parametrize("spec", KINDS.values(), ids=list(KINDS))
def test_every_kind_is_refused_or_right(spec):
    holds(spec)


@pytest.mark.parametrize("gated", [True, False])
def test_plain_models_are_converted(gated):
    assert holds(Spec(gated=gated, layers=2, norm=True, activation="silu")) == "converted"


# Without shrinking: a spec is short enough to read.
@settings(deadline=None, max_examples=25, derandomize=True, phases=(Phase.generate,))
@given(SPECS)
def test_drawn_models_are_refused_or_right(spec):
    event(holds(spec))


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(SPECS)
def test_many_drawn_models_are_refused_or_right(spec):
    event(holds(spec))
