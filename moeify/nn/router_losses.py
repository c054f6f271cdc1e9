"""The leaf module of an exported graph that keeps the router losses, as routers do in a model.

Importing this module registers every op that an exported graph may call, so that a pickled graph,
which names this module, runs in a fresh process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moeify.compat import in_backward, is_exporting
from moeify.kernels import combine as _combine  # noqa: F401
from moeify.kernels import dispatch as _dispatch  # noqa: F401
from moeify.kernels import grouped_linear as _grouped_linear  # noqa: F401
from moeify.kernels import route as _route  # noqa: F401


class RouterLosses(nn.Module):
    """Keeps the weighted sum of the losses of all gates of a graph in `last_aux_loss`.

    Args:
        coefficients: For each gate, the factors of its balance loss and of its z-loss.

    Example:
        >>> import torch
        >>> losses = RouterLosses([(0.01, 0.0)])
        >>> losses(torch.tensor(2.0), torch.tensor(9.0))
        >>> round(losses.last_aux_loss.item(), 4)
        0.02
    """

    _is_impure = True  # the call stays when dead code is removed: its effect is what it keeps

    def __init__(self, coefficients: Sequence[tuple[float, float]]) -> None:
        super().__init__()
        self.coefficients = tuple(coefficients)
        self.last_aux_loss: Tensor | None = None

    def forward(self, *losses: Tensor) -> None:
        """Keep the weighted sum of a balance loss and a z-loss per gate."""
        if is_exporting() or in_backward():
            return
        total: Tensor | None = None
        for (aux, z), balance, square in zip(
            self.coefficients, losses[::2], losses[1::2], strict=True
        ):
            loss = aux * balance + z * square
            total = loss if total is None else total + loss.to(total.device)
        self.last_aux_loss = total

    def extra_repr(self) -> str:
        return f"gates={len(self.coefficients)}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last loss: with a graph it cannot be copied."""
        return {**self.__dict__, "last_aux_loss": None}
