"""A training run as JSON lines, for `moeify report`: a line per step, readable while it grows.

The first line with a model is preceded by one that describes the model. Numbers that are not finite
are written as "nan", "inf" and "-inf", because JSON has none.

Shapes: E experts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypedDict

from torch import Tensor, nn

from moeify.errors import MoeifyError
from moeify.plan.layer_description import describe_layer
from moeify.sites.record import conversion_of
from moeify.train.losses import live_routers, router_stats

__all__ = ["FORMAT", "VERSION", "LayerNumbers", "RunLog"]

FORMAT: Final = "moeify-run"
VERSION: Final = 2
_RESERVED: Final = ("format", "version", "step", "layers")


class LayerNumbers(TypedDict):
    """What one MoE layer did since the last line; as in `LayerStats`, with counts as numbers."""

    counts: Sequence[float]
    entropy: float
    dropped: float
    tokens: float


class RunLog:
    """Appends the numbers of a training step to a file.

    An existing file of the same model is continued, without a last line that a crash left
    unfinished. With several ranks, write on one of them.

    Args:
        path: The file, created with the first line; its folder must exist.

    Raises:
        MoeifyError: It is not a log, or that of another model; raised by `write`.

    Example:
        >>> import tempfile, torch
        >>> from moeify import moeify
        >>> nn = torch.nn
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> plan = {"layers": [{"select": "all", "experts": 4}]}
        >>> model = moeify(nn.Sequential(mlp), plan, example_inputs=torch.randn(4, 8))
        >>> _ = model(torch.randn(6, 8))
        >>> log = RunLog(os.path.join(tempfile.mkdtemp(), "run.jsonl"))
        >>> log.write(0, model, loss=2.5)
        >>> len(log.path.read_text().splitlines())
        2
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._header: str | None = None
        self._opened = False

    def write(
        self,
        step: int,
        model: nn.Module | None = None,
        *,
        layers: Mapping[str, LayerNumbers] | None = None,
        **numbers: Any,
    ) -> None:
        """Append a line; several lines of one step are read as one.

        Args:
            step: Number of the step, from 0.
            model: A converted model, whose last forward is written per layer; None or a dense model
                writes numbers alone.
            layers: What its layers did, by name, instead of the last forward.
            **numbers: Losses and the like, each a float or a tensor with one element.

        Raises:
            MoeifyError: The file cannot be continued.
            ValueError: A number has a reserved name, or the step is negative.
        """
        taken = [name for name in numbers if name in _RESERVED]
        if taken or isinstance(step, bool) or not isinstance(step, int) or step < 0:
            what = f"the number {taken[0]!r}" if taken else f"step {step!r}"
            raise ValueError(
                f"{what}: steps are whole numbers from 0, and {_RESERVED} are reserved names"
            )
        lines = []
        if model is not None:
            lines += self._model_line(model)
            if layers is None:
                layers = _last_forward(model)
        record: dict[str, Any] = {"step": step}
        record |= {name: _number(value) for name, value in numbers.items()}
        if layers:
            record["layers"] = {name: _numbers(layer) for name, layer in layers.items()}
        lines.append(json.dumps(record, allow_nan=False))
        self._open()
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write("".join(f"{line}\n" for line in lines))

    def _model_line(self, model: nn.Module) -> list[str]:
        """Return the line that describes the model, if the file does not have it yet."""
        if self._opened and self._header is not None:
            return []
        self._open()
        header = json.dumps(_describe(model), allow_nan=False)
        if self._header is not None and self._header != header:
            raise MoeifyError(f"{self.path} is the log of another model or plan; use another path")
        written, self._header = self._header, header
        return [] if written is not None else [header]

    def _open(self) -> None:
        """Check what is in the file, once, and remove an unfinished last line."""
        if self._opened:
            return
        if self.path.exists():
            data = self.path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            for number, line in enumerate(whole.decode("utf-8", "replace").splitlines(), 1):
                if not line.startswith("{"):
                    raise MoeifyError(f"{self.path}:{number}: not a log of moeify")
                if line.startswith(f'{{"format": "{FORMAT}"'):
                    self._header = line
            if len(whole) < len(data):
                if not data.startswith(b"{"):
                    raise MoeifyError(f"{self.path}: not a log of moeify")
                os.truncate(self.path, len(whole))
        self._opened = True


def _describe(model: nn.Module) -> dict[str, Any]:
    record = conversion_of(model)
    return {
        "format": FORMAT,
        "version": VERSION,
        "class": type(model).__name__,
        "plan": None if record is None else record.plan.data(),
        "layers": [] if record is None else [describe_layer(c.layer).data() for c in record.layers],
    }


def _last_forward(model: nn.Module) -> dict[str, LayerNumbers]:
    if next(live_routers(model), None) is None:
        return {}
    return {
        name: {
            "counts": stats["counts"].tolist(),
            "entropy": stats["entropy"],
            "dropped": stats["dropped"],
            "tokens": stats["tokens"],
        }
        for name, stats in router_stats(model).items()
    }


def _numbers(layer: LayerNumbers) -> dict[str, Any]:
    return {
        "counts": [_number(count) for count in layer["counts"]],
        "entropy": _number(layer["entropy"]),
        "dropped": _number(layer["dropped"]),
        "tokens": _number(layer["tokens"]),
    }


def _number(value: Any) -> float | str:
    """Return a number for JSON: whole ones as int, those that are not finite as text."""
    number = float(value.detach() if isinstance(value, Tensor) else value)
    if not math.isfinite(number):
        return str(number)
    return int(number) if number.is_integer() and abs(number) < 2**53 else number
