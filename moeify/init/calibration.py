"""The inputs of chosen MLPs when the dense model runs on its example inputs.

Shapes: T tokens, D model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moeify import compat
from moeify.capture.capture import ExampleInputs, split_inputs
from moeify.capture.preserve import preserved
from moeify.capture.torch_calls import tensors_in
from moeify.errors import CaptureError
from moeify.plan.layer_plan import LayerPlan
from moeify.sites.discovery import Discovery, find_site

MOST = 8192
"""Upper bound of the tokens that are kept, evenly spread."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """The inputs of one MLP."""

    rows: Tensor  # [T, D] float32, on the CPU, without what an attention mask marks as padding
    batch: Tensor  # [T] int64, the row of the batch that each belongs to
    batches: int  # rows of the batch


def mlp_inputs(
    model: nn.Module,
    discovery: Discovery,
    layers: Iterable[LayerPlan],
    example_inputs: ExampleInputs,
) -> dict[str, Calibration]:
    """Run the dense model once, in evaluation mode; return the inputs of MLPs by layer name.

    The model is left as it was. It is not run if no layer needs activations, or on `meta`.

    Raises:
        CaptureError: The model does not run, or an MLP did not.
    """
    wanted = [layer for layer in layers if layer.init.needs_activations]
    if not wanted or any(p.is_meta for p in model.parameters()):
        return {}
    args, kwargs = split_inputs(example_inputs)
    seen: dict[str, list[Tensor]] = {layer.name: [] for layer in wanted}
    handles = []
    with preserved(model), torch.no_grad():
        for module in model.modules():
            module.__dict__["training"] = False
            compat.disable_fused_encoder(module)  # it bypasses the projections
        for layer in wanted:
            found = find_site(discovery, layer)
            path, argument, channel = layer.site.name, "", -1
            if found is not None:
                place = found.placement
                path = place.module if place.install == "module" else place.taps[0]
                argument = place.argument if place.install == "module" else ""
                channel = found.region.ups[0].channel
            hook = _recorder(seen[layer.name], argument, channel)
            target = model.get_submodule(path)
            handles.append(target.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            torch.manual_seed(0)
            model(*args, **kwargs)
        except Exception as error:
            raise CaptureError(f"the model does not run on the example inputs: {error}") from error
        finally:
            for handle in handles:
                handle.remove()
    missing = [name for name, rows in seen.items() if not rows]
    if missing:
        raise CaptureError(f"{missing[0]}: the model does not call it in evaluation mode")
    batches = next((t.shape[0] for t in tensors_in((args, kwargs)) if t.dim()), 1)
    mask = kwargs.get("attention_mask")
    return {name: _calibration(rows, batches, mask) for name, rows in seen.items()}


def _recorder(kept: list[Tensor], argument: str, channel: int) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = kwargs[argument] if argument and argument in kwargs else args[0]
        kept.append(x.detach().movedim(channel, -1).flatten(0, -2).float().cpu())

    return hook


def _calibration(runs: list[Tensor], batches: int, mask: Any) -> Calibration:
    rows, owners = [], []
    for run in runs:
        each = len(run) // batches if batches and len(run) % batches == 0 else 0
        owner = torch.arange(len(run)) // each if each else torch.zeros(len(run), dtype=torch.int64)
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == len(run):
            real = mask.flatten().bool().cpu()
            run, owner = run[real], owner[real]
        rows.append(run)
        owners.append(owner)
    x, batch = torch.cat(rows), torch.cat(owners)
    step = -(-len(x) // MOST)
    return Calibration(x[::step], batch[::step], batches)
