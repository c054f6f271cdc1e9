"""A site: one MLP of the dense model, as `find_mlps` describes it. Importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Install = Literal["module", "across modules", "refused"]

_INSTALL_TEXT = {"module": "module swapped", "across modules": "written across modules"}


@dataclass(frozen=True, slots=True)
class Projection:
    """One linear map of a site."""

    weight: str  # qualified name of the parameter
    bias: str | None
    module: str | None  # path of the module whose whole body this is; None if it is inlined
    transposed: bool  # the weight is stored `[in, out]` (Conv1D) instead of `[out, in]`
    in_features: int
    out_features: int


@dataclass(frozen=True, slots=True)
class Site:
    """One MLP: projections that share an input, elementwise ops, one projection back.

    Attributes:
        name: Unique name: the path of the module that holds the MLP, or (written across modules) of
            the smallest module around it, or of its last projection where that is not unique.
        index: Position among the installable sites in execution order, from 0; -1 if refused
            and not blocked.
        install: How it is replaced: "module" (one module is swapped), "across modules" (its first
            projections are tapped, its last one becomes the block), or "refused".
        reason: Why it was refused; empty otherwise.
        d_in: Input width.
        d_ff: Hidden width (of one half, if gated).
        d_out: Output width.
        activation: Canonical name such as "gelu", "silu", "relu", or "custom".
        gated: True if the hidden value is a product of an activated and a linear half.
        up: First projections, in the order of their use; one fused projection counts once.
        down: Last projection.
        inner: Names of further parameters inside the region (an inner norm).
        calls: How often one forward pass runs it (ALBERT: once per layer that shares it).
        dtype: Name of the parameters' dtype, such as "float32".
        itemsize: Bytes per parameter element.
        parameters: Number of parameter elements in the site.
        blocked: It is refused for what the user can change, such as half-frozen or quantised
            weights. It counts as a site, and a plan that selects it is an error.
    """

    name: str
    index: int
    install: Install
    reason: str
    d_in: int
    d_ff: int
    d_out: int
    activation: str
    gated: bool
    up: tuple[Projection, ...]
    down: Projection
    inner: tuple[str, ...] = ()
    calls: int = 1
    dtype: str = "float32"
    itemsize: int = 4
    parameters: int = field(default=0)
    blocked: bool = False

    def __str__(self) -> str:
        shape = f"{self.d_in} -> {self.d_ff} -> {self.d_out}"
        kind = f"{'gated ' if self.gated else ''}{self.activation}"
        how = _INSTALL_TEXT.get(self.install, f"refused: {self.reason}")
        return f"{self.name}: {shape}, {kind}, {how}"
