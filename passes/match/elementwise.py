"""Whether a custom function or operator works on each value alone, forwards and backwards.

Its own code is not recorded, so it is run: the operators that it uses must be elementwise ones,
and each value must come out as it does alone, in all magnitudes. Of an operator whose inside is
compiled only the numbers speak.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeify import compat
from moeify.passes.match.operations import CASTS, ELEMENTWISE, RESHAPES

_HARMLESS = frozenset(
    "fill copy masked_fill detach lift_fresh empty empty_like empty_strided zeros ones full "
    "scalar_tensor new_zeros new_ones new_full new_empty new_empty_strided expand is_pinned "
    "set_grad_enabled".split()
)
_KNOWN = (ELEMENTWISE | RESHAPES | CASTS | _HARMLESS) - {"softmax", "prelu", "glu"}
_MAGNITUDES = (1e-4, 0.1, 1.0, 2.0, 4.0, 10.0, 1e2, 1e3, 1e5)


def acts_elementwise(module: nn.Module) -> bool:
    """Tell whether each value that a module returns, and its gradient, depend on one value."""
    generator = torch.Generator(device="cpu").manual_seed(2)
    sizes = torch.tensor(_MAGNITUDES, device="cpu")[:, None]
    values = torch.randn(len(_MAGNITUDES), 4, generator=generator, device="cpu") * sizes
    weights = torch.randn(values.shape, generator=generator, device="cpu")
    mixing: list[str] = []
    try:
        with compat.before_each_operator(lambda *call: mixing.extend(_mixes(*call))):
            whole, slopes = _run(module, values, weights)
        if mixing or whole.shape != values.shape:
            return False
        alone = [
            _run(module, value.reshape(1, 1), weight.reshape(1, 1))
            for value, weight in zip(values.flatten(), weights.flatten(), strict=True)
        ]
    except Exception:  # the user's code, on a shape that it may not support
        return False
    singles = torch.stack([out.reshape(()) for out, _ in alone])
    single_slopes = torch.stack([slope.reshape(()) for _, slope in alone])
    return _close(whole.flatten(), singles) and _close(slopes.flatten(), single_slopes)


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


def _run(module: nn.Module, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return a module's output and the gradient of its weighted sum; zeros where it has none."""
    leaf = values.detach().requires_grad_()
    with torch.enable_grad():
        out = module(leaf)
        if not isinstance(out, Tensor):
            raise TypeError("it returns more than one tensor")
        slopes = torch.zeros_like(values)
        if out.requires_grad:
            try:
                slopes = torch.autograd.grad(out, leaf, weights.to(out.dtype))[0]
            except (RuntimeError, NotImplementedError):  # an operator without a gradient
                slopes = torch.zeros_like(values)
    return out.detach(), slopes


def _mixes(operator: Any, args: Any, kwargs: Any) -> list[str]:
    """Return the name of an operator of torch that is not elementwise, in a list."""
    space, name = compat.base_name(operator)
    if space not in ("aten", "prims") or torch.Tag.pointwise in operator.tags:
        return []
    plain = name.strip("_").removesuffix("_backward")
    if plain in _KNOWN or (plain.startswith("index_put") and _sets_masked(args)):
        return []
    return [name]


def _sets_masked(args: Any) -> bool:
    """Tell whether an `index_put` is `value[mask] = number`."""
    target, indices, new = args[:3]
    mask = indices[0] if len(indices) == 1 else None
    is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == target.shape
    return is_mask and new.numel() == 1
