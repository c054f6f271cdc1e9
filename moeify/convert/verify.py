"""Proof of a conversion: every tensor accounted for, and the same numbers as the dense model.

Compared at step 0, in evaluation mode and without capacity limits: the outputs, and the gradients
of the parameters that were left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeify import compat
from moeify.capture.capture import ExampleInputs, split_inputs
from moeify.capture.preserve import preserved
from moeify.capture.torch_calls import tensors_in
from moeify.distributed.dtensor import whole
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


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the model gave on the example inputs."""

    outputs: tuple[Tensor, ...]  # the floating-point ones, detached
    # Of a random projection of the outputs. (Not of their squares: after a final norm those are
    # nearly constant.)
    gradients: dict[str, Tensor]
    failure: str = ""  # why the backward pass fails, or ""


@dataclass(frozen=True, slots=True)
class Difference:
    """How far a converted model is from the dense one."""

    outputs: float  # largest difference over the largest value
    gradients: float  # norm of the difference over the norm, over all untouched parameters
    promised: bool  # the plan promises the same numbers at step 0


def is_exact(layer: LayerPlan) -> bool:
    """Tell whether a layer equals the dense one at step 0.

    `copy` and `granular` do, unless the weights of a token's experts do not sum to one
    (`combine: probability`); `split` does where a token uses all experts.
    """
    if layer.init.experts == "split":
        return layer.top_k == layer.experts
    return layer.init.experts in ("copy", "granular") and layer.router.combine != "probability"


def snapshot(model: nn.Module, example_inputs: ExampleInputs, names: Iterable[str]) -> Snapshot:
    """Run a model in evaluation mode, leave it exactly as it was, and return what it gives.

    `names` are the parameters whose gradients are wanted.
    """
    args, kwargs = split_inputs(example_inputs)
    parameters = dict(model.named_parameters())
    wanted = {n: parameters[n] for n in names if n in parameters and parameters[n].requires_grad}
    failure = ""
    with preserved(model), lifted_capacity(model), torch.enable_grad():
        for module in model.modules():
            module.__dict__["training"] = False
            compat.disable_fused_encoder(module)  # it writes zeros where padding is
        torch.manual_seed(0)
        outputs = [
            t for t in tensors_in(model(*args, **kwargs)) if t.is_floating_point() and t.numel()
        ]
        gradients: dict[str, Tensor] = {}
        if wanted and any(t.requires_grad for t in outputs):
            loss = torch.stack([_projected(t) for t in outputs if t.requires_grad]).sum()
            try:
                grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
            except (RuntimeError, AssertionError, NotImplementedError) as error:
                failure = f"{type(error).__name__}: {error}"
            else:
                found = zip(wanted, grads, strict=True)
                gradients = {n: whole(g.detach()) for n, g in found if g is not None}
    return Snapshot(tuple(t.detach() for t in outputs), gradients, failure)


def _projected(output: Tensor) -> Tensor:
    generator = torch.Generator(device=output.device).manual_seed(0)
    size, device = output.shape, output.device
    return (output.float() * torch.randn(size, generator=generator, device=device)).sum()


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
    size = error = 0.0
    if not dense.failure:
        for name, want in dense.gradients.items():
            got = moe.gradients.get(name)  # None: it no longer reaches this parameter
            for a, b in _in_parts(want, torch.zeros_like(want) if got is None else got):
                size += float(a.square().sum())
                error += float((a - b).square().sum())
    gradients = (error / max(size, _SMALL**2)) ** 0.5
    return Difference(outputs, gradients, all(is_exact(layer) for layer in layers))


def _in_parts(one: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield two tensors in float64, a part at a time: an embedding's copies would be large."""
    parts = torch.split(one.flatten(), _PART), torch.split(other.flatten(), _PART)
    for a, b in zip(*parts, strict=True):
        yield a.double(), b.double()


_PART = 1 << 20  # elements


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
    for what, value in (("outputs", difference.outputs), ("gradients", difference.gradients)):
        if not value <= tolerance:
            raise VerificationError(
                f"the converted model's {what} differ from the dense model's by {value:.2e} "
                f"(relative; {tolerance:.0e} is allowed in {dtype_name(dtype)}); "
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
