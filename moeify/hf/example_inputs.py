"""Make small example inputs for a Hugging Face model from its config and its signature alone.

A table has one or a few likely shapes for each argument name. Where several fit (is a waveform
`[B, T]` or `[B, 1, T]`? how many image tokens does this projector make?), each is tried on fake
tensors until one runs.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moeify.capture.capture import capture
from moeify.errors import CaptureError

BATCH = 2
LENGTH = 8
_TRIES = 48
_PARTS = (
    "text_config vision_config image_config audio_config encoder decoder backbone_config".split()
)

Inputs = dict[str, Any]


def make_inputs(model: nn.Module) -> Inputs:
    """Return inputs on which `model`, which has a `config`, runs.

    Raises:
        CaptureError: Its signature asks for something unknown, or nothing that was tried runs.
    """
    config: Any = model.config
    parameters = inspect.signature(model.forward).parameters
    names = _wanted(model, parameters)
    candidates = list(itertools.islice(_candidates(config, names), _TRIES))
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    finished = [_finish(c, config, parameters, device, dtype) for c in candidates]
    if len(finished) == 1:
        return finished[0]
    first: CaptureError | None = None
    for inputs in finished:
        try:
            capture(model, inputs)
        except CaptureError as error:
            first = first or error
        else:
            return inputs
    raise CaptureError(
        f"none of {len(finished)} likely inputs runs (the first: {first}): give example_inputs"
    ) from first


def _wanted(model: nn.Module, parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return the arguments to make: the main one, and those without a default."""
    config: Any = model.config
    main = str(getattr(model, "main_input_name", ""))
    required = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    names = [main] if main in parameters and main in _MAKERS else []
    names += [name for name in required if name not in names]
    if not names:
        names = [name for name in _MAKERS if name in parameters][:1]
    unknown = [name for name in names if name not in _MAKERS]
    if unknown or not names:
        asked = ", ".join(repr(n) for n in unknown) or "no argument that moeify knows"
        raise CaptureError(
            f"{type(model).__name__} takes {asked}, which moeify cannot make: give "
            "example_inputs, a dict of keyword arguments"
        )
    for other, parts in _SECOND.items():
        has_part = any(getattr(config, part, None) is not None for part in parts)
        if other in parameters and other not in names and has_part:
            names.append(other)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in parameters:
        names.append("decoder_input_ids")
    for extra in _TOGETHER:
        if extra in parameters and extra not in names and set(names) & _TOGETHER[extra]:
            names.append(extra)
    return list(dict.fromkeys(names))


_SECOND = {"pixel_values": ("vision_config", "image_config"), "input_ids": ("text_config",)}
"""Arguments of a second modality, and the parts of a config that show it."""

_TOGETHER: dict[str, frozenset[str]] = {
    "past_time_features": frozenset({"past_values"}),
    "past_observed_mask": frozenset({"past_time_features", "past_values"}),
    "future_values": frozenset({"past_time_features"}),
    "future_time_features": frozenset({"past_time_features"}),
    "image_grid_thw": frozenset({"pixel_values"}),
    **dict.fromkeys(("actions", "rewards", "returns_to_go", "timesteps"), frozenset({"states"})),
}
"""Arguments with a default that are needed beside others."""


def _candidates(config: Any, names: list[str]) -> Iterator[Inputs]:
    """Yield likely inputs, the likeliest first."""
    options = [list(_MAKERS[name](config)) for name in names]
    image_token = _of(config, "image_token_id", "image_token_index")
    if image_token is not None and {"pixel_values", "input_ids"} <= set(names):
        place = names.index("input_ids")
        ids = options[place]
        options[place] = [_with_images(ids[0], image_token, n) for n in _image_tokens(config)] + ids
    ordered = sorted(
        itertools.islice(itertools.product(*(range(len(o)) for o in options)), 4 * _TRIES),
        key=sum,
    )
    for choice in ordered:
        yield {name: o[i] for name, o, i in zip(names, options, choice, strict=True)}
    if {"pixel_values", "input_ids"} <= set(names):
        yield {"input_ids": next(_ids(config))}


def _finish(
    inputs: Inputs,
    config: Any,
    parameters: Mapping[str, inspect.Parameter],
    device: torch.device,
    dtype: torch.dtype,
) -> Inputs:
    inputs = dict(inputs)
    if "input_ids" in inputs and "attention_mask" in parameters:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "use_cache" in parameters or hasattr(config, "use_cache"):
        inputs["use_cache"] = False
    return {
        key: value.to(device, dtype if value.is_floating_point() else None)
        if isinstance(value, Tensor)
        else value
        for key, value in inputs.items()
    }


def _of(config: Any, *names: str, default: Any = None) -> Any:
    """Return the first attribute that a config or one of its parts has."""
    parts = [getattr(config, part, None) for part in _PARTS]
    for part in (config, *parts):
        for name in names:
            value = part.get(name) if isinstance(part, dict) else getattr(part, name, None)
            if value is not None:
                return value
    return default


def _floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _ids(config: Any) -> Iterator[Tensor]:
    """Yield token ids [B, L], special ones left out."""
    parts = [config, *(getattr(config, part, None) for part in _PARTS)]
    sizes = [getattr(part, "vocab_size", None) for part in parts]
    size = min((n for n in sizes if isinstance(n, int) and n > 0), default=100)
    special = set()
    for kind in ("pad", "bos", "eos", "image", "video", "audio"):
        token = _of(config, f"{kind}_token_id")
        special |= set(token) if isinstance(token, list | tuple) else {token}
    low = min(3, size - 1)
    plain = [i for i in range(low, size) if i not in special] if size < 10**6 else []
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(0, len(plain) or size, (BATCH, LENGTH), generator=draw)
    yield torch.tensor(plain)[ids] if plain else ids


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, Mapping):
        value = (value.get("height", 32), value.get("width", 32))
    if isinstance(value, list | tuple):
        return int(value[0]), int(value[-1])
    return int(value), int(value)


def _images(config: Any) -> Iterator[Tensor]:
    channels = int(_of(config, "num_channels", "in_channels", "in_chans", default=3))
    if _of(config, "spatial_merge_size") is not None and _of(config, "temporal_patch_size"):
        patch, merge = _pair(_of(config, "patch_size"))[0], int(_of(config, "spatial_merge_size"))
        values = channels * int(_of(config, "temporal_patch_size")) * patch**2
        yield _floats(BATCH * (2 * merge) ** 2, values)
    size = _of(config, "image_size", "img_size")
    sizes = [_pair(size)] if size is not None else [(64, 64), (224, 224)]
    frames = _of(config, "num_frames", "video_length")
    for height, width in sizes:
        if frames is not None:
            yield _floats(BATCH, int(frames), channels, height, width)
        yield _floats(BATCH, channels, height, width)
        yield _floats(BATCH, 1, channels, height, width)


def _videos(config: Any) -> Iterator[Tensor]:
    for image in _images(config):
        if image.dim() == 4:
            frames = int(_of(config, "num_frames", "frames_per_clip", default=4))
            yield image[:, None].repeat(1, frames, 1, 1, 1)


def _grid(config: Any) -> Iterator[Tensor]:
    side = 2 * int(_of(config, "spatial_merge_size", default=1))
    yield torch.tensor([[1, side, side]] * BATCH)


def _image_tokens(config: Any) -> list[int]:
    """Return how many tokens one image may take in the text."""
    counts = [
        _of(config, name)
        for name in ("image_seq_length", "image_seq_len", "mm_tokens_per_image", "num_image_tokens")
    ]
    counts.append(_of(config, "num_query_tokens", "num_queries"))
    patch = _of(config, "patch_size")
    if patch is not None:
        height, width = _pair(_of(config, "image_size", default=32))
        high, wide = _pair(patch)
        patches = (height // high) * (width // wide)
        names = ("scale_factor", "spatial_merge_size", "downsample_factor", "pixel_shuffle_ratio")
        scales = [_of(config, name) for name in names]
        merge = _of(config, "spatial_merge_size")
        if merge is not None:
            counts.append(4)  # what `_grid` makes
        for scale in (*scales, 1, 2, 4):
            if isinstance(scale, int | float) and scale > 0:
                scale = scale if scale >= 1 else 1 / scale
                counts += [int(patches / scale**2), int(patches / scale**2) + 1]
    return list(dict.fromkeys(c for c in counts if isinstance(c, int) and 0 < c < 4096))


def _with_images(ids: Tensor, token: int, count: int) -> Tensor:
    return torch.cat([ids[:, :2], ids.new_full((ids.shape[0], count), token), ids[:, 2:]], 1)


def _waves(config: Any) -> Iterator[Tensor]:
    bins, frames = _of(config, "num_mel_bins"), _of(config, "max_length")
    if bins is not None and isinstance(frames, int):
        yield _floats(BATCH, frames, int(bins))
    yield _floats(BATCH, 4000)
    yield _floats(BATCH, int(_of(config, "audio_channels", default=1)), 4000)
    yield _floats(BATCH, 1, 16000)


def _features(config: Any) -> Iterator[Tensor]:
    frames = 2 * int(_of(config, "max_source_positions", default=50))
    names = "num_mel_bins input_feat_per_channel feature_projection_input_dim input_dim".split()
    found = [_of(config, name) for name in names]
    for bins in dict.fromkeys(int(b) for b in (*found, 80) if isinstance(b, int)):
        yield _floats(BATCH, bins, frames)
        yield _floats(BATCH, min(frames, 64), bins)
        yield _floats(BATCH, 1, frames, bins)


def _hidden(config: Any) -> Iterator[Tensor]:
    width = int(_of(config, "hidden_size", "d_model", "n_embd", "dim", "d_latents", default=32))
    yield _floats(BATCH, LENGTH, width)
    yield _floats(LENGTH, width)


def _history(config: Any) -> int:
    lags = _of(config, "lags_sequence", default=[0])
    return int(_of(config, "context_length", default=16)) + max(lags, default=0)


def _series(config: Any) -> Iterator[Tensor]:
    channels = int(_of(config, "num_input_channels", "input_size", default=1))
    if channels > 1 or _of(config, "lags_sequence") is None:
        yield _floats(BATCH, _history(config), channels)
    yield _floats(BATCH, _history(config))


def _future(config: Any) -> int:
    return int(_of(config, "prediction_length", default=4))


def _time_features(length: Callable[[Any], int]) -> Callable[[Any], Iterator[Tensor]]:
    def make(config: Any) -> Iterator[Tensor]:
        yield _floats(BATCH, length(config), int(_of(config, "num_time_features", default=1)))

    return make


def _sized(*shape: str | int, kind: str = "float") -> Callable[[Any], Iterator[Tensor]]:
    """Return a maker of a tensor whose dimensions are numbers or the config's attributes."""

    def make(config: Any) -> Iterator[Tensor]:
        sizes = [n if isinstance(n, int) else int(_of(config, n, default=4)) for n in shape]
        if kind == "float":
            yield _floats(BATCH, *sizes)
        elif kind == "ones":
            yield torch.ones(BATCH, *sizes, dtype=torch.long)
        else:
            count = math.prod(sizes)
            yield torch.arange(count).reshape(1, *sizes).repeat(BATCH, *(1 for _ in sizes))

    return make


def _series_like(config: Any) -> Iterator[Tensor]:
    yield from (torch.ones_like(values) for values in _series(config))


_MAKERS: dict[str, Callable[[Any], Iterator[Tensor]]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _images,
    "pixel_values_videos": _videos,
    "image_grid_thw": _grid,
    "grid_thw": _grid,
    "input_features": _features,
    "input_values": _waves,
    "inputs_embeds": _hidden,
    "hidden_states": _hidden,
    "past_values": _series,
    "past_time_features": _time_features(_history),
    "past_observed_mask": _series_like,
    "future_values": lambda config: iter([_floats(BATCH, _future(config))]),
    "future_time_features": _time_features(_future),
    "states": _sized(LENGTH, "state_dim"),
    "actions": _sized(LENGTH, "act_dim"),
    "rewards": _sized(LENGTH, 1),
    "returns_to_go": _sized(LENGTH, 1),
    "timesteps": _sized(LENGTH, kind="index"),
    "input_features_mask": _sized(64, kind="ones"),
}
"""Argument names to makers of likely values, the likeliest first."""
