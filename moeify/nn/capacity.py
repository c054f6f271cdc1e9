"""How many tokens an expert takes at most."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch


def expert_capacity(
    tokens: int, *, top_k: int, experts: int, factor: float | None, minimum: int
) -> int:
    """Return the rows per expert: `max(minimum, ceil(factor * K * T / E))`, at most T.

    Without a factor (dropless) it is T. The arithmetic is on integers, with `factor` read as the
    decimal it prints as, so that 1.1 * 10 is 11 and not 12, and a symbolic T stays symbolic.

    Source:
        Switch Transformers (Fedus et al. 2021) eq. 3; DeepSpeed MoE for K and the minimum.

    Example:
        >>> expert_capacity(64, top_k=2, experts=8, factor=1.25, minimum=4)
        20
    """
    if factor is None:
        return tokens
    ratio = Fraction(str(factor)) * top_k / experts
    fair = (tokens * ratio.numerator + ratio.denominator - 1) // ratio.denominator
    if isinstance(tokens, torch.SymInt):  # in export; the compiler traces the built-ins itself
        sym_min: Callable[..., int] = torch.sym_min
        sym_max: Callable[..., int] = torch.sym_max
        return sym_min(sym_max(fair, minimum), tokens)
    return min(max(fair, minimum), tokens)
