"""What the routers do, in the logs of a Hugging Face `Trainer`.

The class is made on first use, because its base lives in transformers, which importing moeify does
not import. Sums are kept on the model's device; nothing waits for it before a log is due.

Shapes: E experts.
"""

from __future__ import annotations

import inspect
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeify.losses import live_routers
from moeify.run_log import LayerNumbers, RunLog

__all__ = ["RouterCallback"]


class _Sums:
    """Sums over forwards of what the routers left behind."""

    def __init__(self) -> None:
        self.layers: dict[str, Tensor] = {}
        self.losses: Tensor | None = None

    def add(self, model: nn.Module) -> None:
        """Add the model's last forward; runs on the device alone."""
        loss: Tensor | None = None
        for name, router in live_routers(model):
            stats, own = router.last_stats, router.last_aux_loss
            if stats is None or own is None:
                continue
            counts = stats["counts"].detach().to(torch.float64)
            tokens = torch.as_tensor(stats["tokens"], device=counts.device).to(counts)
            means = torch.stack([stats["entropy"].to(counts), stats["dropped"].to(counts)])
            sums = torch.cat([counts, means * tokens, tokens.view(1)])
            self.layers[name] = self.layers[name] + sums if name in self.layers else sums
            own = own.detach().to(torch.float64)
            loss = own if loss is None else loss + own.to(loss.device)
        if loss is not None:
            pair = torch.stack([loss, torch.ones_like(loss)])
            self.losses = pair if self.losses is None else self.losses + pair

    def read(self) -> tuple[dict[str, float], dict[str, LayerNumbers]]:
        """Return the values over all ranks, and each layer's; every rank must call it."""
        layers: dict[str, LayerNumbers] = {}
        if self.losses is None:
            return {}, layers
        names, device = list(self.layers), self.losses.device
        parts = [self.losses, *(sums.to(device) for sums in self.layers.values())]
        packed = torch.cat(parts)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(packed)
        host = torch.split(packed.cpu(), [part.numel() for part in parts])
        total, forwards = host[0].tolist()
        values = {"router/aux_loss": total / forwards}
        for name, sums in zip(names, host[1:], strict=True):
            counts, (entropy, dropped, tokens) = sums[:-3], sums[-3:].tolist()
            even = max(float(counts.mean()), 1.0 / counts.numel())
            entropy, dropped = entropy / max(tokens, 1.0), dropped / max(tokens, 1.0)
            values[f"router/{name}/load_max"] = float(counts.max()) / even
            values[f"router/{name}/load_min"] = float(counts.min()) / even
            values[f"router/{name}/entropy"] = entropy
            values[f"router/{name}/dropped"] = dropped
            layers[name] = {
                "counts": counts.tolist(),
                "entropy": entropy,
                "dropped": dropped,
                "tokens": tokens,
            }
        return values, layers


def _before_reporters(callback: Any, handler_class: Any, first: type) -> None:
    """Put a callback right behind the one that steers the loop, so that reporters come after it.

    `Trainer` puts a user's callbacks behind TensorBoard's and the like, which would read the logs
    too early, and tells a callback nothing of its list; the caller's frames know it.
    """
    frame = inspect.currentframe()
    while frame is not None:
        handler: Any = frame.f_locals.get("self")
        if isinstance(handler, handler_class):
            callbacks = handler.callbacks
            callbacks.remove(callback)
            places = [i + 1 for i, other in enumerate(callbacks) if isinstance(other, first)]
            callbacks.insert(min(places, default=0), callback)
            return
        frame = frame.f_back


def _make() -> type:
    from transformers.trainer_callback import (
        CallbackHandler,
        DefaultFlowCallback,
        TrainerCallback,
    )

    class RouterCallback(TrainerCallback):
        """Adds what the routers did to `Trainer`'s logs, so also to TensorBoard and the like.

        `Trainer(..., callbacks=[moeify.RouterCallback()])`. With each log of the training loss
        come, over all tokens of all ranks since the last one, for each layer

        - `router/<layer>/load_max` and `load_min`: routes of the fullest and of the emptiest
          expert, before dropping, over the even share, which is 1;
        - `router/<layer>/entropy`: mean entropy of the router's distribution per token, in nats;
        - `router/<layer>/dropped`: fraction of the routes that found their expert full;

        and `router/aux_loss`, the mean of `moeify.aux_loss(model)` over the micro-batches.

        Args:
            run_log: File for a `RunLog`, which the first rank writes at every log: the load of
                every expert, and the numbers that are logged. None writes none.
        """

        def __init__(self, run_log: str | os.PathLike[str] | None = None) -> None:
            self._sums = _Sums()
            self._log = None if run_log is None else RunLog(run_log)

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._sums = _Sums()
            _before_reporters(self, CallbackHandler, DefaultFlowCallback)

        def on_substep_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            self._sums.add(model)

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            self._sums.add(model)

        def on_log(
            self,
            args: Any,
            state: Any,
            control: Any,
            logs: Any = None,
            model: Any = None,
            **kwargs: Any,
        ) -> None:
            if logs is None or "train_runtime" in logs:  # the last summary
                return
            numbers = {k: v for k, v in logs.items() if isinstance(v, int | float)}
            if "loss" not in logs:  # an evaluation's
                self._write(state, None, numbers, {})
                return
            values, layers = self._sums.read()
            self._sums = _Sums()
            if "router/aux_loss" in values:
                numbers["router/aux_loss"] = values["router/aux_loss"]
            self._write(state, model, numbers, layers)
            logs.update(values)
            if state.log_history:
                state.log_history[-1].update(values)

        def _write(
            self, state: Any, model: Any, numbers: dict[str, Any], layers: dict[str, LayerNumbers]
        ) -> None:
            if self._log is not None and state.is_world_process_zero:
                known = {k: v for k, v in numbers.items() if k != "step"}
                self._log.write(state.global_step, model, layers=layers, **known)

    RouterCallback.__qualname__ = "RouterCallback"
    return RouterCallback


if TYPE_CHECKING:
    RouterCallback: Any
else:

    def __getattr__(name: str) -> Any:
        if name != "RouterCallback":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = _make()
        return globals()[name]
