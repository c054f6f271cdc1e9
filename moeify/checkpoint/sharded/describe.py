"""What a sharded checkpoint says of a model beside its tensors: enough to make a single folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeify.capture.input_spec import describable
from moeify.checkpoint.rebuild import config_texts, describe_conversion, describe_model
from moeify.checkpoint.sharded.chunks import Pieces
from moeify.checkpoint.sharded.manifest import (
    VERSION,
    DataFile,
    OptimizerRecord,
    PieceRecord,
    ShardedManifest,
    StoredTensor,
    check,
)
from moeify.checkpoint.sharded.storage_writer import Finish
from moeify.sites.record import require_conversion
from moeify.storage.manifest import ModelRecord
from moeify.storage.model_state import State
from moeify.units import dtype_name

__all__ = ["describe"]


def describe(
    model: nn.Module,
    state: State,
    optimizer: OptimizerRecord | None,
    tensors: dict[str, Pieces],
    step: int,
    extra: dict[str, Any],
    world: int,
) -> Finish:
    """Describe a model now; return what makes the manifest once the pieces are written.

    Of `tensors`, all by key, only shapes and dtypes are kept.
    """
    common = _of_model(model) | {
        "format": "moeify-sharded",
        "version": VERSION,
        "step": step,
        "world": world,
        "aliases": dict(state.aliases),
        "optimizer": optimizer,
        "extra": extra,
    }
    kinds = {key: (dtype_name(p.dtype), list(p.shape)) for key, p in tensors.items()}
    roles = {f"model.{name}": role for name, role in state.roles.items()}
    trains = {f"model.{name}": bool(t.requires_grad) for name, t in state.tensors.items()}
    known = [key for key in kinds if not key.startswith("rng.")]

    def finish(pieces: dict[str, list[PieceRecord]], files: list[DataFile]) -> ShardedManifest:
        stored = {}
        for key in dict.fromkeys([*known, *pieces]):
            is_rng = key.startswith("rng.")
            found = pieces.get(key, [])
            # The generators of other ranks are known from their pieces alone: one of bytes each.
            dtype, shape = kinds.get(key) or ("uint8", found[0].size)
            role = "rng" if is_rng else roles.get(key, "optimizer")
            stored[key] = StoredTensor(
                dtype=dtype,
                shape=shape,
                role=role,  # type: ignore[arg-type]
                requires_grad=trains.get(key, False),
                pieces=found,
            )
        manifest = ShardedManifest.model_validate(common | {"tensors": stored, "files": files})
        check(manifest, "the new checkpoint")
        return manifest

    return finish


def _of_model(model: nn.Module) -> dict[str, Any]:
    """Return what the manifest says of the model and its conversion."""
    conversion = require_conversion(model)
    parallel = conversion.parallel
    layout = None if parallel is None else parallel.layout
    return describe_conversion(model) | {
        "layout": {
            "tensor": 1 if layout is None else layout.tensor,
            "expert": 1 if layout is None else layout.expert,
            "experts_in_tp": "replicate" if layout is None else layout.experts_in_tp,
        },
        "model": _model_record(model),
        "inputs": conversion.inputs if describable(conversion.inputs) else None,
        "texts": config_texts(model),
    }


def _model_record(model: nn.Module) -> ModelRecord:
    record = describe_model(model)
    cls = next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))
    return record.model_copy(update={"name": f"{cls.__module__}.{cls.__qualname__}"})
