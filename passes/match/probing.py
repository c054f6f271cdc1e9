"""What a small program does, seen from its numbers: a check on top of what its operations say.

The values reach from tiny ones over all powers of ten up to 1e5 to the infinities: two programs
that differ beyond a clamp differ here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

_SIZES = (1e-30, 1e-7, 1e-3, 0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0)
_LARGE = (14.0, 16.0, 18.0, 20.0, 25.0, 32.0, 50.0, 64.0, 100.0, 128.0, 1e3, 1e4, 65504.0, 1e5)
_FINITE = tuple(sign * size for size in (0.0, *_SIZES, *_LARGE) for sign in (1.0, -1.0))
_SPECIAL = (float("inf"), float("-inf"), float("nan"))


def same_numbers(
    module: fx.GraphModule,
    activation: Callable[[Tensor], Tensor],
    width: int,
    *,
    gated: bool,
    swap: bool,
    dtype: torch.dtype,
) -> bool:
    """Tell whether a program over rows [R, width] has the numbers and gradients of an activation.

    Wherever the program gives a number, the activation must give the same. Where the program gives
    NaN for a number, as `inf / inf` in a hand-written form, the activation may give its limit.
    """

    def canonical(hidden: Tensor) -> Tensor:
        if not gated:
            return activation(hidden)
        first, second = hidden.chunk(2, -1)
        return activation(second) * first if swap else activation(first) * second

    module.eval()  # what is compared has no dropout
    try:
        for kind in (torch.float32, torch.float64):
            exact = kind == dtype == torch.float64
            tolerance = 1e-11 if exact else 1e-5
            hidden = _grid(width, gated, swap, kind)
            got, slope = _with_slope(module, hidden)
            want, want_slope = _with_slope(canonical, hidden)
            size, unset = hidden.abs(), hidden.isnan()
            if gated:
                size = size[:, : width // 2] * size[:, width // 2 :]
                unset = unset[:, : width // 2] | unset[:, width // 2 :]
            if not _agree(got, want, size, tolerance) or not bool(got[unset].isnan().all()):
                return False
            # A gradient is near one, or near the other factor, whatever the hidden value.
            steep = torch.cat([size, size], -1) if gated else size
            slope = torch.where(hidden.isnan(), torch.nan, slope)
            if not _agree(slope, want_slope, steep.clamp(min=1), 10 * tolerance):
                return False
    except Exception:  # a program of the user's may raise anything, on numbers it never saw
        return False
    finally:
        module.train()
    return True


def _grid(width: int, gated: bool, swap: bool, dtype: torch.dtype) -> Tensor:
    """Return rows [R, width] that hold every probed value, beside several factors if gated."""
    values = torch.tensor((*_FINITE, *_SPECIAL), dtype=dtype, device="cpu")
    columns = width // 2 if gated else width
    factors = torch.tensor((1.0, -0.5, 3.0, 40.0, -1e4), dtype=dtype, device="cpu")
    count = len(values) * (len(factors) if gated else 1)
    rows = -(-count // columns)
    place = torch.arange(rows * columns, device="cpu").reshape(rows, columns)
    gate = values[place % len(values)]
    if not gated:
        return gate
    linear = factors[(place // len(values)) % len(factors)]
    return torch.cat([linear, gate] if swap else [gate, linear], -1)


def _agree(got: Tensor, want: Tensor, size: Tensor, tolerance: float) -> bool:
    """Compare where `got` is no NaN, relative to the value and to the size of what made it."""
    if got.shape != want.shape:
        return False
    size = torch.where(size.isfinite(), size, 0.0)
    both = got.isfinite() & want.isfinite()
    close = (got - want).abs() <= tolerance * want.abs() + 0.1 * tolerance * size
    return bool((torch.where(both, close, got == want) | got.isnan()).all())


def _with_slope(function: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return a function's output and the gradient of its sum."""
    hidden = hidden.detach().requires_grad_()
    with torch.enable_grad():
        out = function(hidden)
        slope = torch.zeros_like(hidden)
        if out.requires_grad:
            slope = torch.autograd.grad(out, hidden, torch.ones_like(out))[0]
    return out.detach(), slope
