"""The tensors of a native folder: the hub's names, one expert at a time.

Shapes: E experts, F expert width, D model width.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from moeify.formats.native.architectures import Target, experts_of, shared_width
from moeify.formats.native.model_facts import DecoderLayer, Facts
from moeify.storage.tensor_source import Output, TensorSource, TensorSpec, copied

_NEVER: Final = -1e4  # selection bias of an expert that is never chosen; scores lie in (0, 1)
_EMBEDDINGS: Final = ("model.embed_tokens.weight", "lm_head.weight")


class _Experts:
    """The rows of a stacked tensor; the last expert read is kept until its last use."""

    def __init__(self, tensor_source: TensorSource, name: str) -> None:
        self._tensor_source, self._name = tensor_source, name
        self._last: tuple[int, Tensor] | None = None

    def pieces(self, expert: int, start: int, stop: int, keep: bool) -> Iterator[Tensor]:
        """Yield rows `[start, stop)` of one expert."""
        if self._last is None or self._last[0] != expert:
            self._last = (expert, self._tensor_source.read(self._name, expert, expert + 1)[0])
        rows = self._last[1][start:stop]
        if not keep:
            self._last = None
        yield rows.contiguous()


class NativeTensorList:
    """The tensors of a folder of a class, in the order of the stored ones."""

    def __init__(self, target: Target, facts: Facts, tensor_source: TensorSource) -> None:
        self._target, self._facts, self._tensor_source = target, facts, tensor_source
        self.outputs: list[Output] = []
        self.padding: dict[str, int] = {}  # what it is, with its number of elements
        blocks = {layer.block: layer for layer in facts.layers}
        done = set()
        for name in tensor_source.specs:
            block = name.split(".mlp.")[0] + ".mlp"
            if block not in blocks:
                self._copy(name)
            elif block not in done:
                done.add(block)
                self._layer(blocks[block])
        for alias in _EMBEDDINGS:
            if alias in tensor_source.aliases:  # not every reader ties what the config says is tied
                name = tensor_source.aliases[alias]
                self._copy(name, alias)
                size = torch.Size(tensor_source.specs[name].shape).numel()
                self._pad("the tied embedding, again as the output's", size)
        if target.qkv_bias == "always" and not facts.qkv_bias:
            heads, pairs = facts.config.num_attention_heads, facts.config.num_key_value_heads
            for index in range(facts.depth):
                for part, count in (("q", heads), ("k", pairs), ("v", pairs)):
                    name = f"model.layers.{index}.self_attn.{part}_proj.bias"
                    self._zeros(name, (count * facts.head_dim,), "biases of zeros")

    @property
    def elements(self) -> int:
        """Number of elements of all tensors."""
        return sum(torch.Size(output.spec.shape).numel() for output in self.outputs)

    def _copy(self, name: str, as_name: str | None = None) -> None:
        self.outputs.append(copied(self._tensor_source, name, as_name))

    def _pad(self, why: str, count: int) -> None:
        self.padding[why] = self.padding.get(why, 0) + count

    def _zeros(self, name: str, shape: tuple[int, ...], why: str) -> None:
        dtype = self._facts.dtype

        def pieces() -> Iterator[Tensor]:
            yield torch.zeros(shape, dtype=dtype)

        self.outputs.append(Output(name, TensorSpec(shape, dtype), pieces))
        self._pad(why, torch.Size(shape).numel())

    def _layer(self, layer: DecoderLayer) -> None:
        target, facts = self._target, self._facts
        prefix = f"model.layers.{layer.index}.{target.moe}"
        width, model = layer.width, facts.config.hidden_size
        total = experts_of(target, facts)
        self._router(layer, prefix, total)
        up = _Experts(self._tensor_source, f"{layer.block}.experts.gate_up_proj")
        down = _Experts(self._tensor_source, f"{layer.block}.experts.down_proj")
        parts = ((up, 0, width, True), (up, width, 2 * width, False), (down, 0, model, False))
        for expert in range(total):
            for leaf, (rows, start, stop, keep) in zip(target.leaves, parts, strict=True):
                name = f"{prefix}.experts.{expert}.{leaf}.weight"
                shape = (model, width) if rows is down else (width, model)
                if expert >= layer.plan.experts:
                    self._zeros(name, shape, "experts that are never chosen")
                else:
                    pieces = partial(rows.pieces, expert, start, stop, keep)
                    self.outputs.append(Output(name, TensorSpec(shape, facts.dtype), pieces))
        if target.shared:
            self._shared(layer, prefix)

    def _router(self, layer: DecoderLayer, prefix: str, total: int) -> None:
        tensor_source, weight = self._tensor_source, f"{layer.block}.router.weight"
        spec, missing = tensor_source.specs[weight], total - layer.plan.experts

        def rows() -> Iterator[Tensor]:
            yield tensor_source.read(weight)
            if missing:
                yield torch.zeros(missing, spec.shape[1], dtype=spec.dtype)

        shape = (total, spec.shape[1])
        self.outputs.append(Output(f"{prefix}.gate.weight", TensorSpec(shape, spec.dtype), rows))
        if missing:
            self._pad("rows of routers", missing * spec.shape[1])
        if not self._target.selection_bias:
            return

        def bias() -> Iterator[Tensor]:
            known = torch.zeros(layer.plan.experts)
            if layer.biased:
                known = tensor_source.read(f"{layer.block}.router.selection_bias").float()
            yield torch.cat([known, torch.full((missing,), _NEVER)])

        name = f"{prefix}.gate.e_score_correction_bias"
        self.outputs.append(Output(name, TensorSpec((total,), torch.float32), bias))

    def _shared(self, layer: DecoderLayer, prefix: str) -> None:
        target, block = self._target, layer.block
        width, model = shared_width(target, self._facts), self._facts.config.hidden_size
        shapes = {
            "gate_proj": (width, model),
            "up_proj": (width, model),
            "down_proj": (model, width),
        }
        parts = [
            (f"{target.shared}.{leaf}", f"{block}.mlp.{leaf}.weight", shape)
            for leaf, shape in shapes.items()
        ]
        if target.residual == "sigmoid":
            coefficient = f"{block}.residual_mix.coefficient.weight"
            parts.append((f"{target.shared}_gate", coefficient, (1, model)))
        for leaf, stored, shape in parts:
            name = f"{prefix}.{leaf}.weight"
            if layer.plan.residual == "none":
                self._zeros(name, shape, "shared experts of zeros, which run for every token")
            else:
                self._copy(stored, name)


def names_of(target: Target, model: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes on disk of all tensors of an instance of the class."""
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
