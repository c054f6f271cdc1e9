"""Experts over the packed, expert-major buffer: stacked MLP weights, or any modules.

Shapes: T tokens, R = T * K rows, D model width, F expert width, E experts. Rows from `offsets[-1]`
on are unused: their outputs are zeros and they get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeify.distributed.dtensor import local
from moeify.kernels import experts as _fused_experts  # noqa: F401  registers the op
from moeify.kernels import grouped_linear as _grouped_linear  # noqa: F401  registers the op
from moeify.kernels.elementwise import FUSED
from moeify.kernels.flops import register_flops
from moeify.kernels.precision import autocast_enabled
from moeify.nn.activations import activation as activation_named


class Experts(nn.Module):
    """E two-layer MLPs with stacked weights: grouped linear, activation, grouped linear.

    Args:
        experts: E.
        d_in: Input width D.
        d_ff: Hidden width F (of one half, if gated).
        d_out: Output width; D if None.
        activation: A canonical name of `moeify.nn.activations`; ignored if `inner` is given.
        gated: True computes `act(gate) * up`, where `gate` is the first half of the projection.
        bias: Whether the projections have biases.
        up_bias: Bias of the first projection alone; `bias` if None.
        down_bias: Bias of the last projection alone; `bias` if None.
        inner: Module in place of a canonical activation, called as
            `inner(hidden [R, F or 2F], *inner_rows)` and returning [R, F].
        inner_params: Names of further per-expert parameters [E, F], passed to `inner` row by row;
            ones at first.
        dropout: Probability of dropping hidden elements in training.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Attributes:
        gate_up_proj: [E, 2F, D] parameter if gated, else `up_proj` [E, F, D].
        gate_up_bias: [E, 2F] parameter or None if gated, else `up_bias` [E, F].
        down_proj: [E, d_out, F] parameter.
        down_bias: [E, d_out] parameter or None.

    Raises:
        ValueError: An unknown activation, or a number out of range.

    Source:
        The layout is that of Hugging Face transformers 5 and of grouped matmul.

    Example:
        >>> experts = Experts(experts=2, d_in=4, d_ff=8, activation="silu", gated=True, bias=False)
        >>> experts(torch.randn(3, 4), torch.tensor([1, 3], dtype=torch.int32)).shape
        torch.Size([3, 4])
    """

    gate_up_proj: Tensor
    gate_up_bias: Tensor | None
    up_proj: Tensor
    up_bias: Tensor | None
    down_proj: Tensor
    down_bias: Tensor | None

    def __init__(
        self,
        *,
        experts: int,
        d_in: int,
        d_ff: int,
        d_out: int | None = None,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        up_bias: bool | None = None,
        down_bias: bool | None = None,
        inner: nn.Module | None = None,
        inner_params: Sequence[str] = (),
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        register_flops()
        if min(experts, d_in, d_ff) < 1:
            raise ValueError(f"experts, d_in, d_ff: {experts}, {d_in}, {d_ff} must be at least 1")
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: {dropout} must be in [0, 1]")
        if inner is None:
            activation_named(activation)
            if inner_params:
                raise ValueError(f"inner_params: {inner_params} need a module `inner` to read them")
        if isinstance(inner_params, str):
            raise ValueError(f"inner_params: {inner_params!r} is one name, not a sequence of names")
        self.experts, self.d_in, self.d_ff = experts, d_in, d_ff
        self.d_out = d_in if d_out is None else d_out
        self.activation, self.gated, self.dropout = activation, gated, dropout
        self.inner, self.inner_params = inner, tuple(inner_params)
        self.sharded, self.slice_index = False, 0
        self.gradient_factor = 1.0  # of sharded weights, before ranks reduce their gradients
        first, width = ("gate_up", 2 * d_ff) if gated else ("up", d_ff)
        shapes: dict[str, tuple[int, ...] | None] = {
            f"{first}_proj": (experts, width, d_in),
            f"{first}_bias": (experts, width) if (bias if up_bias is None else up_bias) else None,
            "down_proj": (experts, self.d_out, d_ff),
            "down_bias": (experts, self.d_out)
            if (bias if down_bias is None else down_bias)
            else None,
            **dict.fromkeys(inner_params, (experts, d_ff)),
        }
        for name, shape in shapes.items():
            empty = None if shape is None else torch.empty(shape, device=device, dtype=dtype)
            self.register_parameter(name, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw each expert as two `nn.Linear` would be drawn; inner parameters become ones."""
        for name, parameter in self.named_parameters(recurse=False):
            if name in self.inner_params:
                nn.init.ones_(parameter)
                continue
            fan_in = self.d_ff if name.startswith("down") else self.d_in
            bound = 1 / math.sqrt(fan_in)
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: Tensor,
        offsets: Tensor,
        weights: Tensor | None = None,
        order: Tensor | None = None,
        slots: Tensor | None = None,
        *,
        kernel: str = "auto",
    ) -> Tensor:
        """Run every row through its expert; with `order` and `slots`, gather and combine as well.

        Under autocast rows and parameters are cast as `F.linear` would cast them.

        Args:
            x: Rows [R, D] in expert-major order; or tokens [T, D] if `order` and `slots` are given.
            offsets: [E] int32, end of each expert's rows.
            weights: [T, K] combine weights, or None for ones.
            order: [R] int32, flat route of each row.
            slots: [T, K] int32, row of each route.
            kernel: What runs it, a name of `kernels.choose.KERNELS`.

        Returns:
            [R, d_out], zeros from row `offsets[-1]` on; or [T, d_out].
        """
        if order is None or slots is None:
            return self._rows(x, offsets)
        if self.fused:
            return self._fused(x, offsets, weights, order, slots, kernel)
        rows = torch.ops.moeify.dispatch(x, order, slots)
        hidden = self._rows(rows, offsets)
        combined: Tensor = torch.ops.moeify.combine(hidden, weights, order, slots)
        return combined

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        register_flops()  # in the process that a model was unpickled in

    @property
    def fused(self) -> bool:
        """Whether one op can do it all now: no inner module, no dropout in training, one dtype."""
        drops = self.dropout > 0 and self.training
        up = self.gate_up_proj if self.gated else self.up_proj
        alike = up.dtype == self.down_proj.dtype
        return self.inner is None and self.activation in FUSED and not drops and alike

    def _fused(
        self,
        tokens: Tensor,
        offsets: Tensor,
        weights: Tensor | None,
        order: Tensor,
        slots: Tensor,
        kernel: str,
    ) -> Tensor:
        tokens, up, up_bias, down, down_bias = autocast_all(tokens, *self._up(), *self._down())
        out: Tensor = torch.ops.moeify.experts(
            tokens,
            weights,
            up,
            up_bias,
            down,
            down_bias,
            order,
            slots,
            offsets,
            self.activation,
            self.gated,
            torch.is_grad_enabled(),
            kernel,
        )[0]
        return out

    def _rows(self, rows: Tensor, offsets: Tensor) -> Tensor:
        hidden = _linear(rows, *self._up(), offsets)
        if self.inner is not None:
            hidden = self.inner(hidden, *self._inner_rows(hidden, offsets))
        else:
            hidden = self._activate(hidden)
        if self.dropout > 0:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return _linear(cast_for(self.down_proj, hidden), *self._down(), offsets)

    def _local(self, parameter: Tensor | None) -> Any:
        return local(parameter, self.sharded, self.gradient_factor)

    def _up(self) -> tuple[Tensor, Tensor | None]:
        first = "gate_up" if self.gated else "up"
        weight, bias = getattr(self, f"{first}_proj"), getattr(self, f"{first}_bias")
        return self._local(weight), self._local(bias)

    def _down(self) -> tuple[Tensor, Tensor | None]:
        """Return the last projection; a slice of its bias is padded, because slices are summed."""
        weight, bias = self._local(self.down_proj), self._local(self.down_bias)
        if bias is not None and bias.shape[1] != self.d_out:
            before = self.slice_index * bias.shape[1]
            bias = F.pad(bias, (before, self.d_out - before - bias.shape[1]))
        return weight, bias

    def extra_repr(self) -> str:
        inner = self.activation if self.inner is None else "inner"
        return (
            f"experts={self.experts}, {self.d_in} -> {self.d_ff} -> {self.d_out}, "
            f"{'gated ' if self.gated else ''}{inner}, dropout={self.dropout}"
        )

    def _activate(self, hidden: Tensor) -> Tensor:
        act = activation_named(self.activation)
        if not self.gated:
            return act(hidden)
        gate, up = hidden.chunk(2, dim=1)
        return act(gate) * up

    def _inner_rows(self, hidden: Tensor, offsets: Tensor) -> list[Tensor]:
        """Return each inner parameter [E, F] spread over the rows: [R, F], zeros where unused.

        A grouped linear of a column of ones is that gather, with a gradient that sums in a fixed
        order and never reads an unused row.
        """
        ones = hidden.new_ones(hidden.shape[0], 1)
        parameters = [self._local(getattr(self, name)) for name in self.inner_params]
        return [
            torch.ops.moeify.grouped_linear(ones.to(p.dtype), p[:, :, None], None, offsets)
            for p in parameters
        ]


class ModuleExperts(nn.Module):
    """Experts of any kind: expert e is a module that maps its rows [n, D] to [n, d_out].

    In eager mode every expert gets exactly its rows. How many those are is data, so under
    `torch.compile` every expert gets `capacity` rows instead, padded with zeros whose results are
    not used: one graph without breaks. Every expert runs in every forward, also with zero rows, so
    that its gradients are zeros and not None. If an expert returns a tuple, its first element is
    used, as in DeepSpeed.

    Args:
        experts: One module per expert.

    Raises:
        ValueError: No experts.

    Example:
        >>> experts = ModuleExperts([nn.Linear(4, 4), nn.Linear(4, 4)])
        >>> experts(torch.randn(3, 4), torch.tensor([1, 3], dtype=torch.int32)).shape
        torch.Size([3, 4])
    """

    def __init__(self, experts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        if len(self.experts) == 0:
            raise ValueError("experts: at least one module is needed")

    def forward(self, rows: Tensor, offsets: Tensor, capacity: int | None = None) -> Tensor:
        """Run every row through its expert.

        Args:
            rows: [R, D].
            offsets: [E] int32, end of each expert's rows.
            capacity: Upper bound of the rows per expert, R if None; read by `torch.compile` only.

        Returns:
            [R, d_out]; zeros from row `offsets[-1]` on.
        """
        if torch.compiler.is_compiling():
            return self._padded(rows, offsets, rows.shape[0] if capacity is None else capacity)
        ends: Sequence[int] = offsets.tolist()
        outputs = []
        for expert, start, end in zip(self.experts, [0, *ends[:-1]], ends, strict=True):
            outputs.append(_first_of(expert(rows[start:end])))
        unused = rows.shape[0] - ends[-1]
        padding = outputs[0].new_zeros(unused, *outputs[0].shape[1:])
        return torch.cat([*outputs, padding])

    def _padded(self, rows: Tensor, offsets: Tensor, capacity: int) -> Tensor:
        """Run every expert on `capacity` rows, of which the first ones belong to it."""
        starts = torch.cat([offsets.new_zeros(1), offsets[:-1]])
        place = torch.arange(capacity, device=rows.device)
        own = place < (offsets - starts)[:, None]
        source = torch.where(own, starts[:, None] + place, 0)
        padded = torch.where(own[..., None], rows[source], 0)
        outputs = torch.stack([_first_of(e(padded[i])) for i, e in enumerate(self.experts)])
        row = torch.arange(rows.shape[0], device=rows.device, dtype=offsets.dtype)
        expert = torch.searchsorted(offsets, row, right=True).clamp_max(len(self.experts) - 1)
        used = row < offsets[-1]
        slot = torch.where(used, row - starts[expert], 0)
        return torch.where(used[:, None], outputs[expert, slot], 0)


def _first_of(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """Return the grouped linear, with the casts of autocast."""
    rows, weight, bias = autocast_all(rows, weight, bias)
    out: Tensor = torch.ops.moeify.grouped_linear(rows, weight, bias, offsets)
    return out


def cast_for(weight: Tensor, hidden: Tensor) -> Tensor:
    """Cast what goes into a last projection that is kept in another dtype, as T5's is in float32.

    Under autocast the projection itself casts.
    """
    return hidden if autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)


def autocast_all(first: Tensor, *others: Tensor | None) -> Any:
    """Return the arguments as autocast casts those of a matmul; float64 and None stay."""
    tensors = (first, *others)
    device_type = first.device.type
    if not autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)
