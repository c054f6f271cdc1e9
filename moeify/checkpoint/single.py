"""`save` and `load`: a converted model as a folder of safetensors files, its plan and its config.

A folder is there whole or not at all: it is staged beside the target and renamed at the end. It
is read without unpickling anything, and every byte is checked. The dense model is rebuilt from its
config with its parameters on `meta`, converted there by the same plan, and given the saved
tensors, so that the dense weights are no longer needed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moeify import compat
from moeify.capture.input_spec import describable
from moeify.capture.on_meta import default_device_cpu
from moeify.checkpoint.rebuild import (
    build,
    config_texts,
    convert_again,
    describe_conversion,
    describe_model,
)
from moeify.convert.pipeline import refuse_wrapped
from moeify.errors import CheckpointError, MoeifyError
from moeify.hf.detect import is_hf
from moeify.passes.infra.base import Pass
from moeify.plan import strict_yaml
from moeify.sites.descent import stays_float32
from moeify.sites.record import Conversion, require_conversion, require_one_process
from moeify.storage.atomic_folder import Folder
from moeify.storage.manifest import MAX_BYTES, VERSION, Manifest, read_manifest
from moeify.storage.model_state import (
    Rollback,
    assign,
    check_places,
    collect,
    restore_modes,
    tensors_of,
)
from moeify.storage.safetensors_file import DTYPES, Shard, check_shard, read_shard
from moeify.storage.strict_json import parse_json
from moeify.storage.tensor_source import (
    LiveTensors,
    ModelFiles,
    Output,
    TensorSource,
    TensorSpec,
    copied,
)
from moeify.storage.writer import manifest_writer, write_model_files
from moeify.units import dtype_name, parse_bytes

_READ = ("plan.yaml", "source_config.json", "generation_config.json")


def save(
    model: nn.Module, directory: str | os.PathLike[str], *, max_shard_size: int | str = "5GB"
) -> None:
    """Save a converted model, all or nothing.

    The folder holds `moeify-*.safetensors`, `moeify.json` (the plan, what was converted, and the
    digest of every file), `plan.yaml`, and the config of a Hugging Face model as
    `source_config.json`. No file has a name that `from_pretrained` would take for a dense model.

    Args:
        model: A converted model; also inside `torch.compile`, `DataParallel` or DDP.
        directory: A folder that does not exist, is empty, or holds an older save, which is
            replaced in one step; other files in an older save (a tokenizer) stay.
        max_shard_size: Bytes per file, or such as "5GB" and "512MiB".

    Raises:
        CheckpointError: The folder holds something else, the disk is full, or the model has state
            that no safetensors file can hold. What was there before is then unchanged.
        MoeifyError: The model has not been converted.
        ValueError: `max_shard_size` is not a size.

    Example:
        >>> import tempfile
        >>> from moeify import moeify
        >>> mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
        >>> plan = {"layers": [{"select": "all", "experts": 2}]}
        >>> model = moeify(nn.Sequential(mlp), plan, example_inputs=torch.randn(4, 8))
        >>> folder = tempfile.mkdtemp()
        >>> save(model, folder)
        >>> sorted(os.listdir(folder))
        ['moeify-00001-of-00001.safetensors', 'moeify.json', 'plan.yaml']
        >>> again = nn.Sequential(nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)))
        >>> x = torch.randn(4, 8)
        >>> torch.equal(load(folder, model=again)(x), model(x))
        True
    """
    parse_bytes(max_shard_size, "max_shard_size")
    inner = unwrapped(model)
    write_model_files(moeify_files(inner), directory, max_shard_size=max_shard_size)


def moeify_files(
    model: nn.Module,
    tensor_source: TensorSource | None = None,
    *,
    source: Mapping[str, Any] | None = None,
) -> ModelFiles:
    """Return what `save` writes.

    Args:
        model: A converted model; its state dict may be on meta if `tensor_source` is given.
        tensor_source: The tensors of its state dict; those of the model if None.
        source: Where the weights came from, for the manifest.
    """
    conversion = require_conversion(model)
    require_one_process(model, "save")
    for path, module in model.named_modules():
        if compat.is_compiled_module(module):
            raise CheckpointError(
                f"{path}: is wrapped by torch.compile; save before, or use {path}.compile()"
            )
    state = collect(model, values=tensor_source is None)
    tensors = tensor_source if tensor_source is not None else LiveTensors(model)
    outputs = [
        _scratch(name, tensor) if state.roles[name] == "scratch" else copied(tensors, name)
        for name, tensor in sorted(state.tensors.items())
    ]
    texts = {
        "plan.yaml": strict_yaml.dump(conversion.plan.data(), "plan.yaml"),
        **config_texts(model),
    }
    draft = {
        "format": "moeify",
        "version": VERSION,
        "model": describe_model(model),
        "inputs": _inputs(model, conversion),
        "dtype": state.main_dtype(),
        "parameters": state.parameters,
        "tensors": {
            output.name: {
                "shard": "",
                "dtype": dtype_name(output.spec.dtype),
                "shape": list(output.spec.shape),
                "role": state.roles[output.name],
                "requires_grad": state.tensors[output.name].requires_grad,
            }
            for output in outputs
        },
        "aliases": state.aliases,
        "shards": [],
        "files": [],
        "source": dict(source or {}),
    }
    manifest = Manifest.model_validate(describe_conversion(model) | draft)
    encoded = {name: text.encode() for name, text in texts.items()}
    return ModelFiles("moeify", tuple(outputs), encoded, manifest_writer(manifest))


def _scratch(name: str, tensor: Tensor) -> Output:
    """Return a buffer outside the state dict, with its present values."""
    spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
    return Output(name, spec, lambda: iter([tensor.detach().to("cpu")]))


def load(
    directory: str | os.PathLike[str],
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    passes: Sequence[Pass] = (),
    verify: bool = True,
) -> nn.Module:
    """Load a saved model; arguments and errors as of `moeify.load`, which is this for users."""
    place = torch.device(device)
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype: {dtype!r} is not a floating-point dtype such as torch.bfloat16")
    _refuse_sharded(directory)
    with Folder(directory) as folder, default_device_cpu():
        manifest = read_manifest(folder)
        texts = _read_texts(folder, manifest)
        shards = [check_shard(folder, s, manifest.of_shard(s.file)) for s in manifest.shards]
        if model is not None:
            try:
                refuse_wrapped(model)
            except MoeifyError as error:
                raise CheckpointError(f"model: {error}") from error
        target = model if model is not None else _build(folder, manifest, texts)
        rollback = Rollback(target)
        try:
            convert_again(target, manifest, folder.path, passes=passes)
            check_places(target, manifest.tensors, manifest.names(), folder.path)
            keep = _stays(target, dtype)
            tensors = _read_tensors(folder, manifest, shards, place, dtype, keep, verify)
            assign(target, tensors, manifest.tensors, manifest.names())
            for item in tensors_of(target):
                if item.tensor.device != place and item.name not in manifest.names():
                    setattr(item.module, item.key, item.tensor.to(place))
        except BaseException:
            rollback.restore()
            raise
    restore_modes(target, manifest.model)
    if dtype is not None and is_hf(target):
        target.config.dtype = dtype
    return target


def _stays(model: nn.Module, dtype: torch.dtype | None) -> Callable[[str], bool]:
    """Return a test for the tensors that stay in float32 where `dtype` casts the others."""
    if dtype is None:
        return lambda name: False
    return stays_float32(model, require_conversion(model), dtype)


def _refuse_sharded(directory: str | os.PathLike[str]) -> None:
    if Path(directory, "moeify-sharded.json").is_file() or any(Path(directory).glob("step-*")):
        raise CheckpointError(
            f"{os.fspath(directory)}: holds sharded checkpoints: moeify.load_sharded(model, ...) "
            "reads them into a converted model, moeify.to_single(..., folder) makes one for load"
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`, `DataParallel` and DDP."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif compat.is_compiled_module(model):
            model = next(model.children())
        else:
            return model


def _inputs(model: nn.Module, conversion: Conversion) -> Any:
    """Return the description of the example inputs, if others can be made from it."""
    if describable(conversion.inputs):
        return conversion.inputs
    if is_hf(model):
        return None
    raise CheckpointError(
        f"the example inputs of the conversion cannot be made again ({conversion.inputs!r:.200}): "
        "convert with tensors, numbers, strings, dicts and tuples"
    )


def _read_texts(folder: Folder, manifest: Manifest) -> dict[str, bytes]:
    """Read the small files that matter and check their digests.

    Others, such as a tokenizer's, are the user's to change.
    """
    texts = {}
    for record in manifest.files:
        if record.file not in _READ and "/" not in record.file:
            continue
        texts[record.file] = folder.read(record.file, limit=MAX_BYTES, size=record.bytes)
        if hashlib.sha256(texts[record.file]).hexdigest() != record.sha256:
            raise CheckpointError(
                f"{folder.where(record.file)}: its SHA-256 is not the one in moeify.json: "
                "it was changed or damaged"
            )
    return texts


def _build(folder: Folder, manifest: Manifest, texts: Mapping[str, bytes]) -> nn.Module:
    parsed = {
        name: parse_json(data, folder.where(name))
        for name, data in texts.items()
        if name.endswith(".json")
    }
    for name, data in parsed.items():
        if not isinstance(data, dict):
            raise CheckpointError(f"{folder.where(name)}: is not a mapping")
    config = parsed.get("source_config.json", {})
    return build(manifest.model, config, parsed.get("generation_config.json"), folder.path)


def _read_tensors(
    folder: Folder,
    manifest: Manifest,
    shards: Sequence[Shard],
    device: torch.device,
    dtype: torch.dtype | None,
    keep: Callable[[str], bool],
    verify: bool,
) -> dict[str, Tensor]:
    """Read every tensor to its device, in its final dtype."""
    tensors = {}

    def final(name: str, tensor: Tensor) -> Tensor:
        record = manifest.tensors[name]
        stays = record.role == "scratch" or name.endswith((".selection_bias", ".pending_counts"))
        wanted = dtype if dtype is not None and tensor.is_floating_point() and not stays else None
        if wanted is not None and keep(name):
            wanted = torch.float32
        return tensor.to(device=device, dtype=wanted)

    if device.type == "meta":
        for name, record in manifest.tensors.items():
            empty = torch.empty(record.shape, dtype=DTYPES[record.dtype], device="meta")
            tensors[name] = final(name, empty)
        return tensors
    for shard in shards:
        for name, tensor in read_shard(
            folder, shard, manifest.of_shard(shard.record.file), verify=verify
        ):
            tensors[name] = final(name, tensor)
    return tensors
