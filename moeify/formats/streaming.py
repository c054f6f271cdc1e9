"""The tensors of a converted model, made from a dense folder while they are read.

The model is built and converted on `meta`, which gives every name, shape and dtype. Values are made
on demand: kept tensors are read from the folder, and an expert is made by the code that makes it in
memory, in a second dense model on meta in which only the weights of its own layer are real at that
moment. So the numbers are the same, bit for bit, and one layer is held at a time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from moeify.convert.install import Installation
from moeify.convert.pipeline import prepare, refuse_wrapped, run_pipeline
from moeify.errors import CaptureError, MoeifyError
from moeify.hf.local_folder import build_on_meta, model_folder
from moeify.hf.tensor_names import DenseTensors, open_dense_folder
from moeify.init.from_checkpoints import rest_of, sources_for
from moeify.init.weights import expert_weights
from moeify.passes.rewrite.moe_block import build_block
from moeify.plan.layer_plan import LayerPlan, ResolvedPlan
from moeify.plan.plan import Plan
from moeify.plan.selection import shorten
from moeify.sites.discovery import Discovery, find_site
from moeify.sites.record import ConvertedLayer, require_conversion
from moeify.storage.model_state import collect, tensors_of
from moeify.storage.tensor_source import TensorSource, TensorSpec


class StreamedTensors:
    """The tensors of a converted model on meta; a `TensorSource`.

    `dense` is the same model before the conversion, its parameters on meta, its buffers real;
    `source` has its tensors, `discovery` and `resolved` are of it.
    """

    def __init__(
        self,
        model: nn.Module,
        dense: nn.Module,
        source: DenseTensors,
        discovery: Discovery,
        resolved: ResolvedPlan,
    ) -> None:
        self.resolved, self.source, self.folder = resolved, source, source.folder
        record = require_conversion(model)
        state = collect(model, values=False)
        names = [name for name, role in state.roles.items() if role != "scratch"]
        self.specs: Mapping[str, TensorSpec] = {
            name: TensorSpec(tuple(state.tensors[name].shape), state.tensors[name].dtype)
            for name in names
        }
        self.aliases: Mapping[str, str] = {
            alias: name for alias, name in state.aliases.items() if name in self.specs
        }
        self._dense = {name: old for old, (fate, name) in record.ledger.items() if fate == "kept"}
        self._missing = frozenset(source.missing)
        self._rest = rest_of(dense, resolved, source)
        self._lacking: frozenset[str] = frozenset()
        for layer in resolved if self._rest is not source else ():
            if layer.init.experts == "models":
                folders = sources_for(dense, layer)
                self._lacking |= {name for folder in folders for name in folder.missing}
        self._buffers = {t.name: t.tensor for t in tensors_of(dense) if t.role == "buffer"}
        self._layers = {
            layer.block: _Layer(dense, self._rest, discovery, layer) for layer in record.layers
        }
        self._block: dict[str, str] = {}
        for name in names:
            parts = name.split(".")
            paths = (".".join(parts[:depth]) for depth in range(len(parts)))
            found = next((path for path in paths if path in self._layers), None)
            if found is not None:
                self._block[name] = found

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        spec = self.specs[name]
        rows = range(*slice(start, stop).indices(spec.shape[0])) if spec.shape else range(0)
        tensor = self._made(name, rows) if name in self._block else self._kept(name, rows)
        return tensor.to(spec.dtype).contiguous()

    def _kept(self, name: str, rows: range) -> Tensor:
        old = self._dense.get(name, name)
        old = self.source.aliases.get(old, old)
        if old in self._missing:  # a buffer that the files leave out is as it was built
            buffer = self._buffers[name].detach().to("cpu")
            return buffer[rows.start : rows.stop] if buffer.dim() else buffer
        source = self.source if old in self._lacking else self._rest
        if not self.specs[name].shape:
            return source.read(old)
        return source.read(old, rows.start, rows.stop)

    def _made(self, name: str, rows: range) -> Tensor:
        path = self._block[name]
        layer = self._layers[path]
        for other_path, other in self._layers.items():
            if other_path != path:
                other.forget()
        leaf = name[len(path) + 1 :] if path else name
        if _is_stacked(leaf):
            return layer.experts(leaf, rows)
        part = layer.part(leaf)
        return part[rows.start : rows.stop] if part.dim() else part


def _is_stacked(leaf: str) -> bool:
    """Return whether a tensor of a block has a row for each expert."""
    return leaf.startswith("experts.") and leaf.count(".") == 1


class _Layer:
    """Makes the tensors of one block, and keeps the last ones."""

    def __init__(
        self,
        dense: nn.Module,
        source: TensorSource,
        discovery: Discovery,
        converted: ConvertedLayer,
    ) -> None:
        self.layer: LayerPlan = converted.layer
        self._model, self._source = dense, source
        self._found = find_site(discovery, self.layer)
        site = self.layer.site
        linears = (*site.up, site.down)
        names = [n for p in linears for n in (p.weight, p.bias) if n is not None]
        self._names = tuple(dict.fromkeys((*names, *site.inner)))
        self._weights: dict[str, Tensor] = {}
        self._made: tuple[range, dict[str, Tensor]] | None = None
        self._parts: dict[str, Tensor] = {}

    def forget(self) -> None:
        self._weights, self._made, self._parts = {}, None, {}

    def part(self, leaf: str) -> Tensor:
        """Return a tensor that belongs to no expert, such as `router.weight`."""
        if not self._parts:
            with self._real(), torch.no_grad():
                tensors = _taken(build_block(self._model, self.layer, self._found, range(1)))
            self._parts = {name: t for name, t in tensors.items() if not _is_stacked(name)}
        return self._parts[leaf]

    def experts(self, leaf: str, share: range) -> Tensor:
        """Return a tensor of some experts, stacked."""
        alike = self.layer.init.experts == "copy"
        made = self._stacked(range(1) if alike else share)[_leaf(leaf)]
        return made.expand(len(share), *made.shape[1:]) if alike else made

    def _stacked(self, share: range) -> dict[str, Tensor]:
        """Return all tensors of some experts; the last ones are kept."""
        if self._made is not None and self._made[0] == share:
            return self._made[1]
        self._made = None  # before the next ones are made
        with self._real(), torch.no_grad():
            if self._found is None:
                tensors = _taken(build_block(self._model, self.layer, None, share))
                found = {_leaf(name): t for name, t in tensors.items() if _is_stacked(name)}
            else:
                weights = expert_weights(self._model, self.layer, self._found, None, share)
                found = {name: t.contiguous() for name, t in weights.named().items()}
        self._made = share, found
        return found

    @contextmanager
    def _real(self) -> Iterator[None]:
        """Put the layer's weights into the dense model for a while."""
        if not self._weights:
            for name in self._names:
                old = self._source.aliases.get(name, name)
                dtype = self._model.get_parameter(name).dtype
                self._weights[name] = self._source.read(old).to(dtype)
        before: list[tuple[nn.Module, str, nn.Parameter | None]] = []
        try:
            for name, tensor in self._weights.items():
                path, _, key = name.rpartition(".")
                module = self._model.get_submodule(path)
                empty = self._model.get_parameter(name)
                before.append((module, key, module._parameters[key]))
                module._parameters[key] = nn.Parameter(tensor, requires_grad=empty.requires_grad)
            yield
        finally:
            for module, key, parameter in before:
                module._parameters[key] = parameter


def _leaf(name: str) -> str:
    return name.removeprefix("experts.")


def _taken(block: nn.Module) -> dict[str, Tensor]:
    """Return a block's tensors and strip it of them: its graphs are cycles, collected late."""
    found: dict[str, Tensor] = dict(block.named_parameters(remove_duplicate=False))
    found |= dict(block.named_buffers(remove_duplicate=False))
    for module in block.modules():
        module._parameters.clear()
        module._buffers.clear()
    return {name: tensor.detach() for name, tensor in found.items()}


def stream(
    folder: Path | str, plan: Plan, dtype: torch.dtype | None = None
) -> tuple[nn.Module, StreamedTensors]:
    """Convert a dense Hugging Face folder without holding its weights.

    Return the converted model on meta, and its tensors; a dtype of None is that of the config or
    files.
    """
    place = model_folder(folder)
    dense = build_on_meta(place, dtype)
    source = open_dense_folder(place, dense)
    _refuse_missing(source, dense, place)
    refuse_wrapped(dense)
    try:
        inputs, discovery, resolved = prepare(dense, plan, None)
    except CaptureError as error:
        raise CaptureError(f"{error}; --in-memory runs it with its weights") from error
    for layer in resolved:
        if layer.init.needs_activations:
            raise MoeifyError(
                f"{layer.name}: its experts start from activations, so the model must run: use "
                "--in-memory, and --calibration FILE for texts of your own"
            )
    model = copy.deepcopy(dense)
    built = run_pipeline(model, plan, resolved, discovery)
    Installation(model, plan, resolved, discovery, built, inputs, verify=False).run()
    return model, StreamedTensors(model, dense, source, discovery, resolved)


def _refuse_missing(source: DenseTensors, dense: nn.Module, place: Path) -> None:
    """Refuse a folder without some parameters, which transformers would draw at random."""
    parameters = {name for name, _ in dense.named_parameters(remove_duplicate=False)}
    missing = [name for name in source.missing if name in parameters]
    if missing:
        raise MoeifyError(
            f"{place}: the files lack {shorten(missing, 3)}, which transformers would draw at "
            "random; --in-memory does so"
        )
