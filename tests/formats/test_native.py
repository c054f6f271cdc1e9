"""Native folders: transformers reads them alone, with equal logits; what does not fit says why."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from moeify import moeify
from moeify.errors import CheckpointError
from moeify.formats.custom import custom_files
from moeify.formats.native.architectures import TARGETS, misfits
from moeify.formats.native.export import NotNative, native_files
from moeify.formats.native.model_facts import DecoderLayer, Facts, facts_of
from moeify.formats.native.reader import NativeTensors
from moeify.nn.router import Router
from moeify.plan.specs import RouterSpec
from moeify.sites.record import require_conversion
from moeify.storage.tensor_source import LiveTensors
from moeify.storage.writer import write_model_files

IDS = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(5))
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 3e-4,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 777.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A dense model, what becomes of it, and as what it is written."""

    family: str
    architecture: str
    rules: list[dict[str, Any]]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    router: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    waste: bool = False


def every(count: Any, **fields: Any) -> list[dict[str, Any]]:
    """One rule for all layers."""
    return [{"select": "all", "experts": count, **fields}]


SIGMOID = {"score": "sigmoid"}
PART = [{"select": {"index": [1]}, "experts": 4, "top_k": 2}]
PYRAMID = [
    {"select": {"index": [1]}, "experts": 3},
    {"select": {"index": [2]}, "experts": 5},
]
CASES = {
    "llama, k=2": Case(
        "Llama", "Mixtral", every(4, top_k=2), {"head_dim": 16, "rope_parameters": LLAMA3}
    ),
    "mistral, k=1, tied, sliding": Case(
        "Mistral", "Mixtral", every(4), {"sliding_window": 4, "tie_word_embeddings": True}
    ),
    "llama, granular": Case(
        "Llama",
        "Mixtral",
        every(8, top_k=4, init={"experts": "granular", "granularity": 2}),
    ),
    "llama, bf16": Case("Llama", "Mixtral", every(4, top_k=2), dtype=torch.bfloat16),
    "qwen2, sigmoid residual": Case(
        "Qwen2",
        "Qwen2Moe",
        [
            {**PART[0], "residual": "sigmoid"},
            {"select": {"index": [2]}, "experts": 4, "top_k": 2},
        ],
        waste=True,
    ),
    "llama, one layer, tied": Case(
        "Llama", "Qwen2Moe", PART, {"tie_word_embeddings": True}, waste=True
    ),
    "qwen3, k=2": Case("Qwen3", "Qwen3Moe", PART, {"head_dim": 16}),
    "qwen3, k=1 by probability": Case(
        "Qwen3", "Qwen3Moe", every(4), {"head_dim": 8}, {"combine": "probability"}
    ),
    "llama, pyramid and residual": Case(
        "Llama",
        "Glm4Moe",
        [{**PYRAMID[0], "residual": "add"}, {**PYRAMID[1], "residual": "add"}],
        {"head_dim": 16, "rope_parameters": LLAMA3},
        waste=True,
    ),
    "qwen3, pyramid, sigmoid, bias, k=2": Case(
        "Qwen3",
        "Glm4Moe",
        [{**PYRAMID[0], "top_k": 2}, {**PYRAMID[1], "top_k": 2, "residual": "add"}],
        {"head_dim": 8},
        {"score": "sigmoid", "bias_update": 0.01},
        waste=True,
    ),
    "qwen2, residual, sigmoid by probability": Case(
        "Qwen2",
        "Glm4Moe",
        every(4, top_k=2, residual="add"),
        {"tie_word_embeddings": True},
        {"score": "sigmoid", "combine": "probability"},
        waste=True,
    ),
}


def perturb(model: torch.nn.Module, seed: int) -> None:
    """Move every parameter, and every selection bias, off where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("selection_bias"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) - 0.5)
            elif isinstance(tensor, torch.nn.Parameter):
                scale = 0.6 if name.endswith("router.weight") else 0.15
                tensor.add_(scale * torch.randn(tensor.shape, generator=generator))


def convert(case: Case) -> Any:
    """Build the dense model of a case, perturb it, convert it, and perturb the result."""
    config = getattr(transformers, f"{case.family}Config")(**(SMALL | case.config))
    torch.manual_seed(1)
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).eval()
    for parameter in model.parameters():  # not .to(), which would round the rotary frequencies
        parameter.data = parameter.data.to(case.dtype)
    perturb(model, 2)
    plan = {"layers": case.rules, "router": case.router}
    moeify(model, plan, example_inputs={"input_ids": IDS}, verify=False)
    perturb(model, 3)
    return model.eval()


READ = """
import json, sys
import torch, transformers
from pathlib import Path
sys.modules["moeify"] = None
try:
    import moeify
except ImportError:
    pass
else:
    raise SystemExit("moeify can be imported")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
root, found = Path(sys.argv[1]), {}
ids = torch.load(root / "ids.pt")
for folder in sorted(p for p in root.iterdir() if p.is_dir()):
    args = {"output_loading_info": True, "local_files_only": True}
    load = transformers.AutoModelForCausalLM.from_pretrained
    model, info = load(folder, **args)
    dtype = str(model.dtype)
    model = model.float().eval()
    with torch.no_grad():
        logits = model(ids).logits
        tokens = model.generate(ids, max_new_tokens=8, do_sample=False)
    torch.save((logits, tokens), root / f"{folder.name}.read.pt")
    found[folder.name] = {
        "class": type(model).__name__,
        "dtype": dtype,
        "info": {key: list(map(str, value)) for key, value in info.items() if value},
        "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    }
    model = load(folder, local_files_only=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.25)
    model.save_pretrained(folder / "trained")
print(json.dumps(found))
"""


@dataclasses.dataclass
class World:
    """Every case, written and read."""

    root: Path
    folders: dict[str, Path]
    models: dict[str, Any]
    notes: dict[str, tuple[str, ...]]
    read: dict[str, Any]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Write every case, and read all of them in one process that has no moeify."""
    root = tmp_path_factory.mktemp("native")
    folders, models, notes = {}, {}, {}
    for i, (name, case) in enumerate(CASES.items()):
        model = convert(case)
        model_files = native_files(model, LiveTensors(model), source={"folder": "dense"})
        folders[name], models[name], notes[name] = root / f"case-{i:02d}", model, model_files.notes
        write_model_files(model_files, folders[name], max_shard_size="64KB")
    torch.save(IDS, root / "ids.pt")
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [sys.executable, "-I", "-c", READ, str(root)],
        capture_output=True,
        text=True,
        env=clean | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return World(root, folders, models, notes, json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", CASES)
def test_transformers_alone_gives_the_same_logits(world: World, name: str) -> None:
    case, folder = CASES[name], world.folders[name]
    found, model = world.read[folder.name], world.models[name]
    assert found["class"] == f"{case.architecture}ForCausalLM"
    assert found["info"] == {}  # nothing missing, unexpected or mismatched
    assert found["dtype"] == str(case.dtype)
    assert found["tied"] == case.config.get("tie_word_embeddings", False)
    logits, tokens = torch.load(world.root / f"{folder.name}.read.pt")
    model = copy.deepcopy(model).float()
    with torch.no_grad():
        own = model(IDS).logits
        counts = [m.last_stats["counts"] for m in model.modules() if isinstance(m, Router)]
        assert own.std() > 0.1
        torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-5)
        assert torch.equal(tokens, model.generate(IDS, max_new_tokens=8, do_sample=False))
    assert all((count > 0).sum() >= 2 for count in counts)  # routing mattered
    assert any(note.startswith("padding") for note in world.notes[name]) == (
        case.waste or case.config.get("tie_word_embeddings", False)
    )


@pytest.mark.parametrize("name", CASES)
def test_names_are_those_that_the_class_saves(world: World, name: str) -> None:
    from safetensors import safe_open

    def shapes(folder: Path) -> dict[str, Any]:
        found = {}
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as shard:
                for key in shard.keys():  # noqa: SIM118  it is not a dict
                    found[key] = shard.get_slice(key).get_shape()
        return found

    written, saved = shapes(world.folders[name]), shapes(world.folders[name] / "trained")
    if CASES[name].config.get("tie_word_embeddings", False):
        assert written.pop("lm_head.weight") == written["model.embed_tokens.weight"]
    assert written == saved
    ours = json.loads((world.folders[name] / "config.json").read_text())
    theirs = json.loads((world.folders[name] / "trained" / "config.json").read_text())
    assert ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_read_back_under_moeifys_names(world: World, name: str, tmp_path: Path) -> None:
    live, tensor_source = LiveTensors(world.models[name]), NativeTensors(world.folders[name])
    assert list(tensor_source.specs) == list(live.specs)
    assert dict(tensor_source.specs) == dict(live.specs)
    assert dict(tensor_source.aliases) == dict(live.aliases)
    for key in live.specs:
        if not key.endswith("pending_counts"):
            assert torch.equal(tensor_source.read(key), live.read(key)), key
    experts = next(key for key in live.specs if key.endswith("gate_up_proj"))
    assert torch.equal(tensor_source.read(experts, 1, 3), live.read(experts, 1, 3))
    tensor_source.close()
    trained = tmp_path / "trained"
    shutil.copytree(world.folders[name] / "trained", trained)
    shutil.copy(world.folders[name] / "moeify.json", trained)
    after = NativeTensors(trained)
    for key in live.specs:
        if not key.endswith(("selection_bias", "pending_counts")):
            torch.testing.assert_close(after.read(key), live.read(key) + 0.25)
    after.close()


def test_a_folder_of_something_else_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not hold a native export|config\.json"):
        NativeTensors(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(world.folders["qwen3, k=2"], copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"architectures": ["Other"]}))
    with pytest.raises(CheckpointError, match=r"Other.*Qwen3MoeForCausalLM"):
        NativeTensors(copy)


def test_what_is_padding_is_counted(world: World) -> None:
    notes = "\n".join(world.notes["llama, pyramid and residual"])
    # layer 1 has 3 of 5 experts: 2 * 3 * 32 * 48 parameters, 4 bytes each
    assert "experts that are never chosen: 9,216 parameters, 0.0 MB" in notes
    assert "rows of routers: 64 parameters" in notes
    assert "not MixtralForCausalLM: all its layers are MoE, and 1 of 3 are dense" in notes
    assert "layers of 3 and 5 experts, where it has one number for all" in notes
    tied = "\n".join(world.notes["llama, one layer, tied"])
    assert "shared experts of zeros, which run for every token: 12,320 parameters" in tied
    assert "biases of zeros: 192 parameters" in tied
    assert "the tied embedding, again as the output's: 2,048 parameters" in tied


@pytest.fixture
def mixtral(world: World) -> Any:
    """A converted llama whose record may be changed."""
    return copy.deepcopy(world.models["llama, granular"])


def change(model: Any, **fields: Any) -> None:
    """Change the resolved plan of the first converted layer."""
    record = require_conversion(model).layers[0]
    router = fields.pop("router", {})
    spec = record.layer.router.model_copy(update=router)
    record.layer = dataclasses.replace(record.layer, router=spec, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"residual": "coefficient"}, "`residual: coefficient`, a learned softmax of two"),
        ({"expert": "linear"}, "is not an MLP of a decoder layer"),
        ({"router": {"eval_capacity_factor": 1.0}}, "`eval_capacity_factor` drops tokens"),
        ({"router": {"combine": "sum"}}, "`combine: sum` gives 4 experts weight 1"),
        ({"router": {"bias_update": 0.1}}, "lacks router.pending_counts"),
        ({"residual": "add"}, "lacks mlp.down_proj.weight"),
    ],
)
def test_a_layer_that_no_class_has(mixtral: Any, fields: dict[str, Any], message: str) -> None:
    change(mixtral, **fields)
    with pytest.raises(NotNative) as caught:
        native_files(mixtral, LiveTensors(mixtral))
    assert caught.value.reasons.keys() == {target.architecture for target in TARGETS}
    assert all(message in reason for reason in caught.value.reasons.values())


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "config.hidden_act is gelu"),
        ("mlp_bias", True, "config.mlp_bias"),
        ("logit_scale", 0.5, "config.logit_scale is 0.5, whose effect is not known"),
        ("sliding_window", 5, "config.sliding_window is 5"),  # a Llama has none, a Mixtral has
        ("chunk_size_feed_forward", 2, "config.chunk_size_feed_forward is 2"),
        ("tie_word_embeddings", True, "tie_word_embeddings does not agree with the weights"),
        ("rms_norm_eps", 1e-6, "not what the config says"),
        (
            "rope_parameters",
            {"rope_type": "default", "partial_rotary_factor": 0.5},
            "only a part",
        ),
    ],
)
def test_a_config_that_no_class_has(mixtral: Any, field: str, value: Any, message: str) -> None:
    setattr(mixtral.config, field, value)
    with pytest.raises(NotNative, match=message):
        native_files(mixtral, LiveTensors(mixtral))


def test_patched_models_and_other_classes(mixtral: Any) -> None:
    attention = mixtral.model.layers[0].self_attn
    attention.forward = attention.forward
    with pytest.raises(NotNative, match=r"layers.0.self_attn: its forward is patched"):
        native_files(mixtral, LiveTensors(mixtral))
    del attention.forward
    attention.extra = torch.nn.Identity()
    with pytest.raises(NotNative, match=r"layers.0.self_attn.extra is not a part of a Llama"):
        native_files(mixtral, LiveTensors(mixtral))
    mixtral.__class__ = type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {})
    with pytest.raises(NotNative, match=r"test_native.LlamaForCausalLM is none of"):
        native_files(mixtral, LiveTensors(mixtral))


@pytest.fixture(scope="module")
def facts(world: World) -> Facts:
    """The facts of a model that is a Mixtral."""
    model = world.models["llama, k=2"]
    found = facts_of(model, require_conversion(model), LiveTensors(model))
    assert isinstance(found, Facts)
    return found


PROBABILITY = {"combine": "probability"}
BIASED = {"bias_update": 0.001}


def changed(layer: DecoderLayer, **fields: Any) -> DecoderLayer:
    """Return a layer with other fields of its plan, or of its router."""
    router = {name: fields.pop(name) for name in list(fields) if name in RouterSpec.model_fields}
    fields["router"] = layer.plan.router.model_copy(update=router)
    return dataclasses.replace(layer, plan=dataclasses.replace(layer.plan, **fields))


def why(facts: Facts, name: str, every_layer: dict[str, Any] | None = None, **fields: Any) -> str:
    """Say why changed facts do not fit a class."""
    target = next(t for t in TARGETS if t.architecture == f"{name}ForCausalLM")
    layers = tuple(changed(layer, **(every_layer or {})) for layer in facts.layers)
    return "; ".join(misfits(target, dataclasses.replace(facts, layers=layers, **fields)))


def test_why_a_class_does_not_fit(facts: Facts) -> None:
    assert why(facts, "Mixtral") == ""
    assert "full width" in why(facts, "Olmoe")
    assert "of each head" in why(facts, "Qwen3Moe")
    assert "hidden_size / heads" in why(facts, "Qwen2Moe")
    assert "does not normalise" in why(facts, "Mixtral", head_norm=True)
    assert "vLLM would leave out" in why(facts, "Glm4Moe", output_bias=True)
    assert "have no biases" in why(facts, "Mixtral", qkv_bias=True)
    assert why(facts, "Mixtral", window=7) == ""
    assert "sliding windows" in why(facts, "Mixtral", window="mixed")
    assert "sliding windows" in why(facts, "Glm4Moe", window=7)
    assert "always sum to 1" in why(facts, "Mixtral", PROBABILITY)
    assert "no selection bias" in why(facts, "Mixtral", BIASED)
    assert "it has no residual" in why(facts, "Mixtral", {"residual": "add"})
    assert "`residual: sigmoid`" in why(facts, "Qwen2Moe", {"residual": "add"})
    mixed = (changed(facts.layers[0], top_k=1), *facts.layers[1:])
    assert "one top_k for all layers" in why(dataclasses.replace(facts, layers=mixed), "Mixtral")


def test_softmax_and_sigmoid_routers(facts: Facts) -> None:
    """Two softmax weights are not two sigmoid weights; of a single one only the order counts."""
    assert "by sigmoid scores" in why(facts, "Glm4Moe")
    assert "by softmax scores" in why(facts, "Mixtral", {"score": "sigmoid"})
    one = {"top_k": 1}
    assert why(facts, "Glm4Moe", one) == ""
    assert why(facts, "Mixtral", one | {"score": "sigmoid"}) == ""
    assert "by sigmoid scores" in why(facts, "Glm4Moe", one | BIASED)
    assert "by sigmoid scores" in why(facts, "Glm4Moe", one | PROBABILITY)
    assert "by softmax scores" in why(facts, "Qwen3Moe", one | {"score": "sigmoid"} | PROBABILITY)


def test_an_unknown_class_is_refused(mixtral: Any) -> None:
    with pytest.raises(ValueError, match="'Mixtral' is unknown; use one of MixtralForCausalLM"):
        native_files(mixtral, LiveTensors(mixtral), architecture="Mixtral")
    with pytest.raises(NotNative) as caught:
        native_files(mixtral, LiveTensors(mixtral), architecture="OlmoeForCausalLM")
    assert list(caught.value.reasons) == ["OlmoeForCausalLM"]


def test_what_was_loaded_from_a_custom_export(mixtral: Any, tmp_path: Path) -> None:
    write_model_files(custom_files(mixtral, LiveTensors(mixtral)), tmp_path / "custom")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "custom", trust_remote_code=True
    )
    write_model_files(native_files(loaded, LiveTensors(loaded)), tmp_path / "native")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    assert type(again).__name__ == "MixtralForCausalLM"
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, mixtral(IDS).logits, atol=1e-5, rtol=1e-5)
