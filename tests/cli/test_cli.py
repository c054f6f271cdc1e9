"""The command line: what each command prints, exit codes, and what it must not import."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

import moeify as mf
from moeify.cli.main import app

PLAN = "version: 1\nlayers:\n  - {select: {every: 2, start: 1}, experts: 4}\n"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], prog_name="moeify")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random GPT-2 with something that looks like a tokenizer."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=4,
        n_embd=32,
        n_head=4,
        vocab_size=99,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN)
    return path


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["--version"], ["plan", "check", "plan.yaml"], ["plan", "show", "pr-moe"]],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(arguments, plan, repo):
    heavy = ["torch", "networkx", "transformers", "numpy", "safetensors"]
    code = (
        "import sys; from moeify.cli.main import main\n"
        "try: main()\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        f"found = [name for name in {heavy} if name in sys.modules]; sys.exit(' '.join(found) or 0)"
    )
    env = {**os.environ, "PYTHONPATH": str(repo)}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=plan.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command():
    text = call("--help").output
    for name in ("inspect", "plan", "convert", "simulate", "demo", "--debug", "--version"):
        assert name in text


def test_version():
    assert call("--version").output == f"moeify {mf.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["plan", "show"], ["convert", "a"], ["demo", "--steps", "-1"]],
    ids=" ".join,
)
def test_wrong_command_lines_exit_with_2(arguments):
    result = call(*arguments)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_plan_check(plan):
    result = call("plan", "check", plan)
    assert result.exit_code == 0
    assert f"{plan}: ok, 1 rule, digest" in result.output


def test_plan_check_reports_file_line_and_place(plan):
    plan.write_text(PLAN.replace("experts: 4", "expertz: 4"))
    result = call("plan", "check", plan)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert f"{plan}:3: layers[0].expertz: unknown key" in result.stderr


def test_plan_check_json_continues_after_a_bad_file(plan, tmp_path):
    result = call("plan", "check", tmp_path / "no.yaml", plan, "--json")
    bad, good = json.loads(result.stdout)
    assert (result.exit_code, bad["ok"], good["ok"]) == (1, False, True)
    assert good["digest"] == mf.Plan.load(plan).digest()


def test_plan_show_prints_a_plan(tmp_path):
    result = call("plan", "show", "pr-moe", "--set", "experts=16", "--set", "capacity_factor=null")
    shown = mf.Plan.loads(result.stdout)
    assert shown == mf.Plan.preset("pr-moe", experts=16, capacity_factor=None)
    as_json = call("plan", "show", "pr-moe", "--set", "experts=16", "--json")
    assert json.loads(as_json.stdout)["layers"][0]["experts"] == 16


def test_plan_show_on_a_model(gpt2, plan):
    result = call("plan", "show", plan, "--model", gpt2)
    assert result.exit_code == 0, result.stderr
    assert "transformer.h.1.mlp" in result.stdout
    assert "stay dense (2)" in result.stdout
    data = json.loads(call("plan", "show", plan, "--model", gpt2, "--json").stdout)
    assert [layer["experts"] for layer in data["layers"]] == [4, 4]


@pytest.mark.parametrize(
    ("settings", "code"),
    [(["experts"], 2), (["expert=4"], 1), (["experts=four"], 1)],
    ids=["no value", "unknown option", "wrong type"],
)
def test_plan_set_is_checked(settings, code):
    arguments = [word for setting in settings for word in ("--set", setting)]
    assert call("plan", "show", "pr-moe", *arguments).exit_code == code


def test_set_needs_a_preset(plan):
    assert call("plan", "show", plan, "--set", "experts=4").exit_code == 2


def test_plan_schema():
    assert json.loads(call("plan", "schema").stdout) == mf.Plan.json_schema()


def test_inspect(gpt2):
    result = call("inspect", gpt2)
    assert result.exit_code == 0, result.stderr
    for text in ("transformer.h.3.mlp", "32->128->32", "gelu_tanh", "4 MLPs can become MoE layers"):
        assert text in result.stdout


def test_inspect_json(gpt2):
    data = json.loads(call("inspect", gpt2, "--json").stdout)
    assert data["class"] == "GPT2LMHeadModel"
    assert [site["name"] for site in data["sites"]] == [f"transformer.h.{i}.mlp" for i in range(4)]
    assert {site["install"] for site in data["sites"]} == {"module"}


def test_inspect_reads_no_weights(gpt2, tmp_path):
    (tmp_path / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    assert call("inspect", tmp_path).exit_code == 0


def test_inspect_reports_near_misses(tmp_path):
    import transformers

    transformers.BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=99,
        architectures=["BertForMaskedLM"],
    ).save_pretrained(tmp_path)
    result = call("inspect", tmp_path)
    assert "near miss: " in result.stdout
    assert "is not its input width 32" in result.stdout


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_folders_that_are_not_models(command, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    rest = [tmp_path / "out", "--plan", "moe"] if command == "convert" else []
    missing = call(command, tmp_path / "nowhere", *rest)
    empty = call(command, folder, *rest)
    (folder / "config.json").write_text("{}")
    strange = call(command, folder, *rest)
    for result, text in ((missing, "no such folder"), (empty, "no config.json"), (strange, "")):
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert text in result.stderr
        assert "Traceback" not in result.stderr


def test_debug_shows_the_traceback(tmp_path):
    result = call("--debug", "inspect", tmp_path / "nowhere")
    assert result.exit_code == 1
    assert isinstance(result.exception, mf.MoeifyError)


def test_convert(gpt2, plan, tmp_path):
    out = tmp_path / "moe"
    result = call("convert", gpt2, out, "--plan", plan, "--export", "moeify")
    assert result.exit_code == 0, result.stderr
    for text in ("transformer.h.1.mlp", "step 0: outputs differ by", "fresh process", str(out)):
        assert text in result.stdout
    assert (out / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert (out / "merges.txt").exists()
    _assert_equal_to_dense(gpt2, out)

    shown = call("inspect", out)
    assert "converted by moeify: 2 MoE layers" in shown.stdout
    data = json.loads(call("inspect", out, "--json").stdout)
    assert [layer["experts"] for layer in data["layers"]] == [4, 4]
    again = call("convert", out, tmp_path / "twice", "--plan", plan)
    assert again.exit_code == 1
    assert "is already converted" in again.stderr
    assert call("plan", "show", plan, "--model", out).exit_code == 1


def _assert_equal_to_dense(source: Path, out: Path) -> None:
    import transformers

    dense = transformers.GPT2LMHeadModel.from_pretrained(source).eval()
    moe = mf.load(out).eval()
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=1e-5, atol=1e-5)


def test_convert_json_dtype_and_no_verify(gpt2, tmp_path):
    out = tmp_path / "moe"
    arguments = ["--plan", "pr-moe", "--set", "experts=2", "--set", "last=4", "--verify", "0"]
    arguments += ["--export", "moeify", "--dtype", "bfloat16", "--json"]
    report = json.loads(call("convert", gpt2, out, *arguments).stdout)
    assert report["verified"] is False
    assert report["difference"] is None
    assert report["kind"] == "moeify"
    assert report["bytes"] == sum(path.stat().st_size for path in out.rglob("*"))
    assert report["resolved"]["layers"][0]["dtype"] == "bfloat16"
    assert next(mf.load(out).parameters()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--plan", "moe", "--reverse"],
        ["--reverse", "--dtype", "bfloat16"],
        ["--plan", "moe", "--calibration", "texts"],
        ["--plan", "moe", "--max-shard-size", "much"],
        ["--plan", "moe", "--verify", "-1"],
        ["--plan", "moe", "--export", "onnx"],
    ],
    ids=" ".join,
)
def test_convert_with_contradictory_options(arguments, gpt2, tmp_path):
    result = call("convert", gpt2, tmp_path / "out", *arguments)
    assert result.exit_code == 2, result.output
    assert list(tmp_path.iterdir()) == []


def test_convert_does_not_overwrite(gpt2, plan, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for extra in ([], ["--force"], ["--dry-run"], ["--resume"]):
        result = call("convert", gpt2, out, "--plan", plan, *extra)
        assert result.exit_code == 1
        assert "was not written by moeify" in result.stderr
    assert [path.name for path in out.iterdir()] == ["precious.txt"]


def test_convert_refuses_unsuitable_targets(gpt2, plan, tmp_path):
    source = tmp_path / "models" / "source"
    shutil.copytree(gpt2, source)
    (tmp_path / "link").symlink_to(source)
    (tmp_path / "file").write_text("")
    before = {path: path.read_bytes() for path in source.iterdir()}
    for out, reason in (
        (source, "is the source itself"),
        (tmp_path / "link", "is the source itself"),
        (source / "out", "is inside the source"),
        (source.parent, "contains the source"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "out", "is not a folder"),
        (tmp_path / "no" / "out", "is not a folder; create it first"),
    ):
        result = call("convert", source, out, "--plan", plan, "--force")
        assert result.exit_code == 1
        assert reason in result.stderr
    assert {path: path.read_bytes() for path in source.iterdir()} == before


def test_convert_replaces_a_folder_with_force(gpt2, plan, tmp_path):
    out = tmp_path / "moe"
    rest = ["--verify", "0", "--export", "moeify"]
    out.mkdir()  # an empty folder is as good as none
    assert call("convert", gpt2, out, "--plan", plan, *rest).exit_code == 0
    refused = call("convert", gpt2, out, "--plan", "mixtral", *rest)
    assert refused.exit_code == 1
    assert "--force" in refused.stderr
    forced = call("convert", gpt2, out, "--plan", "mixtral", "--set", "experts=2", "--force", *rest)
    assert forced.exit_code == 0, forced.stderr
    assert "converted by moeify: 4 MoE layers" in call("inspect", out).stdout
    assert [path.name for path in tmp_path.iterdir() if path != plan] == ["moe"]


def test_convert_never_reads_pickles(gpt2, plan, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    torch.save({}, source / "pytorch_model.bin")
    result = call("convert", source, tmp_path / "out", "--plan", plan)
    assert result.exit_code == 1
    assert "never opened" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "missing.safetensors", 3])
def test_convert_does_not_follow_an_index_elsewhere(name, gpt2, plan, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    index = source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"transformer.wte.weight": name}}))
    result = call("convert", source, tmp_path / "out", "--plan", plan)
    assert result.exit_code == 1
    assert not (tmp_path / "out").exists()


def test_convert_with_a_damaged_source(gpt2, plan, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_bytes((gpt2 / "config.json").read_bytes())
    whole = (gpt2 / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    result = call("convert", source, tmp_path / "out", "--plan", plan)
    assert result.exit_code == 1
    assert "model.safetensors" in result.stderr
    assert not (tmp_path / "out").exists()


def test_convert_with_a_plan_that_does_not_fit(gpt2, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text(PLAN.replace("{every: 2, start: 1}", "{index: 9}"))
    result = call("convert", gpt2, tmp_path / "out", "--plan", bad)
    assert result.exit_code == 1
    assert "there is no site 9" in result.stderr
    assert not (tmp_path / "out").exists()
