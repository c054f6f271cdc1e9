"""What a sharded checkpoint says of a model beside its tensors: enough to make a single folder."""

from __future__ import annotations

from typing import Any

from torch import nn

from moeify.capture.input_spec import describable
from moeify.checkpoint.rebuild import config_texts, describe_model
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
from moeify.checkpoint.sharded.state import ModelState
from moeify.checkpoint.sharded.storage_writer import Finish
from moeify.convert.replay import layer_records, versions
from moeify.sites.record import require_conversion
from moeify.storage.manifest import ModelRecord
from moeify.storage.model_state import describe_modes
from moeify.units import dtype_name

__all__ = ["describe"]


def describe(
    model: nn.Module,
    state: ModelState,
    optimizer: OptimizerRecord | None,
    tensors: dict[str, Pieces],
    step: int,
    extra: dict[str, Any],
    world: int,
) -> Finish:
    """Describe a model now; return what makes the manifest once the pieces are written.

    Args:
        model: The model.
        state: Its tensors.
        optimizer: What of the optimizer is in no tensor.
        tensors: All tensors by key; their shapes and dtypes are kept, not their values.
        step: Of training.
        extra: The user's data.
        world: Number of ranks.
    """
    common = _of_model(model) | {
        "format": "moeify-sharded",
        "version": VERSION,
        "versions": versions(),
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
            # Those of other ranks are known from their pieces alone: one of bytes.
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
    return {
        "layout": {
            "tensor": 1 if layout is None else layout.tensor,
            "expert": 1 if layout is None else layout.expert,
            "experts_in_tp": "replicate" if layout is None else layout.experts_in_tp,
        },
        "plan": conversion.plan.data(),
        "plan_sha256": conversion.plan.digest(),
        "layers": layer_records(model, conversion),
        "model": _model_record(model),
        "inputs": conversion.inputs if describable(conversion.inputs) else None,
        "ledger": {name: list(fate) for name, fate in conversion.ledger.items()},
        "texts": config_texts(model),
    }


def _model_record(model: nn.Module) -> ModelRecord:
    record = describe_model(model, describe_modes(model))
    cls = next(c for c in type(model).__mro__ if not c.__name__.startswith("FSDP"))
    return record.model_copy(update={"name": f"{cls.__module__}.{cls.__qualname__}"})
