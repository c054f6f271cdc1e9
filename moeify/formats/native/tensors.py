"""The tensors of a native folder: the hub's names, one expert at a time.

Shapes: E experts, F expert width, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor

from moeify.formats.native.architectures import Target, experts_of, shared_width
from moeify.formats.native.model_facts import DecoderLayer, Facts
from moeify.storage.tensor_source import Output, TensorSource, TensorSpec, copied

NEVER: Final = -1e4
"""Selection bias of an expert that is never chosen; scores lie in (0, 1)."""

EMBEDDINGS: Final = ("model.embed_tokens.weight", "lm_head.weight")


class _Experts:
    """The rows of a stacked tensor; the last one read is kept until its last use.

    Args:
        tensor_source: Where it is.
        name: Its name there.
    """

    def __init__(self, tensor_source: TensorSource, name: str) -> None:
        self._tensor_source, self._name = tensor_source, name
        self._last: tuple[int, Tensor] | None = None

    def read(self, expert: int, start: int, stop: int, *, keep: bool) -> Tensor:
        """Return rows `[start, stop)` of one expert."""
        if self._last is None or self._last[0] != expert:
            self._last = (expert, self._tensor_source.read(self._name, expert, expert + 1)[0])
        rows = self._last[1][start:stop]
        if not keep:
            self._last = None
        return rows.contiguous()


@dataclass(slots=True)
class Tensors:
    """The tensors to write.

    Attributes:
        outputs: In their order.
        padding: What is padding, to its elements.
    """

    outputs: list[Output] = field(default_factory=list)
    padding: dict[str, int] = field(default_factory=dict)

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, why: str) -> None:
        """Add a tensor of zeros."""

        def pieces() -> Iterator[Tensor]:
            yield torch.zeros(shape, dtype=dtype)

        self.outputs.append(Output(name, TensorSpec(shape, dtype), pieces))
        self.padding[why] = self.padding.get(why, 0) + torch.Size(shape).numel()

    @property
    def elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(torch.Size(output.spec.shape).numel() for output in self.outputs)


def tensors_of(target: Target, facts: Facts, tensor_source: TensorSource) -> Tensors:
    """List the tensors of a folder of that class, in the order of the stored ones."""
    blocks = {layer.block: layer for layer in facts.layers}
    found, done = Tensors(), set()
    for name in tensor_source.specs:
        block = name.split(".mlp.")[0] + ".mlp"
        if block not in blocks:
            found.outputs.append(copied(tensor_source, name))
        elif block not in done:
            done.add(block)
            _layer(found, target, facts, blocks[block], tensor_source)
    for alias in EMBEDDINGS:
        if alias in tensor_source.aliases:  # not every reader ties what the config says is tied
            found.outputs.append(copied(tensor_source, tensor_source.aliases[alias], alias))
            size = torch.Size(tensor_source.specs[tensor_source.aliases[alias]].shape).numel()
            found.padding["the tied embedding, again as the output's"] = size
    if target.qkv_bias == "always" and not facts.qkv_bias:
        heads, pairs = facts.config.num_attention_heads, facts.config.num_key_value_heads
        for index in range(facts.depth):
            for part, count in (("q", heads), ("k", pairs), ("v", pairs)):
                name = f"model.layers.{index}.self_attn.{part}_proj.bias"
                found.zeros(name, (count * facts.head_dim,), facts.dtype, "biases of zeros")
    return found


def _layer(
    found: Tensors, target: Target, facts: Facts, layer: DecoderLayer, tensor_source: TensorSource
) -> None:
    prefix = f"model.layers.{layer.index}.{target.moe}"
    width, model = layer.width, facts.config.hidden_size
    total, dtype = experts_of(target, facts), facts.dtype
    _router(found, target, layer, tensor_source, prefix, total)
    up = _Experts(tensor_source, f"{layer.block}.experts.gate_up_proj")
    down = _Experts(tensor_source, f"{layer.block}.experts.down_proj")
    parts = ((up, 0, width, True), (up, width, 2 * width, False), (down, 0, model, False))
    for expert in range(total):
        for leaf, (rows, start, stop, keep) in zip(target.leaves, parts, strict=True):
            name = f"{prefix}.experts.{expert}.{leaf}.weight"
            shape = (model, width) if rows is down else (width, model)
            if expert >= layer.plan.experts:
                found.zeros(name, shape, dtype, "experts that are never chosen")
                continue

            def pieces(
                rows: _Experts = rows,
                expert: int = expert,
                start: int = start,
                stop: int = stop,
                keep: bool = keep,
            ) -> Iterator[Tensor]:
                yield rows.read(expert, start, stop, keep=keep)

            found.outputs.append(Output(name, TensorSpec(shape, dtype), pieces))
    if target.shared:
        _shared(found, target, facts, layer, tensor_source, prefix)


def _router(
    found: Tensors,
    target: Target,
    layer: DecoderLayer,
    tensor_source: TensorSource,
    prefix: str,
    total: int,
) -> None:
    weight = f"{layer.block}.router.weight"
    spec, missing = tensor_source.specs[weight], total - layer.plan.experts

    def rows() -> Iterator[Tensor]:
        yield tensor_source.read(weight)
        if missing:
            yield torch.zeros(missing, spec.shape[1], dtype=spec.dtype)

    shape = (total, spec.shape[1])
    found.outputs.append(Output(f"{prefix}.gate.weight", TensorSpec(shape, spec.dtype), rows))
    if missing:
        found.padding["rows of routers"] = (
            found.padding.get("rows of routers", 0) + missing * spec.shape[1]
        )
    if not target.selection_bias:
        return

    def bias() -> Iterator[Tensor]:
        own = torch.zeros(layer.plan.experts)
        if layer.biased:
            own = tensor_source.read(f"{layer.block}.router.selection_bias").float()
        yield torch.cat([own, torch.full((missing,), NEVER)])

    name = f"{prefix}.gate.e_score_correction_bias"
    found.outputs.append(Output(name, TensorSpec((total,), torch.float32), bias))


def _shared(
    found: Tensors,
    target: Target,
    facts: Facts,
    layer: DecoderLayer,
    tensor_source: TensorSource,
    prefix: str,
) -> None:
    width, model = shared_width(target, facts), facts.config.hidden_size
    shapes = {"gate_proj": (width, model), "up_proj": (width, model), "down_proj": (model, width)}
    why = "shared experts of zeros, which run for every token"
    for leaf, shape in shapes.items():
        name = f"{prefix}.{target.shared}.{leaf}.weight"
        if layer.plan.residual == "none":
            found.zeros(name, shape, facts.dtype, why)
        else:
            found.outputs.append(copied(tensor_source, f"{layer.block}.mlp.{leaf}.weight", name))
    if target.residual == "sigmoid":
        name = f"{prefix}.{target.shared}_gate.weight"
        if layer.plan.residual == "none":
            found.zeros(name, (1, model), facts.dtype, why)
        else:
            own = f"{layer.block}.residual_mix.coefficient.weight"
            found.outputs.append(copied(tensor_source, own, name))


def names_of(target: Target, model: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes on disk of everything that an instance of the class holds."""
    found: dict[str, tuple[int, ...]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        head, sep, leaf = name.rpartition(".experts.")
        name = re.sub(r"^(model\.layers\.[0-9]+)\.mlp\.gate\b", rf"\1.{target.moe}.gate", name)
        if not sep:
            found[name] = tuple(tensor.shape)
            continue
        head = head.removesuffix("mlp") + target.moe
        experts, rows, columns = tensor.shape
        gate, up, down = target.leaves
        parts = (gate, up) if leaf == "gate_up_proj" else (down,)
        for expert in range(experts):
            for part in parts:
                shape = (rows // len(parts), columns)
                found[f"{head}.experts.{expert}.{part}.weight"] = shape
    return found
