"""The MoE classes of transformers that moeify writes: what each can be, and its config.

A `Target` is data; `misfits` says why a model is not of its class, `config_of` fills in its config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from moeify.formats.native.model_facts import SAME, Facts
from moeify.units import dtype_name

# Width of a shared expert of zeros, where a class has one and the model does not: it can be sliced
# over ranks, while a width of 0 makes kernels fail.
_SHARED_WIDTH: Final = 128

# What of a model a config can ask for; `_numbers_of` finds it.
Number: TypeAlias = Literal[
    "experts",
    "expert_width",
    "dense_width",
    "dense_layers",
    "dense_count",
    "shared_width",
    "shared_count",
    "window",
    "qkv_bias",
    "head_norm",
]


@dataclass(frozen=True, slots=True)
class Target:
    """One class, and what a model must be to be written as it."""

    architecture: str
    config: str  # name of its config's class
    # Names on disk: the MoE part of a layer, an expert's gate, up and down, the shared expert.
    moe: str = "mlp"
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    residual: str = "none"  # the plan's residual that the shared expert is
    qkv_bias: Literal["never", "always", "maybe"] = "never"
    # Norm of queries and keys: of each head, or of the full width; "maybe" is each head or none.
    norm: Literal["none", "head", "full", "maybe"] = "none"
    window: bool = False  # can have a sliding window
    head_dim: bool = True  # heads can have a width of their own
    dense: Literal["none", "any", "first"] = "none"  # which layers can be dense
    score: str = "softmax"
    selection_bias: bool = False  # has one, so that layers can differ in experts
    probability: bool = True  # combine weights can be the scores themselves
    aux_loss: bool = True  # its config has a weight of the balance loss
    # Of its config: keys with the number of the model that belongs there, keys with one value for
    # every model, and keys of `rope_parameters` beside the dense model's.
    numbers: Mapping[str, Number] = field(default_factory=dict)
    constants: Mapping[str, Any] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)


_QWEN_NUMBERS: Final[Mapping[str, Number]] = {
    "num_experts": "experts",
    "moe_intermediate_size": "expert_width",
    "intermediate_size": "dense_width",
    "mlp_only_layers": "dense_layers",
}
_QWEN_CONSTANTS: Final = {"decoder_sparse_step": 1, "use_sliding_window": False}

# In order of preference: what needs no padding first.
TARGETS: Final = (
    Target(
        "MixtralForCausalLM",
        "MixtralConfig",
        moe="block_sparse_moe",
        leaves=("w1", "w3", "w2"),
        window=True,
        probability=False,
        numbers={
            "num_local_experts": "experts",
            "intermediate_size": "expert_width",
            "sliding_window": "window",
        },
    ),
    Target(
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        norm="head",
        dense="any",
        numbers=_QWEN_NUMBERS,
        constants=_QWEN_CONSTANTS,
    ),
    Target(
        "OlmoeForCausalLM",
        "OlmoeConfig",
        norm="full",
        head_dim=False,
        numbers={"num_experts": "experts", "intermediate_size": "expert_width"},
    ),
    Target(
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        shared="shared_expert",
        residual="sigmoid",
        qkv_bias="always",
        head_dim=False,
        dense="any",
        numbers={**_QWEN_NUMBERS, "shared_expert_intermediate_size": "shared_width"},
        constants={**_QWEN_CONSTANTS, "qkv_bias": True},
    ),
    Target(
        "Glm4MoeForCausalLM",
        "Glm4MoeConfig",
        shared="shared_experts",
        residual="add",
        qkv_bias="maybe",
        norm="maybe",
        dense="first",
        score="sigmoid",
        selection_bias=True,
        aux_loss=False,
        numbers={
            "n_routed_experts": "experts",
            "moe_intermediate_size": "expert_width",
            "intermediate_size": "dense_width",
            "first_k_dense_replace": "dense_count",
            "n_shared_experts": "shared_count",
            "attention_bias": "qkv_bias",
            "use_qk_norm": "head_norm",
        },
        constants={
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 1.0,
            "num_mtp_layers": 0,
            "partial_rotary_factor": 1.0,
        },
        rope={"partial_rotary_factor": 1.0},
    ),
)


def misfits(target: Target, facts: Facts) -> Iterator[str]:
    """Yield the reasons why a model is not of this class; none if it is."""
    yield from _attention(target, facts)
    yield from _routing(target, facts)
    yield from _layers(target, facts)


def _attention(target: Target, facts: Facts) -> Iterator[str]:
    if target.norm == "full":
        yield "it normalises queries and keys over their full width, and the dense model does not"
    elif target.norm == "head" and not facts.head_norm:
        yield "it normalises the queries and keys of each head, and the dense model does not"
    elif target.norm == "none" and facts.head_norm:
        yield "it does not normalise queries and keys, and the dense model does"
    if facts.output_bias:
        yield "the attention's output has a bias, which vLLM would leave out"
    elif facts.qkv_bias and target.qkv_bias == "never":
        yield "its queries, keys and values have no biases"
    if facts.window == "mixed" or (facts.window is not None and not target.window):
        yield "the dense model has sliding windows"
    if not target.head_dim and facts.free_head_dim:
        yield f"its readers take hidden_size / heads as the width of a head, not {facts.head_dim}"


def _routing(target: Target, facts: Facts) -> Iterator[str]:
    layers = facts.layers
    for name, values in (
        ("top_k", {layer.plan.top_k for layer in layers}),
        ("hidden width of an expert", {layer.width for layer in layers}),
        ("kind of `combine`", {layer.normalized for layer in layers}),
    ):
        if len(values) > 1:
            yield f"it has one {name} for all layers"
    if not target.probability and not all(layer.normalized for layer in layers):
        yield "its combine weights always sum to 1: it has no `combine: probability`"
    if not target.selection_bias and any(layer.biased for layer in layers):
        yield "it has no selection bias (`bias_update`)"
    if not all(layer.any_score or layer.plan.router.score == target.score for layer in layers):
        uses = "chooses and weights" if layers[0].plan.top_k > 1 else "weights"
        yield (
            f"its router {uses} experts by {target.score} scores: another `router.score` fits only "
            "top_k 1 with weight 1, where nothing but the order matters"
        )


def _layers(target: Target, facts: Facts) -> Iterator[str]:
    layers, positions = facts.layers, [layer.index for layer in facts.layers]
    dense = facts.depth - len(positions)
    if target.dense == "none" and dense:
        yield f"all its layers are MoE, and {dense} of {facts.depth} are dense"
    if target.dense == "first" and positions != list(range(dense, facts.depth)):
        yield "only its first layers can be dense"
    for layer in layers:
        if layer.plan.residual not in ("none", target.residual):
            has = f"`residual: {target.residual}`" if target.shared else "no residual"
            yield f"the plan has `residual: {layer.plan.residual}`, but it has {has}"
            break
    counts = sorted({layer.plan.experts for layer in layers})
    if len(counts) > 1 and not target.selection_bias:
        text = ", ".join(map(str, counts[:-1])) + f" and {counts[-1]}"
        yield f"layers of {text} experts, where it has one number for all"
    shared = any(layer.plan.residual != "none" for layer in layers)
    if target.residual == "add" and shared and facts.width % layers[0].width:
        yield f"its shared width is a multiple of {layers[0].width}, and {facts.width} is not"


def experts_of(target: Target, facts: Facts) -> int:
    """Return how many experts each layer of that class has; a grouped top-k needs two."""
    most = max(layer.plan.experts for layer in facts.layers)
    return max(most, 2) if target.selection_bias else most


def shared_width(target: Target, facts: Facts) -> int:
    """Return the width of its shared expert; 0 if it has none."""
    if not target.shared:
        return 0
    if any(layer.plan.residual != "none" for layer in facts.layers):
        return facts.width
    return facts.layers[0].width if target.residual == "add" else _SHARED_WIDTH


def config_of(target: Target, facts: Facts) -> Any:
    """Make the config of that class."""
    import transformers

    first = facts.layers[0]
    values = {key: getattr(facts.config, key) for key in SAME}
    values["rope_parameters"] = {**facts.config.rope_parameters, **target.rope}
    values |= {"num_experts_per_tok": first.plan.top_k, "output_router_logits": False}
    values |= {"architectures": [target.architecture], "dtype": dtype_name(facts.dtype)}
    if target.head_dim:
        values["head_dim"] = facts.head_dim
    if target.aux_loss:
        values["router_aux_loss_coef"] = first.plan.router.aux_loss
    if target.probability:
        values["norm_topk_prob"] = first.normalized
    numbers = _numbers_of(target, facts)
    values |= {key: numbers[number] for key, number in target.numbers.items()}
    values |= target.constants
    return getattr(transformers, target.config)(**values)


def _numbers_of(target: Target, facts: Facts) -> dict[Number, Any]:
    """Return every number that `Target.numbers` can name."""
    width = facts.layers[0].width
    sparse = {layer.index for layer in facts.layers}
    dense = [i for i in range(facts.depth) if i not in sparse]
    shared = shared_width(target, facts)
    return {
        "experts": experts_of(target, facts),
        "expert_width": width,
        "dense_width": facts.width,
        "dense_layers": dense,
        "dense_count": len(dense),
        "shared_width": shared,
        "shared_count": shared // width,
        "window": facts.window,
        "qkv_bias": facts.qkv_bias,
        "head_norm": facts.head_norm,
    }
