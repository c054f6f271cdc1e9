"""Router statistics in the logs of a Hugging Face `Trainer`.

Imported on first use of `moeify.RouterCallback`, because it needs transformers. Sums are kept on
the model's device; the host waits for it only when a log is due.

Shapes: E experts.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback

from moeify.train.losses import live_routers
from moeify.train.run_log import LayerNumbers, RunLog

__all__ = ["RouterCallback"]

log = logging.getLogger("moeify")


class _Sums:
    """Sums of the routers' statistics and losses over forwards."""

    def __init__(self) -> None:
        self.layers: dict[str, Tensor] = {}
        self.losses: Tensor | None = None

    def add(self, model: nn.Module) -> None:
        """Add the model's last forward, without waiting for the device."""
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
        """Return the values over all ranks, for the logs and by layer; collective."""
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


class RouterCallback(TrainerCallback):
    """Adds router statistics to `Trainer`'s logs, and so to TensorBoard and the like.

    `RouterCallback().attach(trainer)` puts it before the reporters, which then show its values.
    `Trainer(..., callbacks=[RouterCallback()])` puts it behind them: its values are in
    `trainer.state.log_history`, on the console and in the run log, but no reporter sees them.

    Each log of the training loss gets, over all tokens of all ranks since the last one, for each
    layer

    - `router/<layer>/load_max` and `load_min`: routes of the fullest and of the emptiest expert,
      before dropping, relative to an even load;
    - `router/<layer>/entropy`: mean entropy of the router's distribution per token, in nats;
    - `router/<layer>/dropped`: fraction of the routes that found their expert full;

    and `router/aux_loss`, the mean of `moeify.aux_loss(model)` over the micro-batches.

    Args:
        run_log: File for a `RunLog`, in which the first rank writes the load of every expert and
            the logged numbers at every log. None writes none.
    """

    def __init__(self, run_log: str | os.PathLike[str] | None = None) -> None:
        self._sums = _Sums()
        self._log = None if run_log is None else RunLog(run_log)
        self._attached = False

    def attach(self, trainer: Any) -> RouterCallback:
        """Put this callback into a `Trainer`, before all that read its logs, and return it.

        Args:
            trainer: Created already, with or without this callback in its list.
        """
        callbacks = trainer.callback_handler.callbacks
        callbacks[:] = [self, *(other for other in callbacks if other is not self)]
        self._attached = True
        return self

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset the sums, and warn if reporters would miss the routers' values."""
        self._sums = _Sums()
        if args.report_to and not self._attached and state.is_world_process_zero:
            log.warning(
                "RouterCallback is behind the reporters (%s), which will not show its values: "
                "instead of callbacks=[...], call RouterCallback().attach(trainer)",
                ", ".join(args.report_to),
            )

    def on_step_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Add a micro-batch."""
        self._sums.add(model)

    on_substep_end = on_step_end  # of a micro-batch that is not the step's last

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: Any = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Add the routers' values to a log of the training loss."""
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
