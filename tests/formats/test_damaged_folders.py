"""A folder that lacks a part of a converted model, or holds another one, is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import moeify as mf
from moeify.errors import CheckpointError
from moeify.formats.streaming_reverse import dense_files
from tests.zoo_models import ZOO

CAUSAL = transformers.AutoModelForCausalLM
BLOCK = "model.layers.0.mlp"
PLAN = {
    "layers": [{"select": "all", "experts": 4, "residual": "coefficient"}],
    "router": {"bias_update": 0.01},
}
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return mf.moeify(ZOO["llama"].build(), PLAN, verify=False)


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("folder") / "out"
    model.save_pretrained(place, export="custom")
    return place


def changed(folder: Path, place: Path, change: Callable[[Tensors], Any]) -> Path:
    """A copy of a folder with other tensors."""
    shutil.copytree(folder, place)
    tensors = load_file(place / "model.safetensors")
    change(tensors)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    return place


def load(folder: Path, **options: Any) -> Any:
    return CAUSAL.from_pretrained(folder, trust_remote_code=True, **options)


def test_every_tensor_of_a_block_is_needed(model, folder, tmp_path):
    names = [name for name in model.state_dict() if name.startswith(f"{BLOCK}.")]
    one_of_each = {name.split(".")[4]: name for name in names}
    assert one_of_each.keys() == {"experts", "router", "mlp", "residual_mix"}
    for number, name in enumerate(one_of_each.values()):
        broken = changed(folder, tmp_path / str(number), lambda t, name=name: t.pop(name))
        with pytest.raises(CheckpointError, match=rf"{name} is in none of the files"):
            load(broken)


def test_several_are_counted_and_named(folder, tmp_path):
    def drop(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith(("experts.down_proj", "router.weight"))]:
            del tensors[name]

    broken = changed(folder, tmp_path / "x", drop)
    with pytest.raises(CheckpointError, match=r"4 such tensors: .*router\.weight"):
        load(broken)


@pytest.mark.parametrize("ignore", [False, True])
def test_another_shape(folder, tmp_path, ignore):
    name = f"{BLOCK}.router.weight"
    broken = changed(folder, tmp_path / "x", lambda t: t.update({name: t[name][:3].clone()}))
    with pytest.raises(CheckpointError, match=r"router\.weight has the shape \[3, 32\] and not"):
        load(broken, ignore_mismatched_sizes=ignore)


def test_a_head_of_another_size_is_drawn_on_request_only(folder, tmp_path):
    broken = changed(
        folder, tmp_path / "x", lambda t: t.update({"lm_head.weight": torch.zeros(5, 32)})
    )
    with pytest.raises(CheckpointError, match="ignore_mismatched_sizes=True"):
        load(broken)
    assert load(broken, ignore_mismatched_sizes=True).lm_head.weight.any()


@pytest.mark.parametrize("name", ["experts.extra", "gate_proj.weight"])
def test_tensors_of_another_model(folder, tmp_path, name):
    extra = {f"{BLOCK}.{name}": torch.zeros(48, 32)}
    broken = changed(folder, tmp_path / "x", lambda t: t.update(extra))
    with pytest.raises(CheckpointError, match=f"{name} is not of this model's experts"):
        load(broken)


def test_what_is_outside_the_blocks_is_the_dense_classs_matter(folder, tmp_path):
    broken = changed(folder, tmp_path / "x", lambda t: t.pop("lm_head.weight"))
    again, info = load(broken, output_loading_info=True)
    assert info["missing_keys"] == {"lm_head.weight"}
    assert again.lm_head.weight.std() < 0.1


def test_an_index_without_a_file(model, tmp_path):
    out = tmp_path / "out"
    model.save_pretrained(out, export="custom", max_shard_size=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    lost = index["weight_map"][f"{BLOCK}.router.weight"]
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != lost}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"router\.weight"):
        load(out)
    (out / lost).unlink()
    with pytest.raises(CheckpointError, match=r"router\.weight"):
        load(out)


def test_the_way_back_reads_no_damaged_folder(folder, tmp_path):
    def drop(tensors: Tensors) -> None:
        del tensors[f"{BLOCK}.experts.down_proj"]

    with pytest.raises(CheckpointError, match=r"experts\.down_proj"):
        dense_files(changed(folder, tmp_path / "custom", drop))
    plan = {
        "layers": [{"select": "all", "experts": 4}],
        "router": {"combine": "normalized", "capacity_factor": None},
    }
    native = mf.moeify(ZOO["llama"].build(), plan, verify=False)
    native.save_pretrained(tmp_path / "native", export="native")

    def drop_expert(tensors: Tensors) -> None:
        del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]

    with pytest.raises(CheckpointError, match=r"experts\.1\.w2"):
        dense_files(changed(tmp_path / "native", tmp_path / "broken", drop_expert))
