"""What of a converted model matters to a class of transformers, and what no such class can have.

Nothing is assumed: a dense class is in `FAMILIES` or refused; every field of its config is known,
at its default, or a reason to refuse; the modules are compared with a model built from that config.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

from moeify.hf.dense_class import dense_class, dense_classes, dense_config
from moeify.plan.layer_plan import LayerPlan
from moeify.plan.specs import RouterSpec
from moeify.sites.record import Conversion, ConvertedLayer
from moeify.storage.tensor_source import TensorSource
from moeify.units import dtype_name

# Dense classes by name, with their module of transformers.
FAMILIES: Final = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

_REFUSED: Final = {
    "OlmoForCausalLM": "its norms have no weights and subtract the mean",
    "Olmo2ForCausalLM": "its norms come after attention and MLP, not before them",
    "Olmo3ForCausalLM": "its norms come after attention and MLP, not before them",
    "GemmaForCausalLM": "its norms multiply by 1 + weight, and its embeddings are scaled",
}

# Config fields that have one name and one meaning in every class here.
SAME: Final = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)

_SEEN: Final = {
    *SAME,
    "rope_parameters",
    "intermediate_size",
    "head_dim",
    "attention_bias",
    "mlp_bias",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
}
_IRRELEVANT: Final = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "pretraining_tp",  # read by no class of transformers 5
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
}
_ROUTER: Final = {
    "score",
    "combine",
    "noise",
    "jitter_eps",
    "capacity_factor",
    "eval_capacity_factor",
    "min_capacity",
    "drop",
    "balance",
    "aux_loss",
    "z_loss",
    "bias_update",
}


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """A converted MLP of a decoder."""

    plan: LayerPlan
    block: str
    width: int  # of an expert

    @property
    def index(self) -> int:
        """Position among the model's layers."""
        return int(self.block.split(".")[2])

    @property
    def normalized(self) -> bool:
        """Whether a token's combine weights sum to 1; else they are the scores."""
        return self.plan.router.combine != "probability"

    @property
    def biased(self) -> bool:
        return self.plan.router.bias_update > 0

    @property
    def any_score(self) -> bool:
        """Whether only the order of the scores matters: one expert, with weight 1."""
        return self.plan.top_k == 1 and self.normalized and not self.biased


@dataclass(frozen=True, slots=True)
class Facts:
    """A converted model as the classes see it."""

    config: Any  # the dense model's
    layers: tuple[DecoderLayer, ...]  # by position
    depth: int
    width: int  # of a dense MLP
    head_dim: int
    head_norm: bool  # queries and keys are normalised head by head
    qkv_bias: bool
    output_bias: bool  # of the attention
    window: int | str | None  # sliding window of all layers, or "mixed"
    dtype: torch.dtype  # of every parameter

    @property
    def free_head_dim(self) -> bool:
        """Whether the width of a head is not hidden_size / heads."""
        return bool(self.head_dim * self.config.num_attention_heads != self.config.hidden_size)


def facts_of(model: nn.Module, record: Conversion, tensor_source: TensorSource) -> Facts | str:
    """Return the facts of a converted model, or why no class of transformers fits."""
    cls = dense_class(model)
    config: Any = getattr(model, "config", None)
    if cls is not type(model):  # loaded from a custom export: its config says more
        kind: Any = dense_classes(model)[1]
        config = kind.from_dict(dense_config(model))
    reason = next(_no_class(model, cls, config, record, tensor_source), None)
    if reason is not None:
        return reason
    family = FAMILIES[cls.__name__]
    bias = bool(getattr(config, "attention_bias", False))
    window: int | str | None = config.sliding_window if family == "mistral" else None
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        window = "mixed"
    heads = config.hidden_size // config.num_attention_heads
    layers = [
        DecoderLayer(
            converted.layer,
            converted.block,
            tensor_source.specs[f"{converted.block}.experts.down_proj"].shape[2],
        )
        for converted in record.layers
    ]
    layers.sort(key=lambda layer: layer.index)
    return Facts(
        config=config,
        layers=tuple(layers),
        depth=config.num_hidden_layers,
        width=config.intermediate_size,
        head_dim=getattr(config, "head_dim", None) or heads,
        head_norm=family == "qwen3",
        qkv_bias=bias or family == "qwen2",
        output_bias=bias,
        window=window,
        dtype=tensor_source.specs[f"{layers[0].block}.router.weight"].dtype,
    )


def _no_class(
    model: nn.Module, cls: type, config: Any, record: Conversion, tensor_source: TensorSource
) -> Iterator[str]:
    name = cls.__name__
    if name in _REFUSED:
        yield f"{name}: {_REFUSED[name]}"
    known = f"transformers.models.{FAMILIES.get(name)}.modeling_{FAMILIES.get(name)}"
    if cls.__module__ != known:
        known_to_all = cls.__module__.startswith("transformers.models.")
        shown = name if known_to_all else f"{cls.__module__}.{name}"
        yield f"{shown} is none of {', '.join(FAMILIES)} of transformers"
    yield from _config_reasons(config)
    with torch.device("meta"):
        fresh: nn.Module = cls(config)
    yield from _module_reasons(model, fresh, [layer.block for layer in record.layers])
    for layer in record.layers:
        yield from _layer_reasons(layer, tensor_source)
    extra = (".router.selection_bias", ".router.pending_counts")
    dtypes = {dtype_name(s.dtype) for n, s in tensor_source.specs.items() if not n.endswith(extra)}
    if len(dtypes) != 1:
        yield f"its parameters have dtypes {' and '.join(sorted(dtypes))}, but would load as one"
    ties = {frozenset(pair) for pair in tensor_source.aliases.items()}
    embedding = frozenset(("lm_head.weight", "model.embed_tokens.weight"))
    if odd := sorted(min(pair) for pair in ties - {embedding}):
        yield f"{odd[0]} is tied to another tensor"
    if getattr(config, "tie_word_embeddings", False) != (embedding in ties):
        yield "config.tie_word_embeddings does not agree with the weights"


def _config_reasons(config: Any) -> Iterator[str]:
    default = type(config)().to_dict()
    for key, value in config.to_dict().items():
        if key in _IRRELEVANT or value == default.get(key, None):
            continue
        if key == "head_dim" or (key in _SEEN and key in default):  # Qwen2 reads a head_dim too
            continue
        if key in default or value not in (None, False):
            yield f"config.{key} is {value!r:.60}, whose effect is not known"
    if config.hidden_act not in ("silu", "swish"):
        yield f"config.hidden_act is {config.hidden_act}; these classes' readers support silu only"
    if getattr(config, "mlp_bias", False):
        yield "config.mlp_bias: experts of these classes have no biases"
    rope = config.rope_parameters or {}
    if any(isinstance(part, dict) for part in rope.values()):
        yield "config.rope_parameters differ between layers"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield "config.rope_parameters rotate only a part of each head"


def _module_reasons(model: nn.Module, fresh: nn.Module, blocks: list[str]) -> Iterator[str]:
    """Compare the modules with those of a model from the same config."""
    inside = tuple(f"{block}." for block in blocks)
    expected = dict(fresh.named_modules())
    for path, module in model.named_modules():
        if not path or path in blocks or path.startswith(inside):
            continue
        built = expected.get(path)
        if built is None:
            yield f"{path} is not a part of a {type(fresh).__name__}"
        elif type(module) is not type(built) or module.extra_repr() != built.extra_repr():
            now = f"{type(module).__name__}({module.extra_repr()})"
            yield f"{path} is a {now}, not what the config says"
        elif "forward" in module.__dict__:
            yield f"{path}: its forward is patched"


def _layer_reasons(converted: ConvertedLayer, tensor_source: TensorSource) -> Iterator[str]:
    layer, block = converted.layer, converted.block
    site, router = layer.site, layer.router
    if not re.fullmatch(r"model\.layers\.[0-9]+\.mlp", block) or layer.expert != "mlp":
        yield f"{layer.name}: is not an MLP of a decoder layer"
    if site.activation != "silu" or not site.gated or site.inner or site.calls != 1:
        yield f"{layer.name}: is not a gated silu MLP that runs once"
    if layer.residual == "coefficient":
        yield f"{layer.name}: `residual: coefficient`, a learned softmax of two, exists in no class"
    if router.eval_capacity_factor is not None:
        yield f"{layer.name}: `eval_capacity_factor` drops tokens, and no class does in evaluation"
    if router.combine == "sum" and layer.top_k > 1:
        yield f"{layer.name}: `combine: sum` gives {layer.top_k} experts weight 1; no class does"
    elif router.combine not in ("straight_through", "normalized", "probability", "sum"):
        yield f"{layer.name}: `combine: {router.combine}` exists in no class"
    for name in sorted(RouterSpec.model_fields.keys() - _ROUTER):
        if getattr(router, name) != RouterSpec.model_fields[name].default:
            yield f"{layer.name}: `router.{name}` exists in no class"
    names = {"router.weight", "experts.gate_up_proj", "experts.down_proj"}
    if router.bias_update > 0:
        names |= {"router.selection_bias", "router.pending_counts"}
    if layer.residual != "none":
        names |= {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    if layer.residual == "sigmoid":
        names.add("residual_mix.coefficient.weight")
    found = {n.removeprefix(f"{block}.") for n in tensor_source.specs if n.startswith(f"{block}.")}
    if odd := sorted(names ^ found):
        yield f"{layer.name}: {'has' if odd[0] in found else 'lacks'} {odd[0]}"
