"""`moeify report` and `RunLog`: what the page says, what it must not contain, what is refused."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import moeify as mf
from moeify.cli.main import app
from moeify.errors import MoeifyError
from moeify.reporting.run import read_run

HOSTILE = "</title><script>alert(1)</script><img src=x onerror='a'>\" onload=b \u202e\x07"
PLAN = {
    "layers": [
        {"select": {"first": 1}, "experts": 4, "top_k": 2},
        {"select": {"last": 1}, "experts": 8, "residual": "coefficient"},
    ],
}
ALLOWED = (
    "html head meta title style body a header h1 h2 h3 p nav ul li main div strong section dl dt "
    "dd small figure figcaption b span svg rect path g text polyline polygon circle table caption "
    "thead tbody tr th td details summary pre code footer"
).split()
VOID = {"meta"}


class Page(HTMLParser):
    """What a browser would make of a page: tags balanced, and nothing that runs or loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)
        self.close()
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def sound(path: Path) -> Page:
    page = Page(path)
    assert page.open == []
    assert set(page.tags) <= set(ALLOWED), set(page.tags) - set(ALLOWED)
    names = {value for _, name, value in page.attributes if name == "id"}
    for tag, name, value in page.attributes:
        assert not name.startswith("on"), (tag, name)
        assert name not in ("src", "style", "srcset", "xlink:href", "action"), (tag, name)
        assert name != "href" or (value.startswith("#") and value[1:] in names), value
        assert tag != "svg" or name != "role" or value == "img"
    style = page.source.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page.source
    assert not any(ord(c) < 32 and c not in "\n\t" for c in page.source)
    assert "\u202e" not in page.source
    return page


def blocks(count: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(count)]
    return nn.Sequential(*parts)


@pytest.fixture(scope="module")
def model() -> nn.Sequential:
    return mf.moeify(blocks(), PLAN, example_inputs=torch.randn(4, 8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same model dense and in every kind of folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("folders")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "vocab_size": 99, "num_hidden_layers": 3}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    found = {kind: root / kind for kind in ("dense", "moeify", "custom", "native")}
    dense.save_pretrained(found["dense"])
    plan = {"layers": [{"select": {"every": 2}, "experts": 4, "top_k": 2}]}
    (root / "plan.json").write_text(json.dumps({"version": 1, **plan}))
    partly = mf.moeify(dense, plan, verify=False)
    mf.save(partly, found["moeify"])
    partly.save_pretrained(found["custom"], export="custom")
    mf.demoeify(partly)
    whole = mf.moeify(dense, {"layers": [{"select": "all", "experts": 4, "top_k": 2}]})
    whole.save_pretrained(found["native"], export="native")
    return found | {"plan": root / "plan.json"}


def call(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["report", *map(str, arguments)], prog_name="moeify")


def test_page_of_a_model(model, tmp_path):
    """Layers, totals, plan, passes; the model and its weights are as they were."""
    before = {name: (id(p), p._version) for name, p in model.named_parameters()}
    log = mf.RunLog(tmp_path / "run.jsonl")
    model.train()
    for step in (0, 5, 10):
        model(torch.randn(32, 8))
        log.write(step, model, loss=math.nan if step == 5 else 2.0 - step / 10)
    page = sound(mf.report(model, tmp_path / "a.html", tmp_path / "run.jsonl"))
    total = sum(p.numel() for p in model.parameters())
    dense = sum(p.numel() for p in blocks().parameters())
    one = 8 * 16 + 16 + 16 * 8 + 8
    active = dense + one + 4 * 8 + one + 8 * 8 + 18
    for number in (total, dense, active):
        assert f"{number:,}" in page.text
    assert "2 MoE layers of 4 to 8 experts, 2 other MLPs in place" in page.text
    assert "not finite: 1 of 3" in page.text
    assert "steps, 0 to 10" in page.text
    assert "Not on this page" not in page.text
    assert page.text.count("Diff of") >= 1
    assert "+ " in page.text
    labels = [v for tag, name, v in page.attributes if tag == "svg" and name == "aria-label"]
    pictured = [v for tag, name, v in page.attributes if tag == "svg" and name == "role"]
    assert len(labels) == len(pictured) > 5
    assert {name: (id(p), p._version) for name, p in model.named_parameters()} == before


def test_nothing_hostile_gets_through(model, tmp_path):
    """Names of layers, numbers, classes and folders are text, wherever they come from."""
    layers = {HOSTILE: {"counts": [1, 2], "entropy": 0.1, "dropped": 0.0, "tokens": 3}}
    log = mf.RunLog(tmp_path / "x<b>&'.jsonl")
    log.write(1, layers=layers, **{HOSTILE: 1.0, "loss": 1.0})
    sound(mf.report(None, tmp_path / "a.html", log.path))
    header = {"format": "moeify-run", "version": 2, "class": HOSTILE, "plan": {HOSTILE: HOSTILE}}
    layer = next(iter(model._moeify_conversion.layers)).layer.to_dict()
    line = json.dumps(header | {"layers": [layer | {"name": HOSTILE, "residual": HOSTILE}]})
    log.path.write_text(
        line + "\n" + log.path.read_text().replace('"counts": [1, 2]', '"counts": [1, 2, 0, 0]')
    )
    page = sound(mf.report(None, tmp_path / "b.html", log.path))
    assert "alert(1)" in page.text
    assert r"\u202e" in page.text
    named = nn.Sequential()
    named.add_module("<img onerror=x>", blocks(1)[0])
    page = sound(
        mf.report(
            named,
            tmp_path / "c.html",
            plan={"layers": [{"select": "all", "experts": 2}]},
            example_inputs=torch.randn(2, 8),
        )
    )
    assert "<img onerror=x>" in page.text


def test_missing_parts_are_named(model, tmp_path):
    page = sound(mf.report(model, tmp_path / "a.html"))
    assert "training: no run was given" in page.text
    mf.RunLog(tmp_path / "run.jsonl").write(0, loss=1.0)
    page = sound(mf.report(None, tmp_path / "b.html", tmp_path / "run.jsonl"))
    for part in ("layers, totals and graphs", "the plan", "nothing about routers"):
        assert part in page.text
    mf.save(model, tmp_path / "saved")  # no class of transformers: cannot be built from its name
    page = sound(mf.report(tmp_path / "saved", tmp_path / "c.html"))
    assert "the dense model cannot be built" in page.text
    assert f"{sum(p.numel() for p in model.parameters()):,}" in page.text
    mf.RunLog(tmp_path / "other.jsonl").write(
        0, layers={"elsewhere": {"counts": [1], "entropy": 0.0, "dropped": 0.0, "tokens": 1}}
    )
    page = sound(mf.report(model, tmp_path / "d.html", tmp_path / "other.jsonl"))
    assert "Is it another model's run?" in page.text


def test_folders(folders, tmp_path):
    """Every kind of folder gives the whole page; a dense one needs a plan."""
    out = tmp_path / "a.html"
    for kind in ("moeify", "custom", "native"):
        done = call(folders[kind], "--out", out, "--json")
        assert done.exit_code == 0, done.output
        assert json.loads(done.output)["missing"] == []
        assert f"kind `{kind}`" in sound(out).text
    done = call(folders["dense"], "--plan", folders["plan"], "--out", out)
    assert done.exit_code == 0, done.output
    assert "2 MoE layers of 4 experts, 1 other MLPs in place" in sound(out).text
    for arguments, message in (
        ([folders["dense"]], "--plan"),
        ([folders["native"], "--plan", folders["plan"]], "converted already"),
        ([tmp_path / "nowhere"], "no such folder or file"),
        ([tmp_path], "config.json"),
    ):
        done = call(*arguments, "--out", out)
        assert (done.exit_code, message in done.output) == (1, True), done.output
    assert call(folders["native"], "--out", tmp_path).exit_code == 1
    assert call(folders["native"], "--out", tmp_path / "no" / "a.html").exit_code == 1


def test_trainer(folders, tmp_path):
    """The callback's log has every expert; a trainer's state has the fullest, and is found."""
    from transformers import LlamaForCausalLM, Trainer, TrainingArguments

    model = LlamaForCausalLM.from_pretrained(folders["dense"])
    mf.moeify(model, folders["plan"], verify=False)
    rows = [{"input_ids": r, "labels": r} for r in torch.randint(3, 98, (8, 6))]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    callback = mf.RouterCallback(run_log=tmp_path / "run.jsonl")
    Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[callback]).train()
    run = read_run(tmp_path / "run.jsonl")
    assert [step for step, _ in run.numbers["loss"]] == [1, 2]
    assert [step for step, _ in run.numbers["eval_loss"]] == [1, 2]
    assert len(run.counts) == 2
    assert all(sum(c) == 4 * 6 * 2 for row in run.counts.values() for _, c in row)
    page = sound(mf.report(tmp_path / "run" / "checkpoint-2", tmp_path / "a.html"))
    assert "RouterCallback(run_log=...)" in page.text
    assert "Not on this page" not in page.text


def test_run_log_continues(model, tmp_path):
    path = tmp_path / "run.jsonl"
    log = mf.RunLog(path)
    log.write(0, model, loss=torch.tensor(1.5))
    log.write(3, model, loss=1.0)
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')  # the process was ended here
    assert "no end" in read_run(path).notes[0]
    again = mf.RunLog(path)
    again.write(2, model, loss=math.inf)
    again.write(2, eval_loss=7.0)
    run = read_run(path)
    assert run.numbers == {"loss": [(0, 1.5), (2, math.inf)], "eval_loss": [(2, 7.0)]}
    assert "went back" in run.notes[0]
    assert path.read_text().count("moeify-run") == 1
    other = mf.moeify(
        blocks(), {"layers": [{"select": "all", "experts": 2}]}, example_inputs=torch.randn(4, 8)
    )
    with pytest.raises(MoeifyError, match="another model or plan"):
        mf.RunLog(path).write(5, other)
    for wrong in ({"format": 1}, {"version": 1.0}):
        with pytest.raises(ValueError):
            log.write(5, **wrong)
    (tmp_path / "notes.txt").write_text("dear diary\n")
    with pytest.raises(MoeifyError, match="not a log"):
        mf.RunLog(tmp_path / "notes.txt").write(0, loss=1.0)
    assert (tmp_path / "notes.txt").read_text() == "dear diary\n"


@pytest.mark.parametrize(
    "text",
    [
        "[1]\n",
        "nonsense\n",
        "[" * 5000 + "\n",
        '{"step": -1}\n',
        '{"step": true}\n',
        '{"loss": 1}\n',
        '{"step": 1, "loss": 1' + "0" * 400 + "}\n",
        '{"step": 1, "layers": []}\n',
        '{"step": 1, "layers": {"a": {"counts": [-1]}}}\n',
        '{"step": 1, "layers": {"a": {"counts": ["nan"]}}}\n',
        '{"step": 1, "layers": {"a": {"counts": []}}}\n',
        '{"step": 1, "layers": {"a": {"counts": [1]}}}\n'
        '{"step": 2, "layers": {"a": {"counts": [1, 2]}}}\n',
        '{"format": "moeify-run", "version": 1}\n',
        '{"format": "moeify-run", "version": 2, "class": "A", "plan": null, "layers": [1]}\n',
        '{"format": "other"}\n',
    ],
)
def test_damaged_runs_are_refused(text, tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text(text)
    with pytest.raises(MoeifyError, match=r"run\.jsonl"):
        mf.report(None, tmp_path / "a.html", path)
    assert not (tmp_path / "a.html").exists()


def test_pages_stay_small(tmp_path):
    """32 layers of 64 experts, a thousand logs, and names of many letters."""
    layers = []
    base = mf.moeify(
        blocks(1), {"layers": [{"select": "all", "experts": 64}]}, example_inputs=torch.randn(4, 8)
    )
    layer = base._moeify_conversion.layers[0].layer.to_dict()
    layers = [layer | {"name": f"model.layers.{i}.{'long' * 50}"} for i in range(32)]
    head = {"format": "moeify-run", "version": 2, "class": "Big", "plan": {"x": "y" * 10**6}}
    draw = torch.Generator().manual_seed(0)
    lines = [json.dumps(head | {"layers": layers})]
    for step in range(300):
        counts = torch.randint(0, 999, (32, 64), generator=draw).tolist()
        rows = {
            layer["name"]: {"counts": c, "entropy": 1.0, "dropped": 0.1}
            for layer, c in zip(layers, counts, strict=True)
        }
        lines.append(json.dumps({"step": step, "layers": rows} | {f"n{i}": 1.0 for i in range(99)}))
    (tmp_path / "run.jsonl").write_text("\n".join(lines) + "\n")
    page = sound(mf.report(None, tmp_path / "a.html", tmp_path / "run.jsonl"))
    assert len(page.source.encode()) < 2_000_000
    assert "columns, summed" in page.text
    assert "Only 24 of 99" in page.text
