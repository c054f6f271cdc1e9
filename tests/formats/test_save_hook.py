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
from moeify.sites.record import conversion_of
from tests.zoo_models import ZOO, ids

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


def inside(model: nn.Module) -> list[nn.Module]:
    """The parts of a model that transformers can save on their own."""
    return [m for m in model.modules() if m is not model and hasattr(m, "save_pretrained")]


def test_a_part_of_a_converted_model_is_not_saved_alone(model, tmp_path: Path):
    """The class's own save_pretrained writes a folder that AutoModel loads with random MLPs."""
    model.save_pretrained(tmp_path / "out", export="custom")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    copied = copy.deepcopy(model.base_model)
    for part in (model.base_model, model.model, copied, loaded.base_model):
        with pytest.raises(
            CheckpointError, match="model: this LlamaModel is a part of a converted"
        ):
            part.save_pretrained(tmp_path / "part")
    assert not (tmp_path / "part").exists()
    dense = mf.demoeify(copy.deepcopy(model))
    assert not any("save_pretrained" in part.__dict__ for part in inside(dense))
    dense.base_model.save_pretrained(tmp_path / "part")
    again = transformers.AutoModel.from_pretrained(tmp_path / "part")
    assert torch.equal(again(ids())[0], dense.eval().base_model(ids())[0])


@pytest.mark.parametrize("name", ["whisper", "clip"])
def test_every_part_that_holds_a_block_refuses_and_no_other(name, tmp_path: Path):
    plan = {"layers": [{"select": {"first": 1}, "experts": 2}]}
    model = mf.moeify(ZOO[name].build(), plan, verify=False)
    blocks = [layer.block for layer in conversion_of(model).layers]
    parts = {m: path for path, m in model.named_modules() if m in set(inside(model))}
    refusing = 0
    for number, (part, path) in enumerate(parts.items()):
        if any(block.startswith(f"{path}.") for block in blocks):
            refusing += 1
            with pytest.raises(CheckpointError, match=path):
                part.save_pretrained(tmp_path / str(number))
        else:
            part.save_pretrained(tmp_path / str(number))
    assert 0 < refusing < len(parts)


def test_a_part_refuses_dense_weights_too(model):
    part = copy.deepcopy(model.base_model)
    dense = ZOO["llama"].build().base_model.state_dict()
    with pytest.raises(CheckpointError, match="of a dense model"):
        part.load_state_dict(dense, strict=False)
    part.load_state_dict(part.state_dict())
    back = mf.demoeify(copy.deepcopy(model)).base_model
    assert not back._load_state_dict_pre_hooks
    back.load_state_dict(dense)


def test_inside_a_module_of_the_users_own(tmp_path: Path):
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llm = ZOO["llama"].build()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.llm(input_ids=x).logits

    wrapper = mf.moeify(Wrapper(), PLAN, example_inputs=ids(), verify=False)
    with pytest.raises(CheckpointError, match=r"llm: this LlamaForCausalLM .* moeify\.save"):
        wrapper.llm.save_pretrained(tmp_path)
    other = Wrapper()
    mf.moeify(other.llm, PLAN, verify=False)
    other.llm.save_pretrained(tmp_path / "out", export="custom")
    assert (tmp_path / "out" / "moeify.json").is_file()
