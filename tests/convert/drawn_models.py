"""Models to draw: what their MLPs compute, how their layers are called, what they branch on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

WIDTH, HIDDEN = 6, 8
"""Model and expert width."""


@dataclass(frozen=True)
class Spec:
    """What is drawn."""

    layers: int = 1
    written: bool = False  # in the layer, not in a module of its own
    gated: bool = False
    bias: bool = True
    norm: bool = False
    activation: str = "gelu"
    limit: float = 7.0  # of what clamps
    scale: float | None = None  # an attribute that multiplies the hidden values
    again: str = "never"  # when the first projection is called once more
    length: str = "nothing"  # what depends on the length of the input
    training: str = "nothing"  # what depends on the mode
    calls: str = "once"  # how a layer is called
    batched: bool = True  # 3-D inputs
    dropout: bool = False  # of probability 0
    experts: int = 2
    top_k: int = 1


def _leaky(slope: float) -> Callable[[Tensor, float], Tensor]:
    return lambda h, k: F.leaky_relu(h, slope)


ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu": lambda h, k: F.relu(h),
    "gelu": lambda h, k: F.gelu(h),
    "gelu tanh": lambda h, k: F.gelu(h, approximate="tanh"),
    "silu": lambda h, k: F.silu(h),
    "quick gelu": lambda h, k: h * torch.sigmoid(1.702 * h),
    "relu squared": lambda h, k: F.relu(h).square(),
    "tanh": lambda h, k: torch.tanh(h),
    "leaky 0.01": _leaky(0.01),
    "leaky 0.2": _leaky(0.2),
    "relu6": lambda h, k: F.relu6(h),
    "hardtanh": lambda h, k: F.hardtanh(h, -k, k),
    "silu of clamped": lambda h, k: F.silu(h.clamp(-k, k)),
    "clamped silu": lambda h, k: F.silu(h).clamp(max=k),
    "gelu of clamped above": lambda h, k: F.gelu(h.clamp(max=k)),
    "clamped relu": lambda h, k: F.relu(h).clamp_max(k),
    "minimum": lambda h, k: torch.minimum(F.gelu(h), torch.full_like(h, k)),
    "where": lambda h, k: torch.where(h > k, k + 0.1 * (h - k), F.silu(h)),
    "softcap": lambda h, k: k * torch.tanh(F.silu(h) / k),
}


class Mlp(nn.Module):
    """Also the part of a layer that an MLP is written in."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.up = nn.Linear(WIDTH, HIDDEN, bias=spec.bias)
        if spec.gated:
            self.gate = nn.Linear(WIDTH, HIDDEN, bias=spec.bias)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=spec.bias)
        if spec.dropout:
            self.drop = nn.Dropout(0.0)
        if spec.scale is not None:
            self.factor = spec.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        hidden = self.up(x)
        act = ACTIVATIONS[spec.activation]
        hidden = act(self.gate(x), spec.limit) * hidden if spec.gated else act(hidden, spec.limit)
        if spec.scale is not None:
            hidden = hidden * self.factor
        if spec.length == "hidden":
            hidden = hidden / x.shape[-2] ** 0.5
        if spec.length == "hidden branch" and x.shape[-2] > 8:
            hidden = hidden * 0.5
        if spec.training == "hidden" and self.training:
            hidden = hidden * 0.5
        if spec.dropout:
            hidden = self.drop(hidden)
        out: Tensor = self.down(hidden)
        more = {
            "never": False,
            "training": self.training,
            "long": x.shape[-2] > 8,
            "always": True,
        }
        if more[spec.again]:
            out = out + 0.1 * self.up(x).mean(-1, keepdim=True)
        return out


class Layer(Mlp):
    """A residual layer with an MLP written in it, or a module of its own."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        if not spec.written:
            for name in ("up", "gate", "down", "drop"):
                if hasattr(self, name):
                    delattr(self, name)
            self.mlp = Mlp(spec)
        self.norm = nn.LayerNorm(WIDTH) if spec.norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        spec = self.spec
        run = self.feed_forward if spec.written else self.mlp
        y = self.norm(x)
        if spec.length == "branch" and x.shape[-2] > 8:
            y = y * 0.5
        if spec.training == "branch" and self.training:
            y = y * 0.5
        if spec.calls == "chunked":
            out = torch.cat([run(part) for part in y.split(16, -2)], -2)
        else:
            out = run(y)
        if spec.calls == "called again for long inputs" and x.shape[-2] > 8:
            out = out + run(y.flip(-2))
        return x + out


class Model(nn.Module):
    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList(Layer(spec) for _ in range(spec.layers))

    def forward(self, x: Tensor, skip: int | None = None) -> Tensor:
        for place, layer in enumerate(self.layers):
            if place == skip:
                continue
            x = layer(x)
            if self.spec.calls == "repeated":
                x = layer(x)
        return x


SPECS = st.builds(
    Spec,
    layers=st.integers(1, 3),
    written=st.booleans(),
    gated=st.booleans(),
    bias=st.booleans(),
    norm=st.booleans(),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    limit=st.sampled_from((7.0, 16.0, 20.0, 100.0)),
    scale=st.sampled_from((None, None, 0.5)),
    # Mostly the plain form of each, so that what is drawn at once is not always refused.
    again=st.sampled_from(("never",) * 6 + ("training", "long", "always")),
    length=st.sampled_from(("nothing",) * 5 + ("branch", "hidden", "hidden branch")),
    training=st.sampled_from(("nothing",) * 5 + ("branch", "hidden")),
    calls=st.sampled_from(("once",) * 4 + ("repeated", "chunked", "called again for long inputs")),
    batched=st.booleans(),
    dropout=st.booleans(),
    experts=st.integers(2, 4),
    top_k=st.integers(1, 2),
)
