"""Telling what a small program computes, by its numbers.

A program is run on random numbers and compared: with the canonical activations, with itself on
scaled inputs, with itself on single values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from moeify.nn.activations import ACTIVATIONS

_probed: dict[tuple[Any, ...], tuple[str, bool, bool] | None] = {}
_norms: dict[tuple[Any, ...], bool] = {}
_MOST = 1024


def _identity(module: fx.GraphModule) -> tuple[Any, ...]:
    """Return what makes two programs the same: code, and the custom functions behind it."""
    if len(_probed) + len(_norms) > _MOST:
        _probed.clear()
        _norms.clear()
    own = tuple((repr(child), getattr(child, "owner", None)) for child in module.children())
    return module.code, own


def recognise(module: fx.GraphModule, width: int) -> tuple[str, bool, bool] | None:
    """Return (activation, gated, swap) where the program equals a canonical one, else None."""
    key = (*_identity(module), width)
    if key not in _probed:
        _probed[key] = _probe(module, width)
    return _probed[key]


def _probe(module: fx.GraphModule, width: int) -> tuple[str, bool, bool] | None:
    """Compare outputs, and gradients too: a custom function may have a gradient of its own."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    hidden = torch.randn(4, width, generator=generator, device="cpu") * 3
    candidates: list[tuple[int, int | None, bool, bool]] = []
    try:
        got, slope = _run(module, hidden)
    except RuntimeError:  # a custom operator without a gradient
        return None
    if got.shape == hidden.shape:
        candidates.append((0, None, False, False))
    elif got.shape[-1] * 2 == width:
        candidates += [(0, 1, True, False), (1, 0, True, True)]
    for name, function in ACTIVATIONS.items():
        for gate, linear, gated, swap in candidates:

            def canonical(
                hidden: Tensor, f: Any = function, gate: int = gate, linear: int | None = linear
            ) -> Tensor:
                halves = (hidden,) if linear is None else hidden.chunk(2, -1)
                out: Tensor = f(halves[gate])
                return out if linear is None else out * halves[linear]

            want, want_slope = _run(canonical, hidden)
            if torch.allclose(got, want, rtol=1e-5, atol=1e-6) and torch.allclose(
                slope, want_slope, rtol=1e-3, atol=1e-4
            ):
                return name, gated, swap
    return None


def _run(function: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's output and its gradient for one fixed direction, in evaluation mode."""
    hidden = hidden.detach().requires_grad_()
    module = function if isinstance(function, nn.Module) else None
    if module is not None:
        module.eval()
    try:
        with torch.enable_grad():
            out = function(hidden)
            direction = torch.linspace(-1, 1, out.numel()).reshape(out.shape)
            slope = torch.zeros_like(hidden)
            if out.requires_grad:
                slope = torch.autograd.grad(out, hidden, direction)[0]
    finally:
        if module is not None:
            module.train()
    return out.detach(), slope


def only_normalises(module: fx.GraphModule, width: int, params: int) -> bool:
    """Tell whether a program is a norm: unaffected by the scale of its input, and odd.

    `params` is the number of its arguments after the rows.
    """
    generator = torch.Generator(device="cpu").manual_seed(1)
    hidden = torch.randn(4, width, generator=generator, device="cpu") + 0.1
    others = [torch.randn((), generator=generator, device="cpu") for _ in range(params)]
    module.eval()
    with torch.no_grad():
        small, large = module(100 * hidden, *others), module(1600 * hidden, *others)
        mirrored = module(-100 * hidden, *others) + small
    module.train()
    if not small.isfinite().all() or torch.equal(small.sign(), small):  # a step is scale-free too
        return False
    same = torch.allclose(small, large, rtol=1e-3, atol=1e-4)
    return same and torch.allclose(mirrored, mirrored[:1].expand_as(mirrored), atol=1e-3)


def acts_elementwise(module: nn.Module) -> bool:
    """Tell by numbers whether each value that a module returns depends on one value only."""
    generator = torch.Generator(device="cpu").manual_seed(2)
    values = torch.randn(3, 4, generator=generator, device="cpu") * 2
    try:
        with torch.no_grad():
            whole = module(values)
            if not isinstance(whole, Tensor) or whole.shape != values.shape:
                return False
            alone = torch.stack([module(v.reshape(1, 1)).reshape(()) for v in values.flatten()])
    except Exception:  # the user's code, on a shape that it may not support
        return False
    return torch.allclose(whole.flatten(), alone, rtol=1e-5, atol=1e-6, equal_nan=True)
