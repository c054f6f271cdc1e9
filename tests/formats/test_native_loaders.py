"""Native folders against the rules of vLLM's and SGLang's loaders, written down from their sources.

Neither can run here. A loader builds its own parameters from the config, fused over projections
and stacked over experts, and maps each name of the folder to a place in them. `places` are those
parameters, `place_of` is that mapping; every place must be filled once, and every name must fit.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers

from moeify import moeify
from moeify.formats.native.export import native_files
from moeify.storage.tensor_source import LiveTensors, ModelFiles

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
SOME = [{"select": {"index": [2, 3]}, "experts": 4, "top_k": 2}]
ALL = [{"select": "all", "experts": 4, "top_k": 2}]
CASES: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any]]] = {
    "mixtral": ("Llama", ALL, {}),
    "mixtral, head_dim": ("Mistral", ALL, {"head_dim": 16}),
    "qwen3": ("Qwen3", SOME, {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", [{**ALL[0], "residual": "sigmoid"}], {"tie_word_embeddings": True}),
    "qwen2, dense layers": ("Llama", SOME, {}),
    "glm4": (
        "Qwen3",
        [
            {"select": {"index": [2]}, "experts": 2, "residual": "add"},
            {"select": {"index": [3]}, "experts": 8},
        ],
        {"head_dim": 16, "tie_word_embeddings": True},
    ),
}


@dataclasses.dataclass(frozen=True)
class Reader:
    """What a loader takes from the config otherwise than another."""

    name: str
    own_head_dim: bool = True
    dense_layers: bool = True


VLLM, SGLANG = Reader("vLLM"), Reader("SGLang")
NO_HEAD_DIM = Reader("SGLang's Mixtral", own_head_dim=False)
ALL_SPARSE = Reader("SGLang's Qwen2Moe", dense_layers=False)


@pytest.fixture(scope="module")
def contents() -> dict[str, ModelFiles]:
    """What would be written; no weight is read."""
    found = {}
    for name, (family, rules, fields) in CASES.items():
        config = getattr(transformers, f"{family}Config")(**(SMALL | fields))
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        ids = {"input_ids": torch.zeros(1, 4, dtype=torch.int64)}
        moeify(model, {"layers": rules}, example_inputs=ids, verify=False)
        found[name] = native_files(model, LiveTensors(model))
    return found


def config_of(model_files: ModelFiles) -> Any:
    """Read the config as a server does, through transformers."""
    data = json.loads(model_files.texts["config.json"])
    return transformers.AutoConfig.for_model(**data)


Place = tuple[str, str | int | tuple[int, str]]


def places(config: Any, reader: Reader) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Yield (parameter, part of it) and the shape of the part, for everything a loader fills."""
    width, kind = config.hidden_size, config.model_type
    heads, pairs = config.num_attention_heads, config.num_key_value_heads
    size = (reader.own_head_dim and getattr(config, "head_dim", None)) or width // heads
    yield ("model.embed_tokens.weight", ""), (config.vocab_size, width)
    yield ("lm_head.weight", ""), (config.vocab_size, width)  # some do not tie
    yield ("model.norm.weight", ""), (width,)
    bias = kind == "qwen2_moe" or getattr(config, "attention_bias", False)
    norm = kind == "qwen3_moe" or getattr(config, "use_qk_norm", False)
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield (f"{layer}.input_layernorm.weight", ""), (width,)
        yield (f"{layer}.post_attention_layernorm.weight", ""), (width,)
        for part, rows in (("q", heads * size), ("k", pairs * size), ("v", pairs * size)):
            yield (f"{layer}.self_attn.qkv_proj.weight", part), (rows, width)
            if bias:
                yield (f"{layer}.self_attn.qkv_proj.bias", part), (rows,)
        yield (f"{layer}.self_attn.o_proj.weight", ""), (width, heads * size)
        if norm:
            yield (f"{layer}.self_attn.q_norm.weight", ""), (size,)
            yield (f"{layer}.self_attn.k_norm.weight", ""), (size,)
        if is_sparse(config, i, reader):
            yield from experts(config, layer)
        else:
            yield from mlp(f"{layer}.mlp", width, config.intermediate_size)


def is_sparse(config: Any, index: int, reader: Reader) -> bool:
    """Tell whether a loader builds experts for a layer."""
    if config.model_type == "mixtral" or not reader.dense_layers:
        return True
    if config.model_type == "glm4_moe":
        return index >= config.first_k_dense_replace
    return index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0


def mlp(prefix: str, width: int, hidden: int) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Yield the places of a gated MLP."""
    yield (f"{prefix}.gate_up_proj.weight", 0), (hidden, width)
    yield (f"{prefix}.gate_up_proj.weight", 1), (hidden, width)
    yield (f"{prefix}.down_proj.weight", ""), (width, hidden)


def experts(config: Any, layer: str) -> Iterator[tuple[Place, tuple[int, ...]]]:
    """Yield the places of a layer's router, experts and shared expert."""
    kind, width = config.model_type, config.hidden_size
    mixtral = kind == "mixtral"
    moe = f"{layer}.block_sparse_moe" if mixtral else f"{layer}.mlp"
    hidden = config.intermediate_size if mixtral else config.moe_intermediate_size
    if mixtral:
        count = config.num_local_experts
    else:
        count = config.n_routed_experts if kind == "glm4_moe" else config.num_experts
    yield (f"{moe}.gate.weight", ""), (count, width)
    for expert in range(count):
        yield (f"{moe}.experts.w13_weight", (expert, "w1")), (hidden, width)
        yield (f"{moe}.experts.w13_weight", (expert, "w3")), (hidden, width)
        yield (f"{moe}.experts.w2_weight", (expert, "w2")), (width, hidden)
    if kind == "glm4_moe":
        yield (f"{moe}.gate.e_score_correction_bias", ""), (count,)
        yield from mlp(f"{moe}.shared_experts", width, hidden * config.n_shared_experts)
    if kind == "qwen2_moe":
        yield from mlp(f"{moe}.shared_expert", width, config.shared_expert_intermediate_size)
        yield (f"{moe}.shared_expert_gate.weight", ""), (1, width)


def place_of(name: str, kind: str, count: int) -> Place:
    """Map a name of the folder as `load_weights` of both do: by substrings, first come first."""
    stacked: list[tuple[str, str, str | int]] = [
        ("qkv_proj", "q_proj", "q"),
        ("qkv_proj", "k_proj", "k"),
        ("qkv_proj", "v_proj", "v"),
    ]
    leaves = {"w1": "w1", "w2": "w2", "w3": "w3"}
    if kind != "mixtral":
        stacked += [("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1)]
        leaves = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    for fused, part, which in stacked:
        if part in name and "mlp.experts" not in name:
            return name.replace(part, fused), which
    for expert in range(count):
        for shard, leaf in leaves.items():
            found = f"experts.{expert}.{leaf}."
            if found in name:
                param = "experts.w2_" if shard == "w2" else "experts.w13_"
                return name.replace(found, param), (expert, shard)
    return name, ""


def misfits(model_files: ModelFiles, reader: Reader) -> list[str]:
    """Say what a loader would not find, not know, or find in another shape."""
    config = config_of(model_files)
    name = {"glm4_moe": "n_routed_experts", "mixtral": "num_local_experts"}
    count = getattr(config, name.get(config.model_type, "num_experts"))
    expected = dict(places(config, reader))
    found: dict[Place, tuple[int, ...]] = {}
    problems = []
    for output in model_files.tensors:
        place = place_of(output.name, config.model_type, count)
        if place not in expected:
            problems.append(f"{output.name} is not known")
        elif place in found:
            problems.append(f"{output.name} fills {place} again")
        elif expected[place] != output.spec.shape:
            problems.append(f"{output.name} is {output.spec.shape}, not {expected[place]}")
        found[place] = output.spec.shape
    return problems + [f"{place} is not filled" for place in expected.keys() - found.keys()]


@pytest.mark.parametrize("name", CASES)
def test_every_name_has_a_place_and_every_place_is_filled(
    contents: dict[str, ModelFiles], name: str
) -> None:
    assert misfits(contents[name], VLLM) == []
    assert misfits(contents[name], SGLANG) == []


def test_what_one_reader_cannot_take(contents: dict[str, ModelFiles]) -> None:
    """The documented gaps: SGLang's Mixtral knows no head_dim, its Qwen2Moe no dense layers."""
    assert misfits(contents["mixtral"], NO_HEAD_DIM) == []
    assert "q_proj.weight is (64, 32)" in misfits(contents["mixtral, head_dim"], NO_HEAD_DIM)[0]
    assert any("SGLang" in note for note in contents["mixtral, head_dim"].notes)
    assert misfits(contents["qwen2"], ALL_SPARSE) == []
    assert misfits(contents["qwen2, dense layers"], ALL_SPARSE) != []


def test_the_check_itself_can_fail(contents: dict[str, ModelFiles]) -> None:
    model_files = contents["glm4"]
    renamed = dataclasses.replace(model_files.tensors[-1], name="model.odd.weight")
    broken = dataclasses.replace(model_files, tensors=(*model_files.tensors[:-1], renamed))
    problems = misfits(broken, VLLM)
    assert "model.odd.weight is not known" in problems
    assert any("is not filled" in problem for problem in problems)


@pytest.mark.parametrize("name", CASES)
def test_the_config_says_what_a_server_needs(contents: dict[str, ModelFiles], name: str) -> None:
    config = config_of(contents[name])
    assert config.hidden_act == "silu"  # both refuse all others
    assert len(config.architectures) == 1
    assert config.architectures[0].endswith("MoeForCausalLM") or name.startswith("mixtral")
    assert config.rope_parameters["rope_theta"] > 0
    assert config.rope_parameters["rope_type"] == "default"
    needed = ["rms_norm_eps", "max_position_embeddings", "num_experts_per_tok"]
    if config.model_type == "glm4_moe":
        needed += ["n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor", "head_dim"]
        assert config.num_nextn_predict_layers == 0  # no layer is skipped as a draft
        assert config.n_shared_experts == 1  # SGLang can fuse it
        assert config.rope_parameters["partial_rotary_factor"] == 1.0  # both assume 0.5 without it
    elif config.model_type != "mixtral":
        needed += ["num_experts", "norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"]
        assert not config.use_sliding_window
    if config.model_type == "qwen2_moe":
        assert config.hidden_size // config.num_attention_heads == 8
        assert config.qkv_bias  # vLLM builds biases whatever it says
        assert config.shared_expert_intermediate_size > 0
    assert all(getattr(config, key) is not None for key in needed)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_slices_are_even(contents: dict[str, ModelFiles], name: str, ranks: int) -> None:
    """Over tensor ranks; a dense model that divides is not made into one that does not."""
    config = config_of(contents[name])
    kinds = ("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size")
    for key in ("num_attention_heads", "num_key_value_heads", *kinds):
        assert getattr(config, key, 0) % ranks == 0


@pytest.mark.parametrize("name", CASES)
def test_vllms_transformers_backend_finds_the_experts(
    contents: dict[str, ModelFiles], name: str
) -> None:
    """It fuses a block with a child `experts` of stacked weights and a gate that is but a weight.

    At most one module is added to what the experts return.
    """
    config = config_of(contents[name])
    with torch.device("meta"):
        model: Any = getattr(transformers, config.architectures[0])(config)
    blocks = [m for m in model.modules() if "experts" in dict(m.named_children())]
    assert blocks
    for block in blocks:
        children = dict(block.named_children())
        stacked = {k: v.dim() for k, v in children["experts"].named_parameters()}
        assert stacked == {"gate_up_proj": 3, "down_proj": 3}
        assert children["gate"].state_dict().keys() <= {"weight", "e_score_correction_bias"}
        others = children.keys() - {"experts", "gate", "shared_expert_gate"}
        assert len(others) <= 1
