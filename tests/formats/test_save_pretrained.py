"""`save_pretrained` and `from_pretrained` of converted models, and the folders in between."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.dynamic_module_utils import get_imports

import moeify as mf
from moeify.errors import CaptureError, CheckpointError
from moeify.formats.choose import choose_format
from moeify.formats.custom import custom_files
from moeify.formats.manifest import read_format_manifest
from moeify.storage.atomic_folder import Folder
from moeify.storage.tensor_source import LiveTensors
from tests.zoo_models import DECODER, ZOO, ids

PLAN = {
    "layers": [
        {"select": "all", "experts": 4, "residual": "coefficient"},
        {"select": {"last": 1}, "experts": 6, "top_k": 2, "residual": "none"},
    ]
}
CAUSAL = transformers.AutoModelForCausalLM


def converted(name: str = "llama", plan: dict[str, Any] | None = None, seed: int = 0) -> Any:
    """A converted model whose experts differ."""
    torch.manual_seed(seed)
    model = mf.moeify(ZOO[name].build(), plan or PLAN, verify=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def loaded(folder: Path, **options: Any) -> Any:
    return CAUSAL.from_pretrained(folder, trust_remote_code=True, **options)


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(scope="module")
def model() -> Any:
    return converted()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export") / "out"
    model.save_pretrained(place, export="custom")
    return place


def test_what_is_in_the_folder(model, folder):
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "configuration_moeify.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_moeify.py",
        "moeify.json",
    }
    config = config_of(folder)
    assert config["model_type"] == "moeify_llama"
    assert config["architectures"] == ["MoeifyLlamaForCausalLM"]
    assert config["dtype"] == "float32"
    with Folder(folder) as opened:
        manifest = read_format_manifest(opened)
    assert manifest is not None
    assert manifest.kind == "custom"
    assert manifest.details["class"].endswith(".LlamaForCausalLM")
    dense = transformers.LlamaConfig.from_dict(dict(manifest.details["config"]))
    assert dense.to_dict() == model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    for name in ("configuration_moeify.py", "modeling_moeify.py"):
        assert get_imports(folder / name) == ["moeify", "transformers"]  # checked before it runs


def test_the_loaded_model_is_a_converted_one(model, folder, tmp_path):
    again, info = loaded(folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(again), logits(model))
    assert list(again.state_dict()) == list(model.state_dict())
    assert again.config.model_type == "llama"
    assert again._get_name() == "LlamaForCausalLM"
    again.train()
    out = again(input_ids=ids(), labels=ids())
    assert set(mf.router_stats(again)) == {"model.layers.0.mlp", "model.layers.1.mlp"}
    assert mf.aux_loss(again) > 0
    out.loss.backward()
    assert all(p.grad is not None for p in again.parameters())
    again.eval()
    shutil.copytree(folder, tmp_path / "first")
    moved = loaded(tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    moved.save_pretrained(tmp_path / "second", export="custom")
    assert config_of(tmp_path / "second") == config_of(folder)
    assert torch.equal(logits(loaded(tmp_path / "second")), logits(model))
    mf.save(again, tmp_path / "own")
    own = mf.load(tmp_path / "own")
    assert type(own) is transformers.LlamaForCausalLM
    assert torch.equal(logits(own.eval()), logits(model))
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    with torch.no_grad():
        torch.compile(again, fullgraph=True, backend=counter)(input_ids=ids())
    assert counter.frame_count == 1


def test_back_to_dense(tmp_path):
    plan = {"layers": [{"select": "all", "experts": 4}]}
    torch.manual_seed(0)
    dense = ZOO["llama"].build().eval()
    want = logits(dense)
    mf.moeify(dense, plan, verify=False).save_pretrained(tmp_path / "moe", export="custom")
    again = mf.demoeify(loaded(tmp_path / "moe"))
    assert type(again) is transformers.LlamaForCausalLM
    assert type(again.config) is type(again.model.config) is transformers.LlamaConfig
    again.save_pretrained(tmp_path / "dense")
    config = config_of(tmp_path / "dense")
    assert config["model_type"] == "llama"
    assert not {"moeify", "auto_map", "transformers_weights"} & config.keys()
    assert torch.equal(logits(CAUSAL.from_pretrained(tmp_path / "dense")), want)


def test_nothing_loads_it_as_a_dense_model(folder, tmp_path):
    for auto in (CAUSAL, transformers.AutoModel, transformers.AutoConfig):
        with pytest.raises(ValueError, match="trust_remote_code"):
            auto.from_pretrained(folder, trust_remote_code=False)
    for dense in (transformers.LlamaForCausalLM, transformers.LlamaModel):
        with pytest.raises(OSError, match="trust_remote_code"):
            dense.from_pretrained(folder)
    torch.manual_seed(0)
    clip = mf.moeify(ZOO["clip"].build(), {"layers": [{"select": "all", "experts": 2}]})
    clip.save_pretrained(tmp_path / "clip")
    for part in (transformers.CLIPTextModel, transformers.CLIPVisionModel):
        with pytest.raises(OSError, match="trust_remote_code"):
            part.from_pretrained(tmp_path / "clip")


def test_two_exports_in_one_process(model, folder, tmp_path):
    """The same class and folder name with another plan, and another class of the same type."""
    other = converted(plan={"layers": [{"select": {"first": 1}, "experts": 3}]})
    other.save_pretrained(tmp_path / "out", export="custom")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**DECODER, num_labels=3)
    third = mf.moeify(transformers.LlamaForSequenceClassification(config), PLAN, verify=False)
    third.eval().save_pretrained(tmp_path / "x" / "out", export="custom")
    assert torch.equal(logits(loaded(folder)), logits(model))
    assert torch.equal(logits(loaded(tmp_path / "out")), logits(other))
    auto = transformers.AutoModelForSequenceClassification
    again = auto.from_pretrained(tmp_path / "x" / "out", trust_remote_code=True)
    assert torch.equal(logits(again), logits(third))
    assert torch.equal(logits(loaded(folder)), logits(model))


def test_ways_to_load(model, folder):
    for options in (
        {"device_map": "cpu"},
        {"device_map": "auto"},
        {"attn_implementation": "eager"},
    ):
        torch.testing.assert_close(logits(loaded(folder, **options)), logits(model))
    half = loaded(folder, dtype=torch.bfloat16, attn_implementation="eager")
    assert half.config._attn_implementation == "eager"
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.config.dtype == torch.bfloat16
    built = CAUSAL.from_config(half.config, trust_remote_code=True)
    assert set(dict(built.named_parameters())) == set(dict(model.named_parameters()))
    assert not any(p.is_meta for p in built.parameters())


def test_dtype_shards_and_tied_weights(tmp_path):
    gpt = converted("gpt2").to(torch.bfloat16)
    gpt.save_pretrained(tmp_path / "m", export="custom", max_shard_size=20_000)
    names = {p.name for p in (tmp_path / "m").glob("*.safetensors*")}
    assert "model.safetensors.index.json" in names
    assert len(names) > 3
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]  # as transformers leaves it out
    again, info = loaded(tmp_path / "m", output_loading_info=True)
    assert not any(info.values())
    assert again.lm_head.weight is again.transformer.wte.weight
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(again), logits(gpt))
    gpt.lm_head.weight = nn.Parameter(gpt.lm_head.weight.detach() * 2)  # not tied any more
    gpt.save_pretrained(tmp_path / "m", export="custom")
    assert {p.name for p in (tmp_path / "m").glob("*.safetensors*")} == {"model.safetensors"}
    assert torch.equal(logits(loaded(tmp_path / "m")), logits(gpt))


def test_a_tie_of_the_users_own_is_written_in_full(tmp_path):
    tied = converted()
    tied.model.layers[1].input_layernorm.weight = tied.model.layers[0].input_layernorm.weight
    tied.save_pretrained(tmp_path / "m", export="custom")
    written = load_file(tmp_path / "m" / "model.safetensors")
    assert "model.layers.1.input_layernorm.weight" in written
    assert torch.equal(logits(loaded(tmp_path / "m")), logits(tied))


def test_router_buffers_come_back(tmp_path):
    plan = {"layers": [{"select": "all", "experts": 4, "router": {"bias_update": 0.1}}]}
    model = converted(plan=plan)
    model.train()
    model(input_ids=ids())
    model.model.layers[0].mlp.router.selection_bias[1] = 7
    model.eval().save_pretrained(tmp_path / "m", export="custom")
    again = loaded(tmp_path / "m")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert again.model.layers[0].mlp.router.selection_bias.dtype == torch.float32


def test_models_that_read_values_while_captured(folder, model, monkeypatch):
    from moeify.convert import convert_model

    real, calls = convert_model.convert, []

    def convert(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        calls.append(any(p.is_meta for p in model.parameters()))
        if calls[-1]:
            raise CaptureError("reads a value")
        return real(model, *args, **kwargs)

    monkeypatch.setattr(convert_model, "convert", convert)
    assert torch.equal(logits(loaded(folder)), logits(model))
    assert calls == [True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(version=1), "version"),
        (lambda m: m.update(version=2), "version"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m["plan"].update(layers="x"), "layers"),
        (lambda m: m["plan"]["layers"][0].update(experts=5), "plan_sha256"),
        (lambda m: m["layers"][0]["plan"].update(experts=5), "experts was 5 and is now 4"),
        (lambda m: m["layers"].pop(), "layers: were"),
        (lambda m: m["layers"][0].update(graph="0" * 64), "computes something else"),
        (lambda m: m.update(inputs={"tensor": {"shape": [1 << 40], "dtype": "float32"}}), "inputs"),
    ],
)
def test_a_changed_recipe_is_refused(folder, change, message):
    from moeify.formats.remote_code import convert_for_loading

    config = transformers.LlamaConfig(**DECODER)
    config.moeify = config_of(folder)["moeify"]
    change(config.moeify)
    with torch.device("meta"):
        dense = transformers.LlamaForCausalLM(config)
    with pytest.raises(CheckpointError, match=message):
        convert_for_loading(dense)


def test_the_config_survives_a_round_trip(folder, tmp_path):
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True)
    again = type(config).from_dict(config.to_dict())
    assert again.moeify == config.moeify == config_of(folder)["moeify"]
    assert copy.deepcopy(config).to_dict() == config.to_dict()
    assert config.to_dict()["model_type"] == "llama"  # where PEFT looks for its default targets
    config.save_pretrained(tmp_path)
    saved = config_of(tmp_path)
    assert saved["model_type"] == "moeify_llama"  # not what the dense class would load
    assert saved["transformers_weights"] == config_of(folder)["transformers_weights"]


def test_names_that_are_not_of_transformers_get_no_code(model):
    class Mine(transformers.LlamaForCausalLM):
        pass

    hostile = type("Llama\n\nimport os", (transformers.LlamaForCausalLM,), {})
    lying = type("LlamaForCausalLM", (transformers.LlamaForCausalLM,), {})
    lying.__module__ = "transformers.models.llama.modeling_llama"
    for cls in (Mine, hostile, lying):
        other = copy.deepcopy(model)
        other.__class__ = cls
        with pytest.raises(CheckpointError, match=r"moeify\.save"):
            custom_files(other, LiveTensors(other))
        assert choose_format(other, LiveTensors(other)).kind == "moeify"
    other = copy.deepcopy(model)
    other.config.__class__ = type("Evil", (transformers.LlamaConfig,), {})
    with pytest.raises(CheckpointError, match="config's class"):
        custom_files(other, LiveTensors(other))


def test_copies_save_themselves(model, tmp_path):
    copied = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    for number, other in enumerate((copied, pickled)):
        with torch.no_grad():
            other.lm_head.weight.add_(1)
        other.save_pretrained(tmp_path / str(number), export="custom")
        written = load_file(tmp_path / str(number) / "model.safetensors")
        assert torch.equal(written["lm_head.weight"], model.lm_head.weight + 1)


def test_options(model, tmp_path):
    out = tmp_path / "a" / "b"
    model.save_pretrained(out, is_main_process=False)
    assert not out.exists()
    for bad, match in (
        ({"variant": "fp16"}, "variant"),
        ({"safe_serialization": False}, "safetensors"),
        ({"distributed_checkpoint": True}, "save_sharded"),
        ({"export": "best"}, "export"),
        ({"nonsense": 1}, "nonsense"),
    ):
        with pytest.raises((mf.MoeifyError, TypeError, ValueError), match=match):
            model.save_pretrained(out, **bad)
    assert not out.exists()
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.save_pretrained(out, True, state, max_shard_size="1GB", safe_serialization=True)
    written = load_file(out / "model.safetensors")
    assert all(torch.equal(written[name], state[name]) for name in written)
    with pytest.raises(CheckpointError, match="lacks"):
        model.save_pretrained(
            tmp_path / "c", state_dict={"lm_head.weight": state["lm_head.weight"]}
        )
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(mf.MoeifyError, match="on meta"):
        copy.deepcopy(model).to("meta").save_pretrained(tmp_path / "c")
    compiled = torch.compile(copy.deepcopy(model))
    compiled.save_pretrained(tmp_path / "compiled", export="custom")
    assert torch.equal(logits(loaded(tmp_path / "compiled")), logits(model))


def test_native_unless_a_trainer_resumes_from_it(tmp_path):
    router = {"combine": "normalized"}
    model = converted(plan={"layers": [{"select": "all", "experts": 4, "router": router}]})
    model.save_pretrained(tmp_path / "final")
    assert config_of(tmp_path / "final")["architectures"] == ["MixtralForCausalLM"]
    torch.testing.assert_close(logits(CAUSAL.from_pretrained(tmp_path / "final")), logits(model))
    model.save_pretrained(tmp_path / "checkpoint-3")
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    for name in ("checkpoint-3", "given"):
        assert config_of(tmp_path / name)["model_type"] == "moeify_llama"
        written = load_file(tmp_path / name / "model.safetensors")
        assert not model.load_state_dict(written, strict=False).missing_keys


def test_into_a_folder_with_other_files(model, tmp_path, monkeypatch):
    """A trainer's folder: a crash in between leaves what does not load, never a mix."""
    out = tmp_path / "run"
    ZOO["llama"].build().save_pretrained(out)
    (out / "runs").mkdir()
    (out / "optimizer.pt").write_bytes(b"theirs")
    real, left = Path.replace, 3

    def failing(self: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError("the machine stops")
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", failing)
        with pytest.raises(CheckpointError, match="the machine stops"):
            model.save_pretrained(out, export="custom")
    assert not (out / "config.json").exists()
    with pytest.raises(ValueError, match=r"config\.json"):
        loaded(out)
    model.save_pretrained(out, export="custom")
    assert torch.equal(logits(loaded(out)), logits(model))
    assert (out / "optimizer.pt").read_bytes() == b"theirs"
    other = converted(seed=1)
    other.save_pretrained(out, export="custom", max_shard_size=20_000)  # no stale model.safetensors
    assert torch.equal(logits(loaded(out)), logits(other))
    assert not list(out.glob(".moeify*"))
    with monkeypatch.context() as patch:  # before anything is taken away
        patch.setattr("moeify.storage.writer.write_shard", lambda *_: failing(out, out))
        left = 1
        with pytest.raises(CheckpointError, match="the machine stops"):
            model.save_pretrained(out, export="custom")
    assert torch.equal(logits(loaded(out)), logits(other))


def test_push_to_hub(model, tmp_path, monkeypatch):
    import huggingface_hub
    from transformers.utils import hub

    seen: dict[str, Any] = {}

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> Any:
            seen["repo"] = repo_id
            return type("Url", (), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, **options: Any) -> None:
            seen.update(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    out = tmp_path / "m"
    out.mkdir()
    (out / "secret.txt").write_text("not uploaded")
    model.save_pretrained(out, push_to_hub=True, private=True, export="custom")
    assert (seen["repo"], seen["repo_id"]) == ("m", "me/m")
    assert {"config.json", "moeify.json", "modeling_moeify.py"} < set(seen["allow_patterns"])
    assert "secret.txt" not in seen["allow_patterns"]

    def upload(self: Any, folder: str, repo_id: str, **options: Any) -> None:
        seen["names"] = {p.name for p in Path(folder).iterdir()}
        seen["same"] = torch.equal(logits(loaded(Path(folder))), logits(model))

    monkeypatch.setattr(hub, "hf_api", Api)
    card = type("Card", (), {"save": lambda self, path: Path(path).write_text("card")})
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **options: card())
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.push_to_hub("repo")
    assert {"config.json", "model.safetensors", "moeify.json", "README.md"} <= seen["names"]
    assert seen["same"]


def test_weights_by_other_names_are_refused(model):
    other = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="of a dense model"):
        other.load_state_dict(ZOO["llama"].build().state_dict(), strict=False)
    native = {"model.layers.0.mlp.experts.0.gate_proj.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match="native export"):
        other.load_state_dict(native, strict=False)
    state = {"lm_head.weight": torch.zeros_like(other.lm_head.weight)}
    other.load_state_dict(state, strict=False)
    mf.demoeify(other)
    assert not other._load_state_dict_pre_hooks
    other.load_state_dict(ZOO["llama"].build().state_dict())


def data() -> list[dict[str, Tensor]]:
    rows = torch.randint(3, 98, (16, 12), generator=torch.Generator().manual_seed(2))
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model: Any, out: Path, resume: str | None = None, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(out),
        max_steps=4,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=1,
        **options,
    )
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data(), eval_dataset=data()[:4]
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_trainer_resumes(tmp_path):
    start = converted("gpt2")
    best = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "eval_loss",
    }
    whole = train(copy.deepcopy(start), tmp_path / "a", **best)
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 4
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert config_of(checkpoint)["model_type"] == "moeify_gpt2"
    again = train(copy.deepcopy(start), tmp_path / "b", str(checkpoint))
    resumed = [entry["loss"] for entry in again.state.log_history if "loss" in entry]
    assert resumed == losses
    assert whole.state.best_model_checkpoint is not None
    ended = loaded(Path(whole.state.best_model_checkpoint))
    torch.testing.assert_close(logits(ended), logits(whole.model.eval()))
    again.save_model(str(tmp_path / "b"))  # beside its checkpoints
    torch.testing.assert_close(logits(loaded(tmp_path / "b")), logits(again.model.eval()))
    assert (tmp_path / "b" / "checkpoint-4" / "optimizer.pt").exists()


def test_notes_say_why_a_model_is_not_native(model):
    model_files = choose_format(model, LiveTensors(model))
    assert model_files.kind == "custom"
    assert any(note.startswith("not native: ") for note in model_files.notes)
    with pytest.raises(mf.MoeifyError):
        choose_format(model, LiveTensors(model), "native")
    assert choose_format(model, LiveTensors(model), "moeify").kind == "moeify"
