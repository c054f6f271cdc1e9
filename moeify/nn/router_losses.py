"""The leaf module of an exported graph that keeps the router losses, as routers do in a model.

Importing this module registers every op that an exported graph may call, so that a pickled graph,
which names this module, runs in a fresh process.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from moeify.compat import in_backward, is_exporting
from moeify.kernels import combine as _combine  # noqa: F401
from moeify.kernels import dispatch as _dispatch  # noqa: F401
from moeify.kernels import grouped_linear as _grouped_linear  # noqa: F401
from moeify.kernels import route as _route  # noqa: F401
from moeify.nn.router_bias import Balanced, BalancedGate, follow_optimizers


@dataclass(eq=False)
class _Loss:
    loss: Tensor | None = None


class _Losses(threading.local):
    def __init__(self) -> None:
        self.own = _Loss()


class RouterLosses(nn.Module):
    """Keeps the weighted sum of the losses of all gates of a graph in `last_aux_loss`.

    If gates have selection biases, it also lets them move once per step of an optimizer, as those
    of routers do.

    Args:
        coefficients: For each gate, the factors of its balance loss and of its z-loss.
        bias_updates: For each gate with a selection bias, the step of it.

    Example:
        >>> import torch
        >>> losses = RouterLosses([(0.01, 0.0)])
        >>> losses(torch.tensor(2.0), torch.tensor(9.0))
        >>> round(losses.last_aux_loss.item(), 4)
        0.02
    """

    _is_impure = True  # the call stays when dead code is removed: its effect is what it keeps

    def __init__(
        self, coefficients: Sequence[tuple[float, float]], bias_updates: Sequence[float] = ()
    ) -> None:
        super().__init__()
        self.coefficients = tuple(coefficients)
        self.bias_updates = tuple(bias_updates)
        self.found: tuple[Any, ...] = ()
        self._losses = _Losses()
        self._follow()

    @property
    def last_aux_loss(self) -> Tensor | None:
        """The loss of this thread's last forward; None before one."""
        return self._losses.own.loss

    def forward(self, *values: Any) -> None:
        """Keep the losses, and know the biases.

        Args:
            values: A balance loss and a z-loss, scalars, per gate; then a weight, a selection bias
                and pending counts per gate with a bias.
        """
        if is_exporting() or in_backward():
            return
        losses, tensors = values[: 2 * len(self.coefficients)], values[2 * len(self.coefficients) :]
        self.found = tensors
        total: Tensor | None = None
        for (aux, z), balance, square in zip(
            self.coefficients, losses[::2], losses[1::2], strict=True
        ):
            loss = aux * balance + z * square
            total = loss if total is None else total + loss.to(total.device)
        self._losses.own.loss = total

    def _follow(self) -> None:
        if self.bias_updates:
            follow_optimizers(self)

    def balanced(self) -> tuple[Balanced, ...]:
        """Return what has a selection bias, after a forward."""
        weights, biases, counts = self.found[::3], self.found[1::3], self.found[2::3]
        # Nothing is found before a forward.
        each = zip(weights, biases, counts, self.bias_updates, strict=False)
        return tuple(BalancedGate(*gate) for gate in each)

    def extra_repr(self) -> str:
        return f"gates={len(self.coefficients)}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the last loss, which cannot be copied with its graph, and found tensors."""
        return {k: v for k, v in self.__dict__.items() if k != "_losses"} | {"found": ()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._losses = _Losses()
        self._follow()
