"""Dense folders read tensor by tensor give what `from_pretrained` gives."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moeify.errors import CheckpointError
from moeify.hf.tensor_names import NeedsLoading, open_dense_folder
from moeify.storage.folder_reader import CheckpointReader

SMALL = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, "vocab_size": 99}
WIDE = {"intermediate_size": 32, **SMALL}
HEADS = {"num_key_value_heads": 2, "head_dim": 4, **WIDE}
FORMAT = {"format": "pt"}


def family(name: str) -> Any:
    import transformers as hf

    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**HEADS))
    if name == "gpt2":
        small = {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 99}
        config = hf.GPT2Config(n_layer=2, n_embd=16, n_head=4, n_positions=32, **small)
        return hf.GPT2LMHeadModel(config)
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**WIDE))
    if name == "t5":
        config = hf.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, vocab_size=99)
        return hf.T5ForConditionalGeneration(config)
    if name == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(tie_word_embeddings=True, **HEADS))
    if name == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(num_local_experts=2, **HEADS))
    config = hf.OPTConfig(ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32, **SMALL)
    return hf.OPTForCausalLM(config)


def on_meta(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(model.config)


def renamed(folder: Path, change: Any, **more: torch.Tensor) -> None:
    """Change the names in a folder's only file."""
    file = folder / "model.safetensors"
    tensors = {change(k): v for k, v in load_file(file).items()}
    save_file(tensors | more, file, metadata=FORMAT)


def as_on_the_hub(name: str, folder: Path) -> None:
    """Give a folder the names that such files have on the hub, which are older ones."""
    if name == "gpt2":  # saved from the base model, with a mask that is a buffer no more
        mask = {"h.0.attn.bias": torch.ones(1, 1, 8, 8)}
        renamed(folder, lambda k: k.removeprefix("transformer."), **mask)
    elif name == "bert":
        legacy = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}

        def older(key: str) -> str:
            for now, then in legacy.items():
                key = key.replace(now, then)
            return key

        renamed(folder, older, **{"bert.pooler.dense.bias": torch.ones(16)})
    elif name == "opt":
        renamed(folder, lambda k: k.removeprefix("model."))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "qwen3", "opt"])
def test_names(name: str, tmp_path: Path) -> None:
    """Names, ties and values are those of `from_pretrained`; several files are as good as one."""
    made = family(name)
    made.save_pretrained(tmp_path, max_shard_size="20KB" if name in ("llama", "t5") else "1GB")
    as_on_the_hub(name, tmp_path)
    loaded, info = type(made).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    source = open_dense_folder(tmp_path, on_meta(made))
    state = loaded.state_dict()
    assert state.keys() == source.specs.keys() | source.aliases.keys()
    assert [n for n in source.specs if n in source.aliases] == []
    for alias, first in source.aliases.items():
        assert state[alias].data_ptr() == state[first].data_ptr()
    for key, tensor in state.items():
        assert torch.equal(source.read(key), tensor), key
        if key in source.specs:
            assert source.specs[key].shape == tuple(tensor.shape)
        rows = len(tensor)
        assert torch.equal(source.read(key, 1, rows - 1), tensor[1 : rows - 1]), key
    assert source.missing == ()
    assert set(source.unused) == set(info["unexpected_keys"])
    source.folder.unchanged()


def test_what_is_missing_and_left_over(tmp_path: Path) -> None:
    made = family("llama")
    made.save_pretrained(tmp_path)
    renamed(tmp_path, lambda k: k.replace("lm_head", "other_head"))
    source = open_dense_folder(tmp_path, on_meta(made))
    assert (source.missing, source.unused) == (("lm_head.weight",), ("other_head.weight",))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: is in none of the files"):
        source.read("lm_head.weight")
    renamed(tmp_path, lambda k: k, **{"model.norm.weight": torch.ones(17)})
    with pytest.raises(CheckpointError, match=r"norm\.weight: has the shape \[17\]"):
        open_dense_folder(tmp_path, on_meta(made))


def test_ties(tmp_path: Path) -> None:
    """Either name will do, both if they are equal; two tensors are transformers' affair."""
    made = family("qwen3")
    made.save_pretrained(tmp_path)
    one = made.get_input_embeddings().weight.detach().clone()
    renamed(tmp_path, lambda k: k.replace("model.embed_tokens", "lm_head"))
    assert torch.equal(
        open_dense_folder(tmp_path, on_meta(made)).read("model.embed_tokens.weight"), one
    )
    renamed(tmp_path, lambda k: k, **{"model.embed_tokens.weight": one})
    assert open_dense_folder(tmp_path, on_meta(made)).missing == ()
    one[-1, -1] += 1
    renamed(tmp_path, lambda k: k, **{"model.embed_tokens.weight": one})
    with pytest.raises(NeedsLoading, match="differ"):
        open_dense_folder(tmp_path, on_meta(made))


def test_needs_loading(tmp_path: Path) -> None:
    made = family("mixtral")
    made.save_pretrained(tmp_path)
    with pytest.raises(NeedsLoading, match=r"experts\.0\.w1\.weight.*is computed from it"):
        open_dense_folder(tmp_path, on_meta(made))


@pytest.mark.parametrize("part", [None, "text_config"])
def test_quantised(part: str | None, tmp_path: Path) -> None:
    made = family("llama")
    made.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_bytes())
    quantised = {"quantization_config": {"quant_method": "fp8"}}
    config |= quantised if part is None else {part: quantised}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"quantised \(fp8\)"):
        open_dense_folder(tmp_path, on_meta(made))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_dtypes_and_rows(tmp_path: Path) -> None:
    """Every dtype, no rows, no dimensions, and rows beyond the end, as slicing has it."""
    names = ("float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64").split()
    tensors = {n: torch.randn(5, 2).mul(3).to(getattr(torch, n)) for n in names}
    for name in ("float8_e4m3fn", "float8_e5m2"):
        tensors[name] = torch.randn(5, 2).to(getattr(torch, name))
    tensors |= {"none": torch.zeros(0, 3), "odd": torch.zeros(3, 0), "one": torch.tensor(7.0)}
    save_file(tensors, tmp_path / "model.safetensors", metadata=FORMAT)
    with CheckpointReader(tmp_path) as folder:
        assert folder.keys.keys() == tensors.keys()
        for name, tensor in tensors.items():
            bounds = [(0, None), (1, 3), (3, 99), (4, 2)] if tensor.dim() else [(0, None)]
            for start, stop in bounds:
                got = folder.read(name, start, stop)
                want = tensor[start:stop] if tensor.dim() else tensor
                assert (got.dtype, got.shape) == (want.dtype, want.shape), name
                assert torch.equal(bits(got), bits(want)), name
    with pytest.raises(CheckpointError, match="closed"):
        folder.read("float32")


def test_fingerprint(tmp_path: Path) -> None:
    """It tells a changed folder, and reading tells one that changes meanwhile."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, file)
    first, same = CheckpointReader(tmp_path), CheckpointReader(tmp_path)
    assert first.fingerprint() == same.fingerprint() == json.loads(json.dumps(same.fingerprint()))
    assert first.digest() == same.digest()
    assert first.fingerprint()["folder"] == tmp_path.name
    os.utime(file, ns=(1, 1))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        first.unchanged()
    assert CheckpointReader(tmp_path).digest() != first.digest()
    kept = CheckpointReader(tmp_path)
    save_file({"a": torch.ones(4)}, tmp_path / "new")
    (tmp_path / "new").rename(file)  # another file: the one that was opened is read to its end
    assert torch.equal(kept.read("a"), torch.zeros(4))
    os.truncate(file, 0)
    with pytest.raises(CheckpointError, match="claims"):
        CheckpointReader(tmp_path)
    save_file({"a": torch.ones(4)}, file)
    cut = CheckpointReader(tmp_path)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(CheckpointError, match="ends too early"):
        cut.read("a")


def test_cache_of_the_hub(tmp_path: Path) -> None:
    """A snapshot's links lead to blobs, and are followed; what else they could be is not."""
    made = family("qwen3")
    blobs = tmp_path / "models--org--tiny" / "blobs"
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "0123"
    made.save_pretrained(snapshot)
    blobs.mkdir()
    for number, file in enumerate(sorted(snapshot.iterdir())):
        blob = blobs / f"{number:064x}"
        file.rename(blob)
        file.symlink_to(f"../../blobs/{blob.name}")
    source = open_dense_folder(snapshot, on_meta(made))
    want = made.model.norm.weight
    assert torch.equal(source.read("model.norm.weight"), want)
    assert source.folder.fingerprint()["folder"] == "org/tiny@0123"
    weights = snapshot / "model.safetensors"
    target = blobs / Path(os.readlink(weights)).name
    for link in (target, f"../../blobs/../blobs/{target.name}", "../../blobs/short"):
        weights.unlink()
        weights.symlink_to(link)
        with pytest.raises(CheckpointError, match="symbolic link"):
            CheckpointReader(snapshot)
    weights.unlink()
    weights.symlink_to(f"../../blobs/{target.name}")
    target.rename(tmp_path / "elsewhere")
    target.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="symbolic link"):
        CheckpointReader(snapshot)
