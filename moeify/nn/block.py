"""The parts of a MoE block that are not routing: the dense branch, its mix, linear experts.

Shapes: T tokens, D model width, F hidden width, E experts, R rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.distributed.dtensor import local
from moeify.kernels.grouped_linear import grouped_linear
from moeify.kernels.precision import autocast_enabled
from moeify.nn.activations import activation as activation_named


class StoredLinear(nn.Module):
    """A projection with the parameters of the dense model, in the layout they are stored in.

    The weight is [out, in], or [in, out] if transposed, with trailing ones for a convolution.
    """

    bias: nn.Parameter | None

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, *, transposed: bool
    ) -> None:
        super().__init__()
        self.weight = weight
        self.register_parameter("bias", bias)
        self.transposed = transposed

    def forward(self, tokens: Tensor) -> Tensor:
        """Project tokens [T, in] to [T, out]."""
        weight = self.weight.flatten(1) if self.weight.dim() > 2 else self.weight
        return F.linear(tokens, weight.t() if self.transposed else weight, self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, transposed={self.transposed}"


class DenseMLP(nn.Module):
    """The dense MLP beside the experts of a Residual-MoE block.

    Args:
        ups: First projections by name, in the order of their use.
        down: Name and last projection.
        activation: Canonical name; ignored if `inner` is given.
        gated: Whether the hidden value is `act(gate) * linear`.
        swap: Whether the linear half comes first.
        inner: Module in place of a canonical activation, `inner(hidden, *params)`.
        params: Parameters of `inner` by name, [F] each.
        dropout: Probability of the dropout before the last projection, in training.
    """

    def __init__(
        self,
        ups: Sequence[tuple[str, StoredLinear]],
        down: tuple[str, StoredLinear],
        *,
        activation: str,
        gated: bool,
        swap: bool,
        inner: nn.Module | None,
        params: Mapping[str, nn.Parameter],
        dropout: float,
    ) -> None:
        super().__init__()
        self.up_names = [name for name, _ in ups]
        self.down_name = down[0]
        for name, module in (*ups, down):
            self.add_module(name, module)
        self.activation, self.gated, self.swap = activation, gated, swap
        self.inner = inner
        self.param_names = list(params)
        for name, parameter in params.items():
            self.register_parameter(name, parameter)
        self.dropout = dropout

    def forward(self, tokens: Tensor) -> Tensor:
        """Run tokens [T, D] through the MLP."""
        halves = [self.get_submodule(name)(tokens) for name in self.up_names]
        if self.inner is not None:
            hidden = halves[0] if len(halves) == 1 else torch.cat(halves, -1)
            hidden = self.inner(hidden, *(getattr(self, name) for name in self.param_names))
        elif self.gated:
            first, second = halves if len(halves) == 2 else halves[0].chunk(2, -1)
            gate, linear = (second, first) if self.swap else (first, second)
            hidden = activation_named(self.activation)(gate) * linear
        else:
            hidden = activation_named(self.activation)(halves[0])
        if self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout, self.training)
        out: Tensor = self.get_submodule(self.down_name)(hidden)
        return out

    def extra_repr(self) -> str:
        kind = self.activation if self.inner is None else "inner"
        return f"{'gated ' if self.gated else ''}{kind}, dropout={self.dropout}"


class ResidualMix(nn.Module):
    """Mixes the output of the experts with that of the dense MLP.

    `coefficient`: `c0 * moe + c1 * mlp` with `c = softmax(W x + b)` (DeepSpeed's Residual-MoE).
    `add`: `moe + mlp` (DeepSpeed-MoE, Rajbhandari et al. 2022, section 4.1).
    `sigmoid`: `moe + sigmoid(w x) * mlp` (the shared expert of Qwen2-MoE).

    The coefficient's parameters are zeros at first, so that both branches start with one half.
    """

    def __init__(
        self,
        kind: str,
        width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.coefficient: nn.Linear | None = None
        if kind != "add":
            outputs = 2 if kind == "coefficient" else 1
            linear = nn.Linear(
                width, outputs, bias=kind == "coefficient", device="meta", dtype=dtype
            )
            for name, parameter in list(linear.named_parameters()):  # without drawing
                zeros = torch.zeros_like(parameter, device=device or "cpu")
                setattr(linear, name, nn.Parameter(zeros))
            self.coefficient = linear

    def forward(self, moe: Tensor, mlp: Tensor, tokens: Tensor) -> Tensor:
        """Mix two outputs [T, D] of tokens [T, D]."""
        if self.coefficient is None:
            return moe + mlp
        logits: Tensor = self.coefficient(tokens)
        if self.kind == "sigmoid":
            return moe + torch.sigmoid(logits) * mlp
        share = logits.softmax(-1)
        return share[:, :1] * moe + share[:, 1:] * mlp

    def extra_repr(self) -> str:
        return self.kind


class LinearExperts(nn.Module):
    """E square linear maps [E, D, D] with biases [E, D], for a plan's `expert: linear`."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.sharded = False

    def forward(self, rows: Tensor, offsets: Tensor) -> Tensor:
        """Run every row [R, D] through its expert; zeros from row `offsets[-1]` on."""
        weight: Tensor = local(self.weight, self.sharded)
        bias: Tensor = local(self.bias, self.sharded)
        if autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight, bias = rows.to(dtype), weight.to(dtype), bias.to(dtype)
        out: Tensor = grouped_linear(rows, weight, bias, offsets)
        return out

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"
