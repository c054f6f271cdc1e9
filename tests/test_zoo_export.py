"""The zoo through `save_pretrained`: loaded in one fresh process, with equal logits."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moeify as mf
from moeify.formats.choose import choose_format
from moeify.hf.detect import example_inputs_for
from moeify.storage.tensor_source import LiveTensors
from tests.zoo_models import ZOO

ROUTER = {"combine": "normalized"}
PLAN = {"layers": [{"select": "all", "experts": 4, "top_k": 2, "router": ROUTER}]}
# The causal and masked language models, which come first, and some of the others.
NAMES = [*list(ZOO)[: list(ZOO).index("t5")], "t5", "bart", "whisper", "clip", "vit"]
# One of each family of classes: without --slow, the others are neither written nor read.
ALIKE = {"mistral", "qwen2", "gemma2", "phi", "olmo2", "gptj", "roberta", "distilbert", "bart"}

LOAD = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file, save_file

made = {}
folders = {f: json.loads((f / "config.json").read_text()) for f in Path(sys.argv[1]).iterdir()}
for folder in sorted(folders, key=lambda f: "auto_map" in folders[f]):  # the native ones first
    config, auto = folders[folder], "AutoModelForCausalLM"
    custom = "auto_map" in config
    if custom:
        auto = next(name for name in config["auto_map"] if name != "AutoConfig")
    else:
        assert "moeify" not in sys.modules
    model, info = getattr(transformers, auto).from_pretrained(
        folder, trust_remote_code=custom, output_loading_info=True
    )
    assert not any(info.values()), (folder.name, info)
    inputs = load_file(Path(sys.argv[2]) / folder.name)
    with torch.no_grad():
        output = model(**inputs, return_dict=True)
    name = next(key for key in output if key.startswith("logits"))
    made[folder.name] = output[name].contiguous()
save_file(made, sys.argv[3])
"""


@dataclass
class Exported:
    """A model in its folder.

    Attributes:
        sites: MLPs converted.
        kind: What it was exported as.
        why: Why it is nothing better.
        wanted: Its logits.
    """

    sites: int
    kind: str
    why: str
    wanted: Tensor


@pytest.fixture(scope="module")
def exported(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> tuple[dict[str, Exported], dict[str, Any]]:
    root = tmp_path_factory.mktemp("exports")
    (root / "inputs").mkdir()
    found = {}
    for name in NAMES:
        if name in ALIKE and not pytestconfig.getoption("--slow"):
            continue
        torch.manual_seed(0)
        model = mf.moeify(ZOO[name].build(), PLAN, verify=False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        inputs = {k: v for k, v in example_inputs_for(model).items() if isinstance(v, Tensor)}
        folder = name.replace(" ", "-")
        save_file(inputs, root / "inputs" / folder)
        with torch.no_grad():
            output = model.eval()(**inputs, return_dict=True)
        model_files = choose_format(model, LiveTensors(model))
        found[name] = Exported(
            sites=ZOO[name].sites,
            kind=model_files.kind,
            why=next((n for n in model_files.notes if n.startswith("not ")), ""),
            wanted=output[next(key for key in output if key.startswith("logits"))],
        )
        model.save_pretrained(root / "models" / folder)
    command = [sys.executable, "-c", LOAD]
    command += [str(root / part) for part in ("models", "inputs", "logits.safetensors")]
    env = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return found, load_file(root / "logits.safetensors")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in ALIKE else n for n in NAMES]
)
def test_zoo_export(
    name: str, exported: tuple[dict[str, Exported], Any], export_row: Callable[..., None]
) -> None:
    models, logits = exported
    model, got = models[name], logits[name.replace(" ", "-")]
    gap = float((got - model.wanted).abs().max())
    why = textwrap.shorten(model.why, 90, placeholder=" ...")
    export_row(model=name, layers=model.sites, kind=model.kind, difference=gap, why=why)
    assert got.shape == model.wanted.shape
    assert gap <= 1e-5
