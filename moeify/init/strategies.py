"""How experts and routers start.

Everything drawn comes from a separate generator, seeded by the plan's seed and the site's name, so
that every rank and every layout starts from the same numbers and the global state is untouched.

Shapes: D model width, F expert width, E experts, G slices per copy; `wide` is F, or 2F if gated.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moeify.plan.specs import InitSpec


@dataclass(frozen=True, slots=True)
class MlpWeights:
    """The tensors of one dense MLP, oriented `[out, in]`, the gate first."""

    up: Tensor  # [wide, D]
    up_bias: Tensor | None  # [wide]
    down: Tensor  # [D, F]
    down_bias: Tensor | None  # [D]
    inner: Mapping[str, Tensor]  # further parameters, [F] each, by `inner_names`
    gated: bool  # whether `up` holds two halves

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by their names in `Experts`."""
        first = "gate_up" if self.gated else "up"
        values = {
            f"{first}_proj": self.up,
            f"{first}_bias": self.up_bias,
            "down_proj": self.down,
            "down_bias": self.down_bias,
            **self.inner,
        }
        return {name: tensor for name, tensor in values.items() if tensor is not None}


def generator_for(seed: int, *names: object) -> torch.Generator:
    """Return a CPU generator that depends on `seed` and `names` alone."""
    text = "/".join(str(part) for part in (seed, *names))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return torch.Generator(device="cpu").manual_seed(number % (2**63))


def init_router(shape: tuple[int, int], like: Tensor, spec: InitSpec, name: str) -> Tensor:
    """Return a router's weight [E, D] in the dtype and on the device of `like`.

    `normal` draws from N(0, router_std^2). With `granular`, the G slices of one copy share a row,
    so that they are chosen together.

    Raises:
        ValueError: `spec.router` needs weights or activations: see `weights.router_weight`.
    """
    experts, width = shape
    if like.is_meta:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if spec.router == "zeros":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    if spec.router != "normal":
        raise ValueError(f"{name}: `router: {spec.router}` needs the model's weights or inputs")
    groups = experts // spec.granularity
    drawn = torch.randn(
        groups, width, generator=generator_for(spec.seed, name, "router"), device="cpu"
    )
    drawn = (drawn * spec.router_std).repeat_interleave(spec.granularity, 0)
    return drawn.to(dtype=like.dtype, device=like.device)


def init_experts(
    dense: MlpWeights,
    experts: int,
    spec: InitSpec,
    name: str,
    *,
    scale: float = 1.0,
    share: range | None = None,
) -> MlpWeights:
    """Return stacked weights of the experts in `share`, each tensor with a leading len(share).

    What is drawn for an expert depends on its number alone, so every rank draws its own share.
    `scale` is a factor on the last projection, weight and bias. Copies may be views of `dense`: do
    not write to them. The strategies are:

    - `copy`: E copies (sparse upcycling, Komatsuzaki et al. 2022).
    - `noise`: copies plus N(0, (noise_std * std(w))^2) on every weight matrix.
    - `drop`: copies in which a part `drop_ratio` of the hidden neurons is drawn anew per expert,
      the same neurons in gate, up and down, from N(mean, std^2) of the replaced slice
      (Drop-Upcycling, Nakamura et al. 2025).
    - `random`: N(0, std(w)^2) for weights, zero biases, ones for inner parameters.
    - `granular`: E / G copies in G slices each; the last projection times G, because the G slices
      of a copy share its combine weight (fine-grained upcycling, He et al. 2024, with the whole
      scale in the last projection, which is exact for gated MLPs too).
    - `models` and `split` are made in `weights`; here only the first, on `meta`.
    """
    share = range(experts) if share is None else share
    if spec.experts == "granular":
        return scaled(_granular(dense, share, spec.granularity), scale)
    if dense.up.is_meta or spec.experts == "copy":
        return _map(scaled(dense, scale), lambda t: t.expand(len(share), *t.shape))
    made = _map(dense, lambda t: _repeat(t, len(share)))
    _STRATEGIES[spec.experts](made, dense, spec, name, share)
    return scaled(made, scale)


def inner_names(dense: Iterable[str]) -> list[str]:
    """Return the names in `Experts` of inner parameters, given those in the dense model.

    They end as the dense ones do, because trainers choose by name what they do not decay:
    `mlp.sub_norm.weight` becomes `inner_0_sub_norm`, its bias `inner_1_sub_norm_bias`.
    """
    ends = ["_".join(name.split(".")[-2:]).removesuffix("_weight") for name in dense]
    return [f"inner_{number}_{end}" for number, end in enumerate(ends)]


def scaled(weights: MlpWeights, scale: float) -> MlpWeights:
    """Return weights with the last projection, weight and bias, times `scale`."""
    if scale == 1.0:
        return weights
    bias = None if weights.down_bias is None else weights.down_bias * scale
    return replace(weights, down=weights.down * scale, down_bias=bias)


def stacked(each: Sequence[MlpWeights]) -> MlpWeights:
    """Stack the weights of several MLPs of one shape along a new first axis."""
    first = each[0]

    def stack(name: str) -> Tensor | None:
        tensors = [getattr(weights, name) for weights in each]
        return None if tensors[0] is None else torch.stack(tensors)

    inner = {name: torch.stack([w.inner[name] for w in each]) for name in first.inner}
    up, down = torch.stack([w.up for w in each]), torch.stack([w.down for w in each])
    return MlpWeights(up, stack("up_bias"), down, stack("down_bias"), inner, first.gated)


def cut(dense: MlpWeights, neurons: Tensor) -> MlpWeights:
    """Return stacked slices of an MLP without inner parameters; each has the whole output bias.

    `neurons` [n, w] int64 are the hidden neurons of each slice, on the device of the weights.
    """
    width, count = dense.down.shape[1], len(neurons)
    rows = torch.cat([neurons, neurons + width], 1) if dense.gated else neurons
    return MlpWeights(
        dense.up[rows],
        None if dense.up_bias is None else dense.up_bias[rows],
        dense.down[:, neurons].permute(1, 0, 2),
        None if dense.down_bias is None else dense.down_bias.expand(count, -1),
        {},
        dense.gated,
    )


def _map(weights: MlpWeights, function: Callable[[Tensor], Tensor]) -> MlpWeights:
    def each(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(tensor)

    return MlpWeights(
        function(weights.up),
        each(weights.up_bias),
        function(weights.down),
        each(weights.down_bias),
        {name: function(t) for name, t in weights.inner.items()},
        weights.gated,
    )


def _repeat(tensor: Tensor, experts: int) -> Tensor:
    return tensor.expand(experts, *tensor.shape).clone(memory_format=torch.contiguous_format)


def _granular(dense: MlpWeights, share: range, slices: int) -> MlpWeights:
    neurons = torch.arange(dense.down.shape[1], device=dense.up.device).view(slices, -1)
    parts = cut(dense, neurons[[expert % slices for expert in share]])
    return replace(parts, down=parts.down * slices)


def _draw(shape: torch.Size, generator: torch.Generator, like: Tensor) -> Tensor:
    return torch.randn(shape, generator=generator, device="cpu").to(device=like.device)


def _add_noise(
    stacked: MlpWeights, dense: MlpWeights, spec: InitSpec, name: str, share: range
) -> None:
    scales = [spec.noise_std * source.float().std() for source in (dense.up, dense.down)]
    for number, *tensors in zip(share, stacked.up, stacked.down, strict=True):
        generator = generator_for(spec.seed, name, "noise", number)
        for expert, std in zip(tensors, scales, strict=True):
            noise = _draw(expert.shape, generator, expert) * std
            expert.copy_((expert.float() + noise).to(expert.dtype))


def _drop(stacked: MlpWeights, dense: MlpWeights, spec: InitSpec, name: str, share: range) -> None:
    width = dense.down.shape[1]
    count = round(spec.drop_ratio * width)

    def redraw(target: Tensor, index: Tensor, dim: int, generator: torch.Generator) -> None:
        kept = target.index_select(dim, index).float()
        std, mean = torch.std_mean(kept, correction=0)
        drawn = _draw(kept.shape, generator, kept) * std + mean
        target.index_copy_(dim, index, drawn.to(target.dtype))

    for expert, number in enumerate(share):
        generator = generator_for(spec.seed, name, "drop", number)
        chosen = torch.randperm(width, generator=generator, device="cpu")[:count].sort().values
        neurons = chosen.to(dense.up.device)
        for half in range(2 if dense.gated else 1):
            redraw(stacked.up[expert], neurons + half * width, 0, generator)
            if stacked.up_bias is not None:
                redraw(stacked.up_bias[expert], neurons + half * width, 0, generator)
        redraw(stacked.down[expert], neurons, 1, generator)


def _random(
    stacked: MlpWeights, dense: MlpWeights, spec: InitSpec, name: str, share: range
) -> None:
    scales = [source.float().std(correction=0) for source in (dense.up, dense.down)]
    for number, *tensors in zip(share, stacked.up, stacked.down, strict=True):
        generator = generator_for(spec.seed, name, "random", number)
        for expert, std in zip(tensors, scales, strict=True):
            expert.copy_((_draw(expert.shape, generator, expert) * std).to(expert.dtype))
    for bias in (stacked.up_bias, stacked.down_bias):
        if bias is not None:
            bias.zero_()
    for inner in stacked.inner.values():
        inner.fill_(1.0)


_STRATEGIES = {"noise": _add_noise, "drop": _drop, "random": _random}
