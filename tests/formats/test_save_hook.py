"""Every public function attaches the save hook, `demoeify` removes it, and nothing else does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import moeify as mf
from moeify.convert.convert_model import convert
from moeify.convert.revert import revert
from moeify.errors import CheckpointError
from moeify.formats.save_hook import SavePretrained, refuse_other_names
from tests.zoo_models import ZOO

PLAN = {"layers": [{"select": "all", "experts": 2}]}


def guarded(model: nn.Module) -> tuple[bool, int]:
    """Whether the model saves itself by the hook, and how many load hooks it has."""
    hooks = [getattr(hook, "hook", hook) for hook in model._load_state_dict_pre_hooks.values()]
    saver = model.__dict__.get("save_pretrained")
    own = isinstance(saver, SavePretrained) and saver.model is model
    return own, hooks.count(refuse_other_names)


@pytest.fixture(scope="module")
def model() -> Any:
    return mf.moeify(ZOO["llama"].build(), PLAN, verify=False)


def test_moeify_and_copies(model):
    assert guarded(model) == (True, 1)
    assert guarded(copy.deepcopy(model)) == (True, 1)


def test_load(model, tmp_path: Path):
    mf.save(model, tmp_path / "saved")
    assert guarded(mf.load(tmp_path / "saved")) == (True, 1)
    given = ZOO["llama"].build()
    assert guarded(mf.load(tmp_path / "saved", model=given)) == (True, 1)
    (tmp_path / "saved" / "moeify.json").unlink()
    dense = ZOO["llama"].build()
    with pytest.raises(CheckpointError):
        mf.load(tmp_path / "saved", model=dense)
    assert guarded(dense) == (False, 0)


def test_from_pretrained(model, tmp_path: Path):
    model.save_pretrained(tmp_path / "out", export="custom")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    assert guarded(loaded) == (True, 1)
    dense = mf.demoeify(loaded)
    assert guarded(dense) == (False, 0)
    assert type(dense) is transformers.LlamaForCausalLM
    assert type(dense.config) is transformers.LlamaConfig


def test_student(model):
    small = copy.deepcopy(model)
    assert guarded(mf.drop_layers(small, {"keep": [0]})) == (True, 1)


def test_demoeify(model):
    dense = mf.demoeify(copy.deepcopy(model))
    assert guarded(dense) == (False, 0)
    assert "save_pretrained" not in dense.__dict__


def test_a_model_without_save_pretrained_gets_no_hook():
    mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    plain = mf.moeify(nn.Sequential(mlp), PLAN, example_inputs=torch.randn(4, 8))
    assert guarded(plain) == (False, 0)


def test_neither_convert_nor_revert_touches_it(model):
    dense = ZOO["llama"].build()
    convert(dense, PLAN, verify=False)
    assert guarded(dense) == (False, 0)
    reverted = copy.deepcopy(model)
    revert(reverted)
    assert guarded(reverted) == (True, 1)
