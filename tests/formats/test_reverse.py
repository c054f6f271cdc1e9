"""Back to dense from a folder: the same bits as before the conversion, and as `demoeify` gives."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moeify as mf
from moeify.errors import CheckpointError
from moeify.formats.custom import custom_files
from moeify.formats.native.export import native_files
from moeify.formats.reader import FolderTensors
from moeify.formats.streaming_reverse import dense_files
from moeify.hf.dense_class import dense_class
from moeify.storage.strict_json import canonical_digest
from moeify.storage.tensor_source import LiveTensors
from moeify.storage.writer import write_model_files

ALL = {"layers": [{"select": "all", "experts": 3}]}
HALF = {"layers": [{"select": {"every": 2, "start": 1}, "experts": 2, "residual": "add"}]}
COEFFICIENT = {"layers": [{"select": "all", "experts": 2, "residual": "coefficient"}]}
SIGMOID = {"layers": [{"select": "all", "experts": 4, "top_k": 2, "residual": "sigmoid"}]}
GRANULAR = {
    "layers": [{"select": "all", "experts": 4, "top_k": 2}],
    "init": {"experts": "granular", "granularity": 2},
}
NOISE = {"layers": [{"select": {"last": 1}, "experts": 3}], "init": {"experts": "noise"}}
LINEAR = {
    "layers": [{"select": {"name": "*.down_proj"}, "experts": 2, "expert": "linear"}],
}
EXACT: dict[str, tuple[str, Any]] = {
    "llama-granular": ("llama", GRANULAR),
    "llama-tied-bfloat16": ("llama-tied", HALF),
    "gpt2": ("gpt2", COEFFICIENT),
    "llama-linear": ("llama", LINEAR),
    "bert": ("bert", SIGMOID),
    "t5": ("t5", ALL),
    "albert": ("albert", COEFFICIENT),
    "opt": ("opt", HALF),
}
CUSTOM = {"llama-linear", "t5", "albert", "opt"}
"""Of these, those that come back from an export with custom code as well."""


def family(name: str) -> Any:
    import transformers as hf

    four = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "vocab_size": 99}
    wide = {"intermediate_size": 32, **four}
    if name == "gpt2":
        small = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 99}
        config = hf.GPT2Config(n_layer=2, n_embd=16, n_head=4, n_positions=32, **small)
        return hf.GPT2LMHeadModel(config)
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **wide))
    if name == "llama-tied":
        config = hf.LlamaConfig(tie_word_embeddings=True, **wide)
        return hf.LlamaForCausalLM(config).to(torch.bfloat16)
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**wide))
    if name == "t5":
        config = hf.T5Config(
            d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=99,
            decoder_start_token_id=0,
        )  # fmt: skip
        return hf.T5ForConditionalGeneration(config)
    if name == "albert":
        return hf.AlbertForMaskedLM(hf.AlbertConfig(embedding_size=8, **wide))
    config = hf.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32, **four)
    return hf.OPTForCausalLM(config)


def reread(model: Any, folder: Path) -> Any:
    again, info = type(model).from_pretrained(folder, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return again


def same(one: nn.Module, other: nn.Module) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert list(a) == list(b)
    assert [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])] == []


def assert_dense(folder: Path, target: Path, dense: Any, caplog: Any) -> None:
    """The folder reversed is `dense`, of its class, to the bit."""
    model_files = dense_files(folder)
    write_model_files(model_files, target)
    assert model_files.kind == "dense"
    same(reread(dense, target), dense)
    assert json.loads((target / "config.json").read_bytes())["architectures"] == [
        type(dense).__name__
    ]
    assert [r.message for r in caplog.records if r.name == "moeify"] == []


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.thin(2)
def test_exact(name: str, tmp_path: Path, caplog: Any) -> None:
    kind, plan = EXACT[name]
    dense = family(kind).eval()
    dense.save_pretrained(tmp_path / "dense")
    model = mf.moeify(dense, plan)
    mf.save(model, tmp_path / "saved", max_shard_size=20_000)
    assert_dense(tmp_path / "saved", tmp_path / "again", reread_dense(model, tmp_path), caplog)
    manifest = json.loads((tmp_path / "again" / "moeify.json").read_bytes())
    assert manifest["kind"] == "dense"
    assert manifest["source"]["folder"] == "saved"
    if name in CUSTOM:
        write_model_files(custom_files(model, LiveTensors(model)), tmp_path / "custom")
        out = tmp_path / "from_custom"
        assert_dense(tmp_path / "custom", out, reread_dense(model, tmp_path), caplog)


def reread_dense(model: Any, folder: Path, name: str = "dense") -> Any:
    return dense_class(model).from_pretrained(folder / name)  # type: ignore[attr-defined]


def test_native(tmp_path: Path, caplog: Any) -> None:
    dense = family("llama").eval()
    dense.save_pretrained(tmp_path / "dense")
    plan = {"layers": [{"select": "all", "experts": 2, "top_k": 2}]}
    model = mf.moeify(dense, plan)
    write_model_files(native_files(model, LiveTensors(model)), tmp_path / "native")
    assert_dense(tmp_path / "native", tmp_path / "out", reread_dense(model, tmp_path), caplog)


def test_trained(tmp_path: Path, caplog: Any) -> None:
    """Experts that differ give what `demoeify` gives, and are named."""
    model = mf.moeify(family("bert").eval(), NOISE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.01 * torch.randn_like(parameter)
    mf.save(model, tmp_path / "saved")
    model_files = dense_files(tmp_path / "saved")
    assert ["noise" in note for note in model_files.notes] == [True]
    with caplog.at_level(logging.WARNING, "moeify"):
        write_model_files(model_files, tmp_path / "out")
    assert "averaged" in caplog.text
    dense = mf.demoeify(model)
    same(reread(dense, tmp_path / "out"), dense)


def test_split(tmp_path: Path, caplog: Any) -> None:
    """Dealt neurons come back in another order, which computes the same."""
    dense = family("bert").eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # biases too
    ids = torch.arange(12).view(2, 6)
    before = dense(input_ids=ids).logits
    plan = {
        "layers": [{"select": "all", "experts": 4, "top_k": 2}],
        "init": {"experts": "split", "clusters": "slices"},
    }
    model = mf.moeify(dense, plan)
    mf.save(model, tmp_path / "saved")
    model_files = dense_files(tmp_path / "saved")
    assert model_files.notes == ()
    write_model_files(model_files, tmp_path / "out")
    assert [r.message for r in caplog.records if r.name == "moeify"] == []
    after = reread_dense(model, tmp_path, "out")(input_ids=ids).logits
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


def untie(folder: Path) -> None:
    """Give the head a tensor of its own, which the dense class has no room for."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.decoder.embed_tokens.weight"] + 1
    save_file(tensors, file, metadata={"format": "pt"})


def edit(change: Any) -> Any:
    def apply(folder: Path) -> None:
        data = json.loads((folder / "moeify.json").read_bytes())
        data.pop("sha256")
        change(data)
        data["sha256"] = canonical_digest(data)
        (folder / "moeify.json").write_text(json.dumps(data))

    return apply


REFUSED: dict[str, tuple[Any, str]] = {
    "two tensors for one": (untie, "two tensors, which the dense class ties"),
    "no config": (edit(lambda d: d["details"].pop("config")), "lack the dense config"),
    "foreign class": (
        edit(lambda d: d["details"].update({"class": "os.path.join"})),
        "not of the transformers package",
    ),
    "hidden class": (edit(lambda d: d["details"].pop("class")), "details: class"),
    "inputs of no dtype": (
        edit(lambda d: d["details"].update(inputs={"tensor": {"shape": [1 << 40]}})),
        "cannot be made again",
    ),
    "huge inputs": (
        edit(
            lambda d: d["details"].update(inputs={"tensor": {"shape": [1 << 40], "dtype": "int64"}})
        ),
        "cannot be made again",
    ),
    "other layers": (edit(lambda d: d["layers"].pop()), "layers: were .* and are now"),
    "other plan": (edit(lambda d: d["plan"]["layers"][0].update(experts=7)), "plan_sha256"),
    "other experts": (
        edit(lambda d: d["layers"][0]["plan"].update(experts=7)),
        "experts was 7 and is now",
    ),
    "other width": (
        edit(lambda d: d["details"]["config"].update(ffn_dim=64)),
        "in a OPTForCausalLM of this plan",
    ),
    "unsigned": (
        lambda f: (f / "moeify.json").write_bytes(
            (f / "moeify.json")
            .read_bytes()
            .replace(b'"version": 3', b'"version":  3')
            .replace(b"OPTForCausalLM", b"OPTForCausalML", 1)
        ),
        "it was changed",
    ),
}


@pytest.fixture(scope="module")
def custom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("custom") / "opt"
    model = mf.moeify(family("opt").eval(), HALF)
    write_model_files(custom_files(model, LiveTensors(model)), folder)
    return folder


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, custom: Path, tmp_path: Path) -> None:
    damage, message = REFUSED[name]
    folder = tmp_path / "copy"
    shutil.copytree(custom, folder)
    damage(folder)
    with pytest.raises(CheckpointError, match=message):
        dense_files(folder)


def test_changed_meanwhile(custom: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(custom, folder)
    model_files = dense_files(folder)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    with pytest.raises(CheckpointError, match="was changed while it was read"):
        write_model_files(model_files, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_not_of_hugging_face(tmp_path: Path, custom: Path) -> None:
    mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    mf.save(mf.moeify(nn.Sequential(mlp), ALL, example_inputs=torch.randn(4, 8)), tmp_path / "a")
    with pytest.raises(CheckpointError, match="demoeify"):
        dense_files(tmp_path / "a")
    write_model_files(dense_files(custom), tmp_path / "b")
    with pytest.raises(CheckpointError, match="is a dense model already"):
        dense_files(tmp_path / "b")
    with pytest.raises(CheckpointError, match=r"moeify.json: is missing"):
        dense_files(tmp_path)


def test_folder_tensors(custom: Path, tmp_path: Path) -> None:
    """Both kinds give what the model in memory gives, by rows too."""
    model = mf.moeify(family("llama-tied").eval(), SIGMOID)
    mf.save(model, tmp_path / "saved", max_shard_size=20_000)
    write_model_files(custom_files(model, LiveTensors(model)), tmp_path / "custom")
    live = LiveTensors(model)
    for name in ("saved", "custom"):
        tensor_source = FolderTensors(tmp_path / name, verify=True)
        assert dict(tensor_source.specs) == dict(live.specs)
        if name == "saved":
            assert tensor_source.aliases == live.aliases
        for tensor in live.specs:
            assert torch.equal(tensor_source.read(tensor), live.read(tensor)), tensor
            assert torch.equal(tensor_source.read(tensor, 1, 2), live.read(tensor, 1, 2)), tensor
        tensor_source.unchanged()
        tensor_source.close()
        file = sorted((tmp_path / name).glob("*.safetensors"))[0]
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match="SHA-256"):
            FolderTensors(tmp_path / name, verify=True)
    os.truncate(file, 5)
    with pytest.raises(CheckpointError, match="claims"):
        FolderTensors(tmp_path / "custom")
