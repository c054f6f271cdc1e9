"""`save` and `load`: the same bits in a fresh process, and every damage found.

Run as a script this file is that fresh process: it loads what lies in a folder and prints digests.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import moeify as mf
from moeify.errors import CheckpointError
from moeify.passes.infra.base import Fact, PassResult
from moeify.passes.rewrite.blocks import blocks_of
from moeify.storage.strict_json import canonical_digest
from tests.distributed.ranks import run_ranks

SMALL = {"vocab_size": 99}
ALL = {"layers": [{"select": "all", "experts": 3}]}
SECOND = {
    "layers": [{"select": {"every": 2, "start": 1}, "experts": 4, "top_k": 2}],
    "init": {"experts": "noise"},
}
RESIDUAL = {
    "layers": [{"select": {"last": 1}, "experts": 2, "residual": "coefficient"}],
    "router": {"bias_update": 0.01, "capacity_factor": 1.5},
}


class Net(nn.Module):
    """Plain torch: an MLP with a norm inside, a frozen and tied head, a buffer, strange strides."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.up = nn.Linear(width, 4 * width)
        self.inner = nn.LayerNorm(4 * width)
        self.down = nn.Linear(4 * width, width)
        self.out = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight
        self.mix = nn.Linear(width, width)
        self.mix.weight = nn.Parameter(torch.randn(width, width).t(), requires_grad=False)
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("scale", torch.rand(width), persistent=False)
        self.register_buffer("mask", torch.ones(width, dtype=torch.bool), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.embed(ids)) * self.scale * self.mask
        x = x + self.down(self.inner(torch.relu(self.up(x))))
        return self.head(self.out(x))


class Deciding(nn.Module):
    """Reads a value on the way, which fake tensors cannot give."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        return x + y if float(x.abs().max()) >= 0 else y


def encoder() -> nn.Module:
    return nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True)


def ids(high: int = 11, length: int = 6) -> torch.Tensor:
    return torch.randint(3, high, (2, length), generator=torch.Generator().manual_seed(1))


PLAIN = {
    "net": (Net, RESIDUAL, lambda: (ids(),)),
    "encoder": (encoder, ALL, lambda: (torch.linspace(-1, 1, 96).view(2, 6, 8),)),
    "deciding": (Deciding, ALL, lambda: (torch.linspace(-1, 1, 32).view(4, 8),)),
}
FAMILY = {
    "gpt2": SECOND,
    "llama": RESIDUAL,
    "llama-tied-eager-bfloat16": SECOND,
    "bert": SECOND,
    "t5": ALL,
    "albert": RESIDUAL,
    "opt": SECOND,
}


def family(name: str) -> nn.Module:
    import transformers as hf

    four = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 16, **SMALL}
    wide = {"intermediate_size": 32, **four}
    if name == "gpt2":
        config = hf.GPT2Config(n_layer=2, n_embd=16, n_head=4, n_positions=32, **SMALL)
        return hf.GPT2LMHeadModel(config)
    if name == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(num_key_value_heads=2, **wide))
    if name.startswith("llama-tied"):
        config = hf.LlamaConfig(tie_word_embeddings=True, attn_implementation="eager", **wide)
        return hf.LlamaForCausalLM(config).to(torch.bfloat16)
    if name == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**wide))
    if name == "t5":
        config = hf.T5Config(d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4, **SMALL)
        model = hf.T5ForConditionalGeneration(config)
        model.generation_config.decoder_start_token_id = 0  # known to this config alone
        return model
    if name == "albert":
        return hf.AlbertModel(hf.AlbertConfig(embedding_size=8, **wide))
    config = hf.OPTConfig(ffn_dim=32, max_position_embeddings=32, word_embed_proj_dim=16, **four)
    return hf.OPTForCausalLM(config)


def run(name: str, model: nn.Module) -> list[torch.Tensor]:
    """Return what a model gives, in evaluation mode."""
    was = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        if name in PLAIN:
            found = [model(*PLAIN[name][2]())]
        else:
            inputs = {"input_ids": ids(99)}
            if name == "t5":
                inputs["decoder_input_ids"] = ids(99, 4)
            found = [model(**inputs)[0], mf.aux_loss(model)]
            if name in ("gpt2", "llama", "t5"):
                found.append(model.generate(inputs["input_ids"], max_new_tokens=4, do_sample=False))
    for module, mode in zip(model.modules(), was, strict=True):
        module.training = mode
    return found


def digest(tensors: list[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        plain = tensor.detach().contiguous().reshape(-1)
        found.update(str((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(plain.view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def convert(model: nn.Module, plan: Any, inputs: Any = None) -> nn.Module:
    return mf.moeify(model, plan, example_inputs=inputs, verify=False)


def make(name: str) -> nn.Module:
    torch.manual_seed(3)
    if name in PLAIN:
        cls, plan, inputs = PLAIN[name]
        return convert(cls(), plan, inputs())
    return convert(family(name), FAMILY[name])


def read(name: str, folder: Path) -> nn.Module:
    torch.manual_seed(4)
    return mf.load(folder, model=PLAIN[name][0]() if name in PLAIN else None)


def content(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Every model converted, changed a little, and saved; with the digests of what it gives."""
    root, digests = tmp_path_factory.mktemp("saves"), {}
    for name in (*PLAIN, *FAMILY):
        model = make(name)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter) / 100)
        mf.save(model, root / name, max_shard_size="4kB" if name == "gpt2" else "5GB")
        digests[name] = digest(run(name, model))
    return root, digests


# -- the same model again


def test_a_fresh_process_gives_the_same_bits(folders: tuple[Path, dict[str, str]]) -> None:
    root, digests = folders
    env = os.environ | {"PYTHONPATH": str(Path(mf.__file__).parents[1])}
    # as many threads as here: sums over threads round differently
    command = [sys.executable, __file__, str(root), str(torch.get_num_threads())]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == digests


@pytest.mark.parametrize("name", [*PLAIN, *FAMILY])
@pytest.mark.thin(2)
def test_saving_a_loaded_model_gives_the_same_files(
    name: str, folders: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, digests = folders
    state = torch.get_rng_state()
    model = read(name, root / name)
    torch.manual_seed(4)
    expected = torch.get_rng_state()
    if name not in PLAIN:
        again = mf.load(root / name)
        assert torch.equal(torch.get_rng_state(), expected)
        assert digest(run(name, again)) == digests[name]
    torch.set_rng_state(state)
    mf.save(model, tmp_path / "again", max_shard_size="4kB" if name == "gpt2" else "5GB")
    assert content(tmp_path / "again") == content(root / name)


def test_what_is_not_in_the_tensors_is_restored_too(
    folders: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make("net")
    model.eval()
    model.out.train()
    model.embed.weight.requires_grad_(False)
    model.seen.add_(7)
    model.scale.mul_(3)
    block = next(m for m in model.modules() if type(m).__name__ == "MoEBlock")
    block.router.selection_bias.fill_(0.5)
    mf.save(model, tmp_path / "m")
    loaded = mf.load(tmp_path / "m", model=Net())
    assert loaded.head.weight is loaded.embed.weight
    assert loaded.mix.weight.stride() == model.mix.weight.stride() == (1, 8)
    assert not loaded.training
    assert loaded.out.training
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in loaded.named_parameters()} == flags
    assert not all(flags.values())
    own, new = dict(model.named_buffers()), dict(loaded.named_buffers())
    assert own.keys() == new.keys()
    assert all(torch.equal(own[n], new[n]) and own[n].dtype == new[n].dtype for n in own)
    assert list(model.state_dict()) == list(loaded.state_dict())


def test_a_loaded_model_trains_and_goes_back_to_dense(tmp_path: Path) -> None:
    model = convert(family("gpt2"), ALL)
    mf.save(model, tmp_path / "m")
    loaded = mf.load(tmp_path / "m")
    assert loaded.training
    loaded.eval()
    ids_ = ids(99)
    before = loaded(input_ids=ids_).logits.detach()
    assert torch.equal(before, model.eval()(input_ids=ids_).logits)
    out = loaded(input_ids=ids_, labels=ids_)
    out.loss.backward()
    assert all(p.grad is not None for p in loaded.parameters())
    loaded.save_pretrained(tmp_path / "x", export="custom")
    assert (tmp_path / "x" / "modeling_moeify.py").exists()
    mf.demoeify(loaded)
    torch.testing.assert_close(loaded(input_ids=ids_).logits, before, atol=1e-5, rtol=1e-5)


def test_dtype_and_meta(folders: tuple[Path, dict[str, str]]) -> None:
    root, _ = folders
    loaded = mf.load(root / "llama", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    biases = [b for n, b in loaded.named_buffers() if n.endswith("selection_bias")]
    assert [b.dtype for b in biases] == [torch.float32]
    loaded(input_ids=ids(99))
    meta = mf.load(root / "llama", device="meta")
    assert {t.device.type for t in (*meta.parameters(), *meta.buffers())} == {"meta"}
    with pytest.raises(ValueError, match="floating-point"):
        mf.load(root / "llama", dtype=torch.int8)


def test_a_model_that_was_cast_after_the_conversion(tmp_path: Path) -> None:
    model = convert(family("t5"), ALL).to(torch.bfloat16)
    mf.save(model, tmp_path / "m")
    loaded = mf.load(tmp_path / "m")
    assert digest(run("t5", loaded)) == digest(run("t5", model))


def test_a_model_that_was_pickled(tmp_path: Path) -> None:
    model = mf.moeify(Net(), RESIDUAL, example_inputs=torch.tensor([[1, 2]])).eval()
    ids = torch.tensor([[3, 4, 5]])
    mf.save(pickle.loads(pickle.dumps(model)), tmp_path / "save")
    torch.testing.assert_close(mf.load(tmp_path / "save", model=Net())(ids), model(ids))


def test_a_meta_model_or_a_compiled_one(
    folders: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, digests = folders
    with torch.device("meta"):
        empty = encoder()
    assert digest(run("encoder", mf.load(root / "encoder", model=empty))) == digests["encoder"]
    compiled = torch.compile(empty)
    mf.save(nn.DataParallel(compiled), tmp_path / "m")
    assert content(tmp_path / "m") == content(root / "encoder")


def test_the_default_device_does_not_matter(folders: tuple[Path, dict[str, str]]) -> None:
    root, digests = folders
    with torch.device("meta"):
        loaded = mf.load(root / "llama")
    assert digest(run("llama", loaded)) == digests["llama"]


def test_shards(folders: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    root, _ = folders
    files = sorted(p.name for p in (root / "gpt2").glob("*.safetensors"))
    assert len(files) > 5
    assert files[0] == f"moeify-00001-of-{len(files):05d}.safetensors"
    found: dict[str, torch.Tensor] = {}
    for file in files:
        found |= load_file(root / "gpt2" / file)
    model = mf.load(root / "gpt2")
    state = model.state_dict()
    assert {n: t.dtype for n, t in found.items()} == {n: state[n].dtype for n in found}
    assert all(torch.equal(found[n], state[n]) for n in found)
    assert set(state) - set(found) == {"lm_head.weight"}
    names = {p.name for p in (root / "gpt2").iterdir()}
    assert names - set(files) == {
        "moeify.json",
        "plan.yaml",
        "source_config.json",
        "generation_config.json",
    }
    assert mf.Plan.load(root / "gpt2" / "plan.yaml") == mf.Plan.of(SECOND)
    with pytest.raises(ValueError, match="max_shard_size"):
        mf.save(model, tmp_path / "m", max_shard_size="big")


def test_transformers_does_not_take_it_for_a_dense_model(
    folders: tuple[Path, dict[str, str]],
) -> None:
    import transformers as hf

    with pytest.raises((OSError, ValueError)):
        hf.AutoModelForCausalLM.from_pretrained(folders[0] / "gpt2")
    with pytest.raises(OSError):
        hf.GPT2LMHeadModel.from_pretrained(folders[0] / "gpt2")


@dataclass(frozen=True)
class Doubled:
    """A user's pass: the experts count twice."""

    name: ClassVar[str] = "double"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: Any, ctx: Any) -> PassResult:
        for _, block in blocks_of(gm):
            combine = block.graph.find_nodes(op="call_function", target=torch.ops.moeify.combine)[0]
            with block.graph.inserting_after(combine):
                twice = block.graph.call_function(torch.mul, (combine, 2))
            combine.replace_all_uses_with(twice)
            twice.args = (combine, 2)
            block.recompile()
        return PassResult(gm, True)


def test_passes_of_the_user_are_needed_again(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    model = mf.moeify(encoder(), ALL, example_inputs=(x,), passes=[Doubled()], verify=False)
    mf.save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="passes="):
        mf.load(tmp_path / "m", model=encoder())
    loaded = mf.load(tmp_path / "m", model=encoder(), passes=[Doubled()])
    assert torch.equal(loaded.eval()(x), model.eval()(x))


# -- what cannot be saved, and where


def test_refused_models(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with pytest.raises(mf.MoeifyError, match="was not converted"):
        mf.save(Net(), target)

    class Extra(Net):
        def get_extra_state(self) -> object:
            return {"a": 1}

    class Renaming(Net):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "other"] = torch.zeros(1)

    for cls, what in ((Extra, "_extra_state"), (Renaming, "other")):
        model = convert(cls(), RESIDUAL, (ids(),))
        with pytest.raises(CheckpointError, match=what):
            mf.save(model, target)
    with torch.device("meta"):
        empty = encoder()
    convert(empty, ALL, (torch.zeros(1, 2, 8),))
    with pytest.raises(CheckpointError, match="on meta"):
        mf.save(empty, target)
    assert not list(tmp_path.iterdir())


def test_foreign_places_are_left_alone(tmp_path: Path) -> None:
    model = make("encoder")
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not a moeify save"):
        mf.save(model, folder)
    with pytest.raises(CheckpointError, match="is a file"):
        mf.save(model, folder / "thesis.txt")
    with pytest.raises(CheckpointError, match="is not a folder; create it first"):
        mf.save(model, tmp_path / "missing" / "m")
    with pytest.raises(CheckpointError, match="give the folder"):
        mf.save(model, "")
    assert [p.name for p in tmp_path.iterdir()] == ["foreign"]
    assert (folder / "thesis.txt").read_text() == "mine"


def test_an_older_save_is_replaced_and_what_others_put_there_stays(tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    model = make("net")
    mf.save(model, target, max_shard_size=600)
    assert len(list(target.glob("*.safetensors"))) > 2
    (target / "tokenizer.json").write_text("{}")
    (target / "notes").mkdir()
    (target / "notes" / "a.txt").write_text("a")
    dead = tmp_path / ".m.staging-4194305-0123456789"  # above the largest pid
    dead.mkdir()
    alive = tmp_path / f".m.staging-{os.getpid()}-0123456789"
    alive.mkdir()
    link = tmp_path / "link"
    link.symlink_to(target)
    model.out.weight.data.fill_(0.25)
    mf.save(model, link)
    assert link.is_symlink()
    assert not dead.exists()
    alive.rmdir()
    assert {p.name for p in tmp_path.iterdir()} == {"m", "link"}
    assert len(list(target.glob("*.safetensors"))) == 1
    assert (target / "notes" / "a.txt").read_text() == "a"
    assert (target / "tokenizer.json").exists()
    assert mf.load(link, model=Net()).out.weight[0] == 0.25


# -- what cannot be loaded


def test_another_model_is_refused_and_left_as_it_was(
    folders: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, _ = folders

    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(2, 2)

    class Other(Net):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            x = self.mix(self.embed(ids)) * self.scale * self.mask
            x = x + self.down(self.inner(torch.tanh(self.up(x))))
            return self.head(self.out(x))

    for model, what in (
        (Wider(), "more.bias"),
        (Net(16), "d_in"),
        (Other(), "between its projections"),
        (encoder(), "does not fit|d_in"),
        (convert(Net(), RESIDUAL, (ids(),)), "converted already"),
    ):
        state = copy.deepcopy(model.state_dict())
        modules, shape = list(model.modules()), str(model)
        hooks = [dict(m._forward_hooks) for m in modules]
        with pytest.raises(CheckpointError, match=what):
            mf.load(root / "net", model=model)
        assert str(model) == shape
        assert list(model.modules()) == modules
        assert [dict(m._forward_hooks) for m in modules] == hooks
        new = model.state_dict()
        assert list(new) == list(state)
        assert all(torch.equal(new[name], state[name]) for name in state)
    broken = Net()
    head = broken.head.weight
    shutil.copytree(root / "net", tmp_path / "m")
    flip(tmp_path / "m")
    with pytest.raises(CheckpointError, match="SHA-256"):
        mf.load(tmp_path / "m", model=broken)
    assert broken.head.weight is broken.embed.weight is head
    assert "save_pretrained" not in broken.__dict__
    convert(broken, RESIDUAL, (ids(),))


def test_only_classes_of_transformers_are_imported(
    folders: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    root, _ = folders
    with pytest.raises(CheckpointError, match="pass model="):
        mf.load(root / "net")
    folder = shutil.copytree(root / "gpt2", tmp_path / "m")
    for name in (
        "os.system",
        "transformers.models.gpt2.modeling_gpt2.GPT2Config",
        "transformers.models.gpt2.modeling_gpt2.nothing",
        "transformers.utils.import_utils.subprocess.run",
    ):
        rewrite(folder, lambda data, name=name: data["model"].update(name=name))
        with pytest.raises(CheckpointError, match=r"pass\s+model="):
            mf.load(folder)
    rewrite(folder, lambda data: data["model"].update(attention={"": "evil/kernel"}))
    with pytest.raises(CheckpointError, match=r"model\.attention"):
        mf.load(folder)


def flip(folder: Path) -> None:
    file = sorted(folder.glob("*.safetensors"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def rewrite(folder: Path, change: Any, *, sign: bool = True) -> None:
    """Change `moeify.json`, and sign it again, as someone who means harm would."""
    file = folder / "moeify.json"
    data = json.loads(file.read_bytes())
    change(data)
    data.pop("sha256")
    data["sha256"] = canonical_digest(data) if sign else "0" * 64
    file.write_text(json.dumps(data))


def reheader(folder: Path, change: Any, tail: bytes = b"") -> None:
    """Change a shard's header, and sign the file again."""
    file = sorted(folder.glob("*.safetensors"))[0]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(data[8 : 8 + length].decode())
    text = text if isinstance(text, bytes) else text.encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :] + tail)
    resign(folder, file)


def resign(folder: Path, file: Path) -> None:
    def update(data: dict[str, Any]) -> None:
        record = next(r for r in data["shards"] if r["file"] == file.name)
        record["bytes"] = file.stat().st_size
        record["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()

    rewrite(folder, update)


def edited(change: Any) -> Any:
    """A change of the header as data."""

    def apply(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return lambda folder: reheader(folder, apply)


def shard_of(folder: Path) -> Path:
    return sorted(folder.glob("*.safetensors"))[0]


def replace_by_link(folder: Path) -> None:
    file = shard_of(folder)
    file.rename(folder.parent / "elsewhere")
    file.symlink_to(folder.parent / "elsewhere")


def replace_by_fifo(folder: Path) -> None:
    shard_of(folder).unlink()
    os.mkfifo(shard_of_name(folder))


def shard_of_name(folder: Path) -> Path:
    return folder / json.loads((folder / "moeify.json").read_bytes())["shards"][0]["file"]


def bomb(folder: Path) -> None:
    file = shard_of(folder)
    file.write_bytes((2**63).to_bytes(8, "little") + file.read_bytes()[8:])
    resign(folder, file)


def trailing(folder: Path) -> None:
    reheader(folder, lambda text: text, tail=b"\0" * 8)


def lost_tensor(folder: Path) -> None:
    file = shard_of(folder)
    tensors = load_file(file)
    tensors.pop("out.weight")
    save_file(tensors, file)
    resign(folder, file)


def extra_tensor(folder: Path) -> None:
    file = shard_of(folder)
    save_file(load_file(file) | {"more": torch.zeros(2)}, file)
    resign(folder, file)


def unknown_tensor(folder: Path) -> None:
    """One more, in both places: only the model does not know it."""
    extra_tensor(folder)
    entry = {"shard": shard_of(folder).name, "dtype": "float32", "shape": [2], "role": "buffer"}
    rewrite(folder, lambda data: data["tensors"].update(more=entry | {"requires_grad": False}))


def forgotten_tensor(folder: Path) -> None:
    lost_tensor(folder)

    def forget(data: dict[str, Any]) -> None:
        data["parameters"] -= data["tensors"].pop("out.weight")["shape"][0]

    rewrite(folder, forget)


def name_shard(name: str) -> Any:
    def change(data: dict[str, Any]) -> None:
        old = data["shards"][0]["file"]
        data["shards"][0]["file"] = name
        for tensor in data["tensors"].values():
            tensor["shard"] = name if tensor["shard"] == old else tensor["shard"]

    return lambda folder: rewrite(folder, change)


def manifest_text(change: Any) -> Any:
    def apply(folder: Path) -> None:
        file = folder / "moeify.json"
        file.write_bytes(change(file.read_bytes()))

    return apply


DAMAGES: dict[str, tuple[Any, str]] = {
    "bit flip": (flip, "SHA-256"),
    "truncated": (lambda f: os.truncate(shard_of(f), 900), "900 bytes instead of"),
    "grown": (lambda f: shard_of(f).open("ab").write(b"x"), "bytes instead of"),
    "trailing bytes": (trailing, "end at byte"),
    "header of 2^63": (bomb, "header claims 9223372036854775808"),
    "empty shard": (lambda f: shard_of(f).write_bytes(b""), "0 bytes instead of"),
    "missing shard": (lambda f: shard_of(f).unlink(), "is missing"),
    "missing plan": (lambda f: (f / "plan.yaml").unlink(), "plan.yaml: is missing"),
    "other plan.yaml": (
        lambda f: (f / "plan.yaml").write_bytes((f / "plan.yaml").read_bytes().swapcase()),
        "plan.yaml: its SHA-256",
    ),
    "link": (replace_by_link, "symbolic link"),
    "fifo": (replace_by_fifo, "not a regular file"),
    "folder": (lambda f: (shard_of(f).unlink(), shard_of_name(f).mkdir()), "not a regular file"),
    "dots": (name_shard("../m.safetensors"), r"shards\[0\].file"),
    "absolute": (name_shard("/etc/passwd"), r"shards\[0\].file"),
    "file with dots": (
        lambda f: rewrite(f, lambda d: d["files"][0].update(file="../plan.yaml")),
        "must not contain a path",
    ),
    "duplicate key in header": (
        lambda f: reheader(f, lambda t: t.replace("{", '{"out.weight":1,', 1)),
        "out.weight: appears twice",
    ),
    "header no json": (lambda f: reheader(f, lambda t: t.replace(":", ";", 1)), "not JSON"),
    "header no text": (lambda f: reheader(f, lambda t: b"\xff" + t.encode()), "not JSON"),
    "header a list": (lambda f: reheader(f, lambda t: "[" + t + "]"), "not a mapping"),
    "header too deep": (lambda f: reheader(f, lambda t: "[" * 20_000), "not JSON"),
    "header wrong dtype": (
        edited(lambda d: d["out.weight"].update(dtype="F16")),
        "out.weight: dtype 'F16' instead of float32",
    ),
    "header wrong shape": (
        edited(lambda d: d["out.weight"].update(shape=[2, 4])),
        r"out.weight: shape \[2, 4\]",
    ),
    "header shape of floats": (
        edited(lambda d: d["out.weight"].update(shape=[8.0])),
        r"out.weight: shape \[8.0\]",
    ),
    "header overlap": (
        edited(lambda d: d["out.weight"].update(data_offsets=d["out.bias"]["data_offsets"])),
        "overlaps",
    ),
    "header negative": (
        edited(lambda d: d["out.weight"].update(data_offsets=[-32, 0])),
        "two integers, none negative",
    ),
    "header too long": (
        edited(lambda d: d["out.weight"].update(data_offsets=[0, 1 << 50])),
        "out.weight: data_offsets",
    ),
    "header unknown field": (edited(lambda d: d["out.weight"].update(x=1)), "damaged"),
    "lost tensor": (lost_tensor, "out.weight: is missing"),
    "extra tensor": (extra_tensor, "more: should not be there"),
    "unknown tensor": (unknown_tensor, "more: was saved, but the model has no place"),
    "forgotten tensor": (forgotten_tensor, "out.weight: the model needs it"),
    "no manifest": (lambda f: (f / "moeify.json").unlink(), "moeify.json: is missing"),
    "manifest empty": (manifest_text(lambda b: b""), "not JSON"),
    "manifest cut": (manifest_text(lambda b: b[: len(b) // 2]), "not JSON"),
    "manifest flipped": (
        manifest_text(lambda b: b.replace(b'"requires_grad": true', b'"requires_grad": false', 1)),
        "sha256",
    ),
    "manifest duplicate key": (
        manifest_text(lambda b: b.replace(b"{", b'{"version": 1,', 1)),
        "version: appears twice",
    ),
    "manifest NaN": (manifest_text(lambda b: b.replace(b": 1,", b": NaN,", 1)), "NaN"),
    "manifest bomb": (manifest_text(lambda b: b"[" * 100_000), "not JSON"),
    "manifest number bomb": (manifest_text(lambda b: b"9" * 9_999), "not JSON"),
    "other format": (lambda f: rewrite(f, lambda d: d.update(format="zip")), "format"),
    "newer version": (lambda f: rewrite(f, lambda d: d.update(version=3)), "version: 3"),
    "older version": (lambda f: rewrite(f, lambda d: d.update(version=1)), "version: 1"),
    "version true": (lambda f: rewrite(f, lambda d: d.update(version=True)), "version: True"),
    "missing key": (lambda f: rewrite(f, lambda d: d.pop("layers")), "layers: Field required"),
    "unknown key": (lambda f: rewrite(f, lambda d: d.update(x=1)), "x: Extra"),
    "wrong type": (
        lambda f: rewrite(f, lambda d: d["tensors"]["out.weight"].update(shape="8")),
        "tensors.out.weight.shape",
    ),
    "not signed": (lambda f: rewrite(f, lambda d: None, sign=False), "sha256"),
    "wrong total": (lambda f: rewrite(f, lambda d: d.update(parameters=1)), "parameters: 1"),
    "alias of nothing": (
        lambda f: rewrite(f, lambda d: d["aliases"].update(a="b")),
        "aliases.a",
    ),
    "bad plan": (
        lambda f: rewrite(f, lambda d: d["plan"]["layers"][0].update(experts=0)),
        r"plan: layers\[0\].experts",
    ),
    "wrong plan digest": (
        lambda f: rewrite(f, lambda d: d["plan"]["layers"][0].update(experts=5)),
        "plan_sha256",
    ),
    "other experts": (
        lambda f: rewrite(f, lambda d: d["layers"][0]["plan"].update(experts=5)),
        "experts was 5 and is now 2",
    ),
    "other layers": (
        lambda f: rewrite(f, lambda d: d["layers"].append(d["layers"][0])),
        r"layers: were \[.*, .*\], and are now \[",
    ),
    "other ledger": (lambda f: rewrite(f, lambda d: d["ledger"].pop("out.bias")), "out.bias"),
    "input bomb": (
        lambda f: rewrite(
            f, lambda d: d.update(inputs={"tensor": {"shape": [1 << 40], "dtype": "int64"}})
        ),
        "inputs",
    ),
    "input of no dtype": (
        lambda f: rewrite(f, lambda d: d.update(inputs={"tensor": {"shape": [1], "dtype": "os"}})),
        "inputs",
    ),
    "input unknown": (
        lambda f: rewrite(f, lambda d: d.update(inputs={"unknown": "Thing"})),
        "inputs",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found(damage: str, folders: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    folder = shutil.copytree(folders[0] / "net", tmp_path / "m")
    change(folder)
    model = Net()
    with pytest.raises(CheckpointError, match=message) as caught:
        mf.load(folder, model=model)
    assert str(folder) in str(caught.value)
    assert type(model.up) is nn.Linear


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("missing", "file", "a\0b"):
        with pytest.raises(CheckpointError, match="cannot be opened as a folder"):
            mf.load(tmp_path / name)


def test_unverified_loading_skips_the_digests(
    folders: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    folder = shutil.copytree(folders[0] / "net", tmp_path / "m")
    flip(folder)
    mf.load(folder, model=Net(), verify=False)


@pytest.mark.gpu
def test_loading_to_a_gpu(folders: tuple[Path, dict[str, str]]) -> None:
    loaded = mf.load(folders[0] / "llama", device="cuda")
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    loaded(input_ids=ids(99).cuda())
    again = mf.load(folders[0] / "net", model=Net().cuda())
    assert {t.device.type for t in (*again.parameters(), *again.buffers())} == {"cpu"}


def saved_with_precision(rank: int, folder: Path) -> None:
    plan = ALL | {"zero": {"precision": "bf16"}}
    mf.save(mf.moeify(encoder(), plan, example_inputs=torch.zeros(1, 3, 8)), folder)


def test_a_model_of_another_precision_loads_without_ranks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(saved_with_precision, 1, tmp_path / "saved")
    with caplog.at_level("WARNING", "moeify"):
        model = mf.load(tmp_path / "saved", model=encoder())
    assert "zero.precision: needs torch.distributed" in caplog.text
    assert "mf.optimizer keeps no master weights" in caplog.text
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    place = Path(sys.argv[1])
    found = {name: digest(run(name, read(name, place / name))) for name in (*PLAIN, *FAMILY)}
    sys.stdout.write(json.dumps(found))
