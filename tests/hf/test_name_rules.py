"""What a class of transformers says of MLPs by name holds for the blocks in their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import moeify as mf
from moeify.errors import UnsupportedModuleError
from moeify.formats.streaming_reverse import dense_files
from moeify.hf.local_folder import build_on_meta
from moeify.hf.name_rules import fits
from moeify.storage.writer import write_model_files
from tests.zoo_models import ZOO, ids

SEQ2SEQ = transformers.AutoModelForSeq2SeqLM
PLAN = {
    "layers": [{"select": "all", "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None},
}
RESIDUAL = {"layers": [{"select": "all", "experts": 4, "residual": "coefficient"}]}
DOWN = ("experts.down_proj", "wo.weight")


def t5() -> Any:
    """A T5 whose hidden values leave float16, which is why `wo` stays in float32."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4
    )
    config.decoder_start_token_id = 0
    model = transformers.T5ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter.mul_(2e5)
    return model


def logits(model: Any) -> Tensor:
    return model(input_ids=ids(), decoder_input_ids=ids()).logits.float()


def dtypes(model: Any) -> set[tuple[bool, torch.dtype]]:
    """Whether each parameter is of a last projection, with its dtype."""
    return {(name.endswith(DOWN), p.dtype) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def model() -> Any:
    return mf.moeify(t5(), RESIDUAL, verify=False)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("t5") / "out"
    model.save_pretrained(place, export="custom")
    return place


KEPT = {(True, torch.float32), (False, torch.float16)}


def test_t5_in_float16_is_as_exact_as_the_dense_one(folder, tmp_path):
    dense = t5()
    want = logits(dense)
    dense.save_pretrained(tmp_path / "dense")
    half = SEQ2SEQ.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    error = (logits(half) - want).abs().max()
    moe = SEQ2SEQ.from_pretrained(folder, dtype=torch.float16, trust_remote_code=True)
    assert dtypes(moe) == KEPT
    assert (logits(moe) - want).abs().max() <= 2 * error < 0.02
    for loaded in (half, moe):  # in the same precision, so are their gradients
        loaded(input_ids=ids(), decoder_input_ids=ids(), labels=ids()).loss.backward()
    torch.testing.assert_close(
        moe.shared.weight.grad, half.shared.weight.grad, rtol=0.05, atol=1e-4
    )
    down = moe.encoder.block[0].layer[1].DenseReluDense.experts.down_proj.grad
    assert down.isfinite().all()
    assert down.any()
    bfloat = SEQ2SEQ.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=True)
    assert {p.dtype for p in bfloat.parameters()} == {torch.bfloat16}  # as the dense class does


def test_from_there_on_every_way_keeps_it(model, folder, tmp_path):
    want = logits(SEQ2SEQ.from_pretrained(folder, dtype=torch.float16, trust_remote_code=True))
    assert want.isfinite().all()
    mf.save(model, tmp_path / "own")
    own = mf.load(tmp_path / "own", dtype=torch.float16).eval()
    assert dtypes(own) == KEPT
    assert torch.equal(logits(own), want)
    own.save_pretrained(tmp_path / "again", export="custom")
    again = SEQ2SEQ.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert dtypes(again) == KEPT
    assert torch.equal(logits(again), want)
    mf.save(own, tmp_path / "own again")
    assert torch.equal(logits(mf.load(tmp_path / "own again").eval()), want)
    write_model_files(dense_files(tmp_path / "again"), tmp_path / "dense")
    dense = SEQ2SEQ.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(dense), want, rtol=0, atol=5e-3)
    back = mf.demoeify(own)
    assert dtypes(back) == KEPT
    assert set(back._keep_in_fp32_modules) == {"wo"}


def test_a_dense_model_of_two_dtypes_says_what_to_do(tmp_path):
    t5().save_pretrained(tmp_path / "dense")
    half = SEQ2SEQ.from_pretrained(tmp_path / "dense", dtype=torch.float16)
    with pytest.raises(UnsupportedModuleError, match=r"float16, float32\): load the model in one"):
        mf.moeify(half, PLAN)


def test_classes_that_must_not_be_split():
    dense = ZOO["llama"].build()
    dense._no_split_modules = {"LlamaMLP"}
    model = mf.moeify(dense, PLAN, verify=False)
    assert model._no_split_modules == {"LlamaMLP", type(model.model.layers[0].mlp).__name__}
    assert mf.demoeify(model)._no_split_modules == {"LlamaMLP"}
    layers = ZOO["llama"].build()
    layers._no_split_modules = {"LlamaDecoderLayer"}
    assert mf.moeify(layers, PLAN, verify=False)._no_split_modules == {"LlamaDecoderLayer"}


def test_no_tensor_of_a_block_may_be_missing():
    dense = ZOO["llama"].build()
    dense._keys_to_ignore_on_load_missing = {"layers", r"position_ids$"}
    model = mf.moeify(dense, PLAN, verify=False)
    assert model._keys_to_ignore_on_load_missing == {r"position_ids$"}
    assert "layers" in mf.demoeify(model)._keys_to_ignore_on_load_missing


def not_decayed(model: Any, out: Path) -> set[str]:
    """What of the first MLP a Trainer does not decay."""
    arguments = transformers.TrainingArguments(output_dir=str(out), report_to=[], use_cpu=True)
    decayed = transformers.Trainer(model=model, args=arguments).get_decay_parameter_names(model)
    names = {name for name, _ in model.named_parameters()} - set(decayed)
    return {name for name in names if "layers.0.mlp" in name}


@pytest.mark.parametrize("plan", [PLAN, RESIDUAL], ids=["plain", "residual"])
def test_a_norm_inside_an_mlp_is_not_decayed(plan, tmp_path):
    config = transformers.BitNetConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        eos_token_id=1,
    )
    model = transformers.BitNetForCausalLM(config)
    assert not_decayed(model, tmp_path) == {"model.layers.0.mlp.ffn_sub_norm.weight"}
    kept = {"experts.inner_0_ffn_sub_norm"}
    if plan is RESIDUAL:
        kept |= {"mlp.inner_0_ffn_sub_norm", "residual_mix.coefficient.bias"}
    mf.moeify(model, plan, verify=False)
    assert not_decayed(model, tmp_path) == {f"model.layers.0.mlp.{name}" for name in kept}


def test_names_fit_as_transformers_finds_them(tmp_path, monkeypatch):
    name = "model.layers.3.mlp.down_proj.weight"
    assert all(fits([pattern], name) for pattern in ("mlp.down_proj", "layers.*.mlp", "down"))
    assert not fits(["gate_proj", "mlp.gate"], name)
    cls = transformers.LlamaForCausalLM
    monkeypatch.setattr(cls, "_keep_in_fp32_modules_strict", ["mlp.down_proj"])
    ZOO["llama"].build().save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path, dtype=torch.bfloat16)
    built = build_on_meta(tmp_path, torch.bfloat16)
    assert {n: p.dtype for n, p in built.named_parameters()} == {
        n: p.dtype for n, p in loaded.named_parameters()
    }
