"""`moeify convert`: streamed tensors are those of the model in memory, and what is around them.

Run as a script this file is the process whose memory is measured.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import moeify as mf
from moeify.cli import convert, convert_check
from moeify.cli.main import app
from moeify.formats.folder_class import custom_class
from moeify.formats.model_card import model_card
from moeify.formats.streaming import stream
from moeify.hf.local_folder import load_dense
from moeify.plan.layer_description import LayerDescription
from moeify.plan.plan import Plan
from moeify.plan.specs import InitSpec
from moeify.storage.strict_json import canonical_digest
from moeify.storage.tensor_source import LiveTensors
from tests.checkpoint.test_checkpoint import family

ALL = "{select: all, experts: 3}"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)], prog_name="moeify")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Small random models; `llama-other` is another checkpoint of `llama`."""
    root = tmp_path_factory.mktemp("models")
    for name in ("gpt2", "llama", "llama-tied-eager-bfloat16", "bert", "t5", "opt"):
        torch.manual_seed(len(name))
        family(name).save_pretrained(root / name, max_shard_size="20KB")
    torch.manual_seed(7)
    family("llama").save_pretrained(root / "llama-other")
    return root


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text("version: 1\nlayers:\n  - {select: all, experts: 3, top_k: 2}\n")
    return path


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare in this process."""
    monkeypatch.setattr(
        convert_check, "_ask", lambda question, shown: convert_check.answer(question)
    )


def layers(**rule: Any) -> dict[str, Any]:
    return {"layers": [{"select": "all", "experts": 4, **rule}]}


CASES: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "conv1d, copy, tied": ("gpt2", layers(top_k=2), None),
    "noise, one layer": (
        "gpt2",
        {"layers": [{"select": {"index": 1}, "experts": 3}], "init": {"experts": "noise"}},
        "float16",
    ),
    "pyramid, residual add, drop": (
        "llama",
        {**layers(experts={"from": 2, "to": 4}, residual="add"), "init": {"experts": "drop"}},
        "bfloat16",
    ),
    "tied, residual sigmoid, granular": (
        "llama-tied-eager-bfloat16",
        {
            **layers(top_k=2, residual="sigmoid"),
            "init": {"experts": "granular", "granularity": 2},
        },
        None,
    ),
    "residual coefficient, bias_update": (
        "bert",
        {**layers(residual="coefficient"), "router": {"bias_update": 0.01}},
        None,
    ),
    "random, zeros": (
        "opt",
        {**layers(), "init": {"experts": "random", "router": "zeros"}},
        "float64",
    ),
    "encoder and decoder, split by weights": (
        "t5",
        {**layers(top_k=4), "init": {"experts": "split", "router": "clusters"}},
        None,
    ),
    "models, average": (
        "llama",
        {**layers(experts=2), "init": {"experts": "models", "from": ["llama", "llama-other"]}},
        None,
    ),
    "models, keep": (
        "llama",
        {
            **layers(experts=2, residual="add"),
            "init": {"experts": "models", "from": ["llama", "llama-other"], "rest": "keep"},
        },
        None,
    ),
    "linear": (
        "llama",
        {"layers": [{"select": {"name": "lm_head"}, "experts": 2, "expert": "linear"}]},
        None,
    ),
}


@pytest.mark.parametrize(("name", "data", "dtype"), CASES.values(), ids=CASES)
def test_streamed_tensors_are_those_in_memory(name, data, dtype, folders, monkeypatch):
    monkeypatch.chdir(folders)  # for `from`
    plan = Plan.of({"version": 1, **data})
    dense, missing = load_dense(folders / name, dtype)
    assert not missing
    want = LiveTensors(mf.moeify(dense, plan, verify=False))
    _, got = stream(folders / name, plan, None if dtype is None else getattr(torch, dtype))
    assert dict(got.specs) == dict(want.specs)
    assert list(got.specs) == list(want.specs)
    assert got.aliases == want.aliases
    for key, spec in want.specs.items():
        assert torch.equal(got.read(key), want.read(key)), key
        if len(spec.shape) == 3:
            for row in range(spec.shape[0]):
                assert torch.equal(got.read(key, row, row + 1), want.read(key, row, row + 1)), key


def test_what_cannot_be_streamed_says_what_can(folders, plan, tmp_path):
    plan.write_text(plan.read_text() + "init: {router: hidden}\n")
    result = call(folders / "llama", tmp_path / "out", "--plan", plan)
    assert result.exit_code == 1
    assert "--in-memory" in result.stderr
    assert "--calibration" in result.stderr


def test_missing_parameters_are_not_drawn_silently(folders, plan, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((folders / "llama" / "config.json").read_bytes())
    found: dict[str, torch.Tensor] = {}
    for path in (folders / "llama").glob("*.safetensors"):
        found |= load_file(path)
    del found["lm_head.weight"]
    save_file(found, source / "model.safetensors", {"format": "pt"})
    result = call(source, tmp_path / "out", "--plan", plan)
    assert result.exit_code == 1
    assert "lack lm_head.weight" in result.stderr
    loaded = call(source, tmp_path / "out", "--plan", plan, "--in-memory", "--verify", 0)
    assert loaded.exit_code == 0, loaded.stderr
    assert "warning: the source lacks lm_head.weight" in loaded.stdout


def test_in_memory_with_calibration(folders, plan, tmp_path, inline):
    import tokenizers
    import transformers

    words = {f"w{i}": i for i in range(90)} | {"<unk>": 90}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    source, texts = tmp_path / "source", tmp_path / "texts.txt"
    source.mkdir()
    for path in (folders / "llama").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>").save_pretrained(
        source
    )
    texts.write_text("w1 w2 w3 w4\n\nw9 w8 w7\n")
    plan.write_text(plan.read_text() + "init: {router: hidden}\n")
    rest = ["--plan", plan, "--in-memory", "--export", "moeify", "--verify", 1]
    result = call(source, tmp_path / "out", *rest, "--calibration", texts)
    assert result.exit_code == 0, result.stderr
    assert "step 0: outputs differ by" in result.stdout
    assert (tmp_path / "out" / "tokenizer.json").exists()
    texts.write_text("\n\n")
    empty = call(source, tmp_path / "other", *rest, "--calibration", texts)
    assert "holds no text" in empty.stderr


def test_native_in_a_fresh_process(folders, plan, tmp_path):
    out = tmp_path / "out"
    result = call(folders / "llama", out, "--plan", plan, "--json", "--max-shard-size", "9KB")
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["kind"] == "native"
    assert report["verified"] is True
    assert 0 <= report["difference"] < 1e-5
    assert report["verification"]["inputs"] == 2
    assert report["peak_memory"] > 0
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    assert len(set(index["weight_map"].values())) > 3
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "AutoModelForCausalLM.from_pretrained" in card
    manifest = json.loads((out / "moeify.json").read_bytes())
    assert {"README.md", "config.json"} <= {record["file"] for record in manifest["files"]}
    assert manifest["source"]["folder"] == "llama"


@pytest.mark.parametrize("kind", ["custom", "moeify"])
def test_there_and_back(kind, folders, plan, tmp_path, inline):
    name = {"custom": "bert", "moeify": "opt"}[kind]
    plan.write_text("version: 1\nlayers:\n  - {select: all, experts: 3}\n")
    moe, dense = tmp_path / "moe", tmp_path / "dense"
    there = call(folders / name, moe, "--plan", plan, "--export", kind, "--json")
    assert there.exit_code == 0, there.stderr
    assert json.loads(there.stdout)["difference"] < 1e-5
    back = call(moe, dense, "--reverse", "--json")
    assert back.exit_code == 0, back.stderr
    assert json.loads(back.stdout)["kind"] == "dense"
    want, got = load_dense(folders / name)[0].state_dict(), load_dense(dense)[0].state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert call(dense, tmp_path / "again", "--reverse").exit_code == 1
    assert call(dense, tmp_path / "again", "--plan", plan, "--dry-run").exit_code == 0


def test_the_code_of_a_source_folder_is_not_run(folders, plan, tmp_path, monkeypatch):
    plan.write_text("version: 1\nlayers:\n  - {select: all, experts: 3}\n")
    moe, trace = tmp_path / "moe", tmp_path / "trace"
    assert call(folders / "bert", moe, "--plan", plan, "--export", "custom").exit_code == 0
    planted = f"open({str(trace)!r}, 'a').write(__name__)\n"
    for name in ("configuration_moeify", "modeling_moeify", "safetensors", "json", "moeify"):
        path = moe / f"{name}.py"
        path.write_text(planted + (path.read_text() if path.exists() else ""))
    config = json.loads((moe / "config.json").read_bytes())
    config["auto_map"] = {k: f"safetensors.{v}" for k, v in config["auto_map"].items()}
    (moe / "config.json").write_text(json.dumps(config))
    monkeypatch.chdir(moe)
    back = call(Path("."), tmp_path / "dense", "--reverse", "--json")
    assert back.exit_code == 0, back.stderr
    assert json.loads(back.stdout)["difference"] < 1e-5
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["os.path", "torch.nn.Linear", "transformers.models.bert.modeling_bert.torch", "a", ""]
)
def test_a_folder_names_only_models_of_transformers(name, folders, plan, tmp_path, inline):
    plan.write_text("version: 1\nlayers:\n  - {select: all, experts: 3}\n")
    moe = tmp_path / "moe"
    assert call(folders / "bert", moe, "--plan", plan, "--export", "custom").exit_code == 0
    manifest = json.loads((moe / "moeify.json").read_bytes())
    manifest.pop("sha256")
    manifest["details"]["class"] = name
    manifest["sha256"] = canonical_digest(manifest)
    (moe / "moeify.json").write_text(json.dumps(manifest))
    with pytest.raises(mf.CheckpointError, match=r"is not a (class of transformers|model)"):
        custom_class(moe)


def test_a_wrong_result_is_not_moved_into_place(folders, plan, tmp_path, inline, monkeypatch):
    out = tmp_path / "out"
    rest = ["--plan", plan, "--export", "moeify"]
    with monkeypatch.context() as patch:
        patch.setattr(convert_check, "difference_of", lambda dense, moe: 0.1)
        result = call(folders / "llama", out, *rest)
        assert result.exit_code == 1
        assert "outputs differ from the dense model's by 1.00e-01" in result.stderr
        assert not out.exists()
        text = plan.read_text()
        plan.write_text(text + "init: {experts: noise}\n")  # promises nothing
        told = call(folders / "llama", tmp_path / "noise", *rest)
        assert told.exit_code == 0, told.stderr
        assert "does not promise the same numbers" in told.stdout
    plan.write_text(text)
    resumed = call(folders / "llama", out, *rest, "--resume")
    assert resumed.exit_code == 0, resumed.stderr


def test_changed_weights_are_noticed(folders, plan, tmp_path, inline):
    for name in ("llama", "llama-other"):
        call(folders / name, tmp_path / name, "--plan", plan, "--verify", 0, "--export", "moeify")
    with pytest.raises(mf.VerificationError, match="promises the same"):
        convert_check.verify(
            folders / "llama",
            tmp_path / "llama-other",
            "moeify",
            inputs=2,
            promised=True,
            dtype=None,
            needed=0,
        )


def test_a_checking_process_that_dies(tmp_path, monkeypatch):
    script = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(script))
    for body, reason in (
        ("kill -9 $$", "killed by signal 9"),
        ("echo Traceback >&2; exit 1", "cannot be compared with its source: Traceback"),
        ('echo \'{"error": "missing keys"}\'', "missing keys"),
    ):
        script.write_text(f"#!/bin/sh\n{body}\n")
        script.chmod(0o755)
        with pytest.raises(mf.VerificationError, match=reason):
            convert_check._ask({}, tmp_path)


def test_too_little_memory_to_compare_is_reported(folders, plan, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_check, "available_memory", lambda: 1_000)
    result = call(folders / "llama", tmp_path / "out", "--plan", plan)
    assert result.exit_code == 0, result.stderr
    assert "NOT compared with the source: it needs" in result.stdout
    as_json = call(folders / "llama", tmp_path / "json", "--plan", plan, "--json")
    report = json.loads(as_json.stdout)
    assert report["verified"] is False
    assert "1,000 are free" in report["verification"]["reason"]


def test_a_class_that_trains_otherwise_is_a_warning(folders, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text("version: 1\nlayers:\n  - {select: all, experts: 2}\n")
    options = ("--plan", plan, "--verify", 0)
    text = call(folders / "llama", tmp_path / "text", *options).stdout
    warning = "warning: a MixtralForCausalLM trains otherwise than this model does: its routers"
    assert warning in " ".join(text.split())
    as_json = call(folders / "llama", tmp_path / "json", *options, "--json")
    (found,) = json.loads(as_json.stdout)["warnings"]
    assert 'export it as "custom"' in found
    assert found in (tmp_path / "json" / "README.md").read_text()
    custom = call(folders / "llama", tmp_path / "c", *options, "--export", "custom", "--json")
    assert json.loads(custom.stdout)["warnings"] == []


def test_random_inputs_differ_and_keep_special_tokens(folders):
    model, _ = load_dense(folders / "t5")
    inputs = convert_check.random_inputs(model, 3)
    assert not torch.equal(inputs[0]["input_ids"], inputs[1]["input_ids"])
    model, _ = load_dense(folders / "llama")
    lengths = {i["input_ids"].shape[1] for i in convert_check.random_inputs(model, 3)}
    assert len(lengths) > 1


def test_dry_run_writes_nothing(folders, plan, tmp_path, monkeypatch):
    out = tmp_path / "out"
    result = call(folders / "gpt2", out, "--plan", plan, "--dry-run", "--json")
    report = json.loads(result.stdout)
    assert report["dry_run"] is True
    assert report["kind"] == "custom"
    assert any(note.startswith("not native: ") for note in report["notes"])
    call(folders / "gpt2", out, "--plan", plan, "--verify", 0)
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert written <= report["bytes"] <= written + 50_000
    monkeypatch.setattr(convert, "free_bytes", lambda target: 10)
    full = call(folders / "gpt2", tmp_path / "other", "--plan", plan, "--dry-run")
    assert full.exit_code == 1
    assert "10 are free" in full.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plan.yaml"]


def test_a_source_that_changes_during_conversion(folders, plan, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for path in (folders / "bert").iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    real = convert.write_resumable

    def late(*args: Any, **options: Any) -> Any:
        for path in source.glob("*.safetensors"):
            os.utime(path, ns=(1, 1))
        return real(*args, **options)

    monkeypatch.setattr(convert, "write_resumable", late)
    result = call(source, tmp_path / "out", "--plan", plan)
    assert result.exit_code == 1
    assert "was changed while it was read" in result.stderr
    assert not (tmp_path / "out").exists()


HOSTILE = "a`b``c\n---\nlicense: stolen\n```\n# head | \"' <b>"


def test_hostile_names_stay_data(tmp_path):
    import yaml

    source = tmp_path / HOSTILE.replace("/", "")
    source.mkdir()
    (source / "README.md").write_text(
        '---\nlicense: "mit\\n---\\nevil: 1"\nlicense_name: "a\\": b"\nmodel_name: "x y"\n---\n'
    )
    text = model_card(
        kind="native",
        plan={"version": 1, "layers": [{"select": {"name": f"{HOSTILE}`````"}}]},
        layers=[
            (
                LayerDescription.model_construct(
                    name=HOSTILE, experts=2, top_k=1, residual="none", init=InitSpec()
                ),
                True,
            )
        ],
        source=source,
        sha256={HOSTILE: "0" * 64},
        total=2,
        active=1,
        auto="AutoModel",
        notes=[HOSTILE],
    ).decode()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "tags": ["moe", "moeify"],
        "license_name": 'a": b',
    }
    outside, fence = [], ""
    for line in body.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if not fence and len(ticks) >= 3:
            fence = ticks
        elif fence and line.strip("`") == "" and len(ticks) >= len(fence):
            fence = ""
        elif not fence:
            outside.append(line)
    assert fence == ""
    assert not any(line.startswith(("license", "---")) for line in outside)
    heads = [line for line in outside if line.startswith("#")]
    assert heads == ["# A Mixture-of-Experts model", "## Load", "## Layers", "## Plan", "## Notes"]


def test_tables_fit_a_terminal_of_80_columns(folders):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=80)
    resolved = Plan.of({"version": 1, **layers()}).resolve(load_dense(folders / "t5")[0])
    console.print(resolved)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 80
    assert any(line.rstrip().startswith(" encoder.block.0.layer.1.") for line in lines)
    assert any(line.strip() == "DenseReluDense" for line in lines)
    assert "before" in str(resolved)
    assert not any("before" in line for line in lines)


# -- memory


def measured(source: Path, out: Path) -> None:
    """Convert, and print the peak of memory before and after, in bytes."""
    import rich.console
    import transformers

    assert transformers.LlamaForCausalLM
    convert.give_memory_back()
    plan = Plan.of({"layers": [{"select": "all", "experts": 2}]})
    base = convert.peak_memory()
    options = convert.Options(verify=0, export="moeify")
    console = rich.console.Console(quiet=True)
    report = convert.convert(str(source), str(out), plan, console, options)
    sys.stdout.write(json.dumps({"base": base, "peak": report["peak_memory"]}))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's VmHWM")
def test_one_layer_is_in_memory_at_a_time(tmp_path, repo):
    import transformers

    source = tmp_path / "source"
    config = transformers.LlamaConfig(
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        hidden_size=1024,
        intermediate_size=2816,
        vocab_size=1000,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(source)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    zeros = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    save_file(zeros, source / "model.safetensors", {"format": "pt"})
    layer = 2 * sum(s.numel() for name, s in shapes.items() if name.startswith("model.layers.0."))
    weights = 2 * sum(shape.numel() for shape in shapes.values())
    del zeros
    env = os.environ | {"PYTHONPATH": str(repo), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    over = found["peak"] - found["base"]
    sys.stdout.write(f"\n{over / 1e6:.0f} MB over imports, layers of {layer / 1e6:.0f} MB, ")
    sys.stdout.write(f"{weights / 1e6:.0f} MB read\n")
    assert layer / 2 < over < 2 * layer + 150e6, (over, layer)
    assert over < weights, (over, weights)  # or this proves nothing


if __name__ == "__main__":
    measured(Path(sys.argv[1]), Path(sys.argv[2]))
