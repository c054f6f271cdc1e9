"""Proof of a conversion: every tensor accounted for, and the same numbers as the dense model.

Compared at step 0, in evaluation mode and without capacity limits: the outputs, and the gradients
by all dense weights. Those that were replaced get theirs from the experts (`dense_gradients`), so
that a wrong gradient is found whatever else trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moeify import compat
from moeify.capture.capture import ExampleInputs, split_inputs
from moeify.capture.preserve import preserved
from moeify.capture.torch_calls import tensors_in
from moeify.convert.dense_gradients import Source
from moeify.distributed.dtensor import is_sharded, whole
from moeify.errors import VerificationError
from moeify.nn.router import lifted_capacity
from moeify.plan.layer_plan import LayerPlan
from moeify.units import dtype_name

TOLERANCE = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""Largest relative difference at step 0, by the parameters' dtype."""

_FLOOR = 1e-2
"""An output of which only rounding is left (the mean over a layer norm) is compared with this share
of the largest output."""

_SMALL = 1e-30
"""Smaller numbers are not divided by: relative to denormals everything differs."""


_LAYER_FLOOR = 1e-2
"""The gradient of one layer is compared with at least this share of the whole gradient."""

_LAYER_SLACK = 10
"""How much further than the whole gradient that of one layer may differ."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the model gave on the example inputs."""

    outputs: tuple[Tensor, ...]  # the floating-point ones, detached
    # Of a random projection of the outputs. (Not of their squares: after a final norm those are
    # nearly constant.) Sketches of large ones; by names of the dense model.
    gradients: dict[str, Tensor]
    failure: str = ""  # why the backward pass fails, or ""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a converted model is from the dense one."""

    outputs: float  # largest difference over the largest value
    gradients: float  # norm of the difference over the norm, over all dense weights
    promised: bool  # the plan promises the same numbers at step 0
    # The same over the weights of one replaced MLP, by layer name.
    layers: dict[str, float] = field(default_factory=dict)


def is_exact(layer: LayerPlan) -> bool:
    """Tell whether a layer equals the dense one at step 0.

    `copy` and `granular` do, unless the weights of a token's experts do not sum to one
    (`combine: probability`); `split` does where a token uses all experts.
    """
    if layer.init.experts == "split":
        return layer.top_k == layer.experts
    return layer.init.experts in ("copy", "granular") and layer.router.combine != "probability"


def snapshot(
    model: nn.Module, example_inputs: ExampleInputs, sources: Sequence[Source] = ()
) -> Snapshot:
    """Run a model in evaluation mode, leave it exactly as it was, and return what it gives.

    Gradients are taken of `sources`, also of those that do not train, and are not kept: one is in
    memory at a time.
    """
    args, kwargs = split_inputs(example_inputs)
    gradients = _Gradients()
    failure = ""
    with preserved(model), lifted_capacity(model), torch.enable_grad():
        for module in model.modules():
            module.__dict__["training"] = False
            compat.disable_fused_encoder(module)  # it writes zeros where padding is
        for source in sources:
            source.parameter.requires_grad_(True)
        torch.manual_seed(0)
        outputs = [
            t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point() and t.numel()
        ]
        if sources and any(t.requires_grad for t in outputs):
            loss = torch.stack([_projected(t) for t in outputs if t.requires_grad]).sum()
            try:
                gradients.collect(loss, sources)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                failure = f"{type(error).__name__}: {error}"
                gradients.found.clear()
    return Snapshot(tuple(t.detach() for t in outputs), gradients.found, failure)


class _Gradients:
    """Collects gradients by dense weights while a backward pass runs."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def collect(self, loss: Tensor, sources: Sequence[Source]) -> None:
        """Run the backward pass; nothing is written to any `.grad`."""
        unique = {id(source.parameter): source.parameter for source in sources}
        parameters = list(unique.values())
        plain = [s for s in sources if not is_sharded(s.parameter)]
        hooks = [s.parameter.register_hook(partial(self._arrived, s)) for s in plain]  # type: ignore[no-untyped-call]
        try:
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        finally:
            for hook in hooks:
                hook.remove()
        # To gather a sharded one is a collective: in the same order on all ranks.
        sharded = dict(zip(unique, grads, strict=True))
        for source in sources:
            grad = sharded[id(source.parameter)]
            if is_sharded(source.parameter) and grad is not None:
                self._add(source, whole(grad.detach()))

    def _arrived(self, source: Source, grad: Tensor) -> Tensor:
        self._add(source, grad.detach())
        return grad.new_zeros(()).expand_as(grad)  # what is kept until the end has no memory

    def _add(self, source: Source, grad: Tensor) -> None:
        for name, part in source.into(grad).items():
            new = sketch(part)
            self.found[name] = self.found[name] + new if name in self.found else new


_COLUMNS = 4099
"""A prime number, so that columns of a sketch are not columns of a weight."""

_SKETCHES = 4


def sketch(tensor: Tensor) -> Tensor:
    """Return a small tensor of the same norm, to within some percent, in at least float32.

    It is linear: the sketch of a difference is the difference of sketches. Small tensors are
    returned as they are.

    Source:
        CountSketch: Charikar et al. 2002.
    """
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    if tensor.numel() <= _SKETCHES * _COLUMNS:
        return tensor.detach().to(dtype, copy=True)
    flat = tensor.detach().reshape(-1)
    rows = flat.numel() // _COLUMNS
    table, rest = flat[: rows * _COLUMNS].view(rows, _COLUMNS), flat[rows * _COLUMNS :]
    generator = torch.Generator(device="cpu").manual_seed(rows)
    signs = torch.randint(2, (_SKETCHES, rows), generator=generator, device="cpu") * 2 - 1
    signs = signs.to(device=flat.device, dtype=dtype)
    total = torch.zeros(_SKETCHES, _COLUMNS, dtype=dtype, device=flat.device)
    for start in range(0, rows, _COLUMNS):
        part = table[start : start + _COLUMNS].to(dtype)
        total.addmm_(signs[:, start : start + _COLUMNS], part)
    return torch.cat([total.flatten() / _SKETCHES**0.5, rest.to(dtype)])


def _projected(output: Tensor) -> Tensor:
    generator = torch.Generator(device=output.device).manual_seed(0)
    size, device = output.shape, output.device
    return (output.float() * torch.randn(size, generator=generator, device=device)).sum()


def _no_sketch(weight: Tensor) -> Tensor:
    """Return the sketch of a nil gradient."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    size, most = weight.numel(), _SKETCHES * _COLUMNS
    shape = weight.shape if size <= most else (most + size % _COLUMNS,)
    return torch.zeros(shape, dtype=dtype, device=weight.device)


def mean_over_ranks(snapshots: Sequence[Snapshot], weights: Mapping[str, Tensor]) -> None:
    """Average the gradients of some dense weights over all ranks, in place.

    An expert sees the tokens of several ranks, so only the mean over the ranks is that of the dense
    model. All ranks have the same weights; a gradient that one of them lacks is nil there.
    """
    parts = []
    for table in (shot.gradients for shot in snapshots):
        table |= {n: _no_sketch(w) for n, w in weights.items() if n not in table}
        parts += [table[name] for name in weights]
    packed = torch.cat([part.to(torch.float64).flatten() for part in parts])
    dist.all_reduce(packed)
    packed /= dist.get_world_size()
    for part, mean in zip(parts, torch.split(packed, [p.numel() for p in parts]), strict=True):
        part.copy_(mean.view_as(part))


def compare(dense: Snapshot, moe: Snapshot, layers: Sequence[LayerPlan]) -> Difference:
    """Measure the difference of two snapshots of the same parameters."""
    shapes = [tuple(t.shape) for t in dense.outputs], [tuple(t.shape) for t in moe.outputs]
    if shapes[0] != shapes[1]:
        raise VerificationError(f"the outputs changed shape: {shapes[0]} became {shapes[1]}")
    largest = max((_size(t) for t in dense.outputs), default=0.0)
    outputs = max(
        (
            _relative(a, b, _FLOOR * largest)
            for a, b in zip(dense.outputs, moe.outputs, strict=True)
        ),
        default=0.0,
    )
    if moe.failure and not dense.failure:
        raise VerificationError(f"the converted model's backward pass fails: {moe.failure}")
    names = [] if dense.failure else list(dense.gradients)
    pairs = [(dense.gradients[name], moe.gradients.get(name)) for name in names]
    whole_size = _norm(want for want, _ in pairs)
    per_layer: dict[str, float] = {}
    for layer in layers:
        own = [pair for name, pair in zip(names, pairs, strict=True) if name in _weights_of(layer)]
        if own:
            per_layer[layer.name] = _gap(own, _LAYER_FLOOR * whole_size)
    exact = all(is_exact(layer) for layer in layers)
    return Difference(outputs, _gap(pairs, 0.0), exact, per_layer)


def _gap(pairs: Iterable[tuple[Tensor, Tensor | None]], floor: float) -> float:
    """Return the norm of the differences over the norm of the first ones, or over `floor`."""
    pairs = list(pairs)
    # None: it no longer reaches this parameter.
    gaps = (a.double() if b is None else a.double() - b.double() for a, b in pairs)
    return _norm(gaps) / max(_norm(a for a, _ in pairs), floor, _SMALL)


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))


def _weights_of(layer: LayerPlan) -> set[str]:
    site = layer.site
    projections = (*site.up, site.down)
    names = {name for p in projections for name in (p.weight, p.bias) if name is not None}
    return names.union(site.inner)


def coarsest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the dtype that decides how exact a model of mixed dtypes can be."""
    known = [dtype for dtype in dtypes if dtype in TOLERANCE]
    return max(known, key=TOLERANCE.__getitem__, default=torch.float32)


def check(difference: Difference, dtype: torch.dtype) -> None:
    """Raise if a conversion that promises the dense numbers differs by more than rounding.

    `dtype` is the coarsest of the model's parameters.
    """
    if not difference.promised:
        return
    tolerance = TOLERANCE.get(dtype, 1e-5)
    checks = [
        ("outputs", difference.outputs, tolerance),
        ("gradients", difference.gradients, tolerance),
    ]
    for name, value in difference.layers.items():
        checks.append((f"gradients of {name}", value, _LAYER_SLACK * tolerance))
    for what, value, allowed in checks:
        if not value <= allowed:
            raise VerificationError(
                f"the converted model's {what} differ from the dense model's by {value:.2e} "
                f"(relative; {allowed:.0e} is allowed in {dtype_name(dtype)}); "
                "the model is the dense one again. Please report this with the plan and the model"
            )


def check_untouched(before: dict[str, tuple[int, int]], model: nn.Module) -> None:
    """Check that no parameter of the dense model has been written to.

    `before` maps names to (id, version).
    """
    versions = {id(p): compat.version(p) for p in model.parameters()}
    for name, (key, version) in before.items():
        if versions.get(key, version) != version:
            raise VerificationError(f"{name} was changed in place by the conversion")


def _size(tensor: Tensor) -> float:
    finite = tensor[torch.isfinite(tensor)].double().abs()
    return float(finite.max()) if finite.numel() else 0.0


def _relative(a: Tensor, b: Tensor, floor: float) -> float:
    """Return the largest difference over the largest value of `a`, or over `floor`."""
    both = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return float("inf")
    if not bool(both.any()):
        return 0.0
    gap = (a[both].double() - b[both].double()).abs().max()
    return float(gap) / max(_size(a[both]), floor, _SMALL)
