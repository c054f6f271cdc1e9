"""Experts from several checkpoints: the source of each, what is averaged, what is refused."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import moeify as mf
from moeify.convert.pipeline import prepare
from moeify.errors import CheckpointError, MoeifyError, PlanError
from moeify.init.from_checkpoints import averaged, sources_for
from moeify.init.weights import expert_weights
from moeify.plan.plan import Plan
from moeify.sites.discovery import find_site

COUNT = 3
EMBEDDING = "model.embed_tokens.weight"


def llama(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models():
    return [llama(seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def place(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for number, model in enumerate(models):
        model.save_pretrained(folder / f"tuned-{number}")
    return folder


def plan_in(place, name="plan.yaml", experts=COUNT, rest="average", residual="none"):
    init = {"experts": "models", "from": [f"tuned-{i}" for i in range(COUNT)], "rest": rest}
    rule = {"select": {"index": 1}, "experts": experts, "top_k": 2, "residual": residual}
    path = place / name
    path.write_text(yaml.safe_dump({"version": 1, "layers": [rule], "init": init}))
    return path


def mean(models, name):
    return sum(model.get_parameter(name) for model in models).detach() / COUNT


def test_experts_come_from_their_checkpoints_and_the_rest_is_their_average(models, place):
    model = mf.moeify(copy.deepcopy(models[0]), plan_in(place, experts=2 * COUNT))
    experts = model.model.layers[1].mlp.experts
    for number in range(2 * COUNT):
        mlp = models[number % COUNT].model.layers[1].mlp
        assert torch.equal(experts.down_proj[number], mlp.down_proj.weight)
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        assert torch.equal(experts.gate_up_proj[number], both)
    for name in (EMBEDDING, "model.layers.0.mlp.up_proj.weight", "model.norm.weight"):
        torch.testing.assert_close(model.get_parameter(name).detach(), mean(models, name))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_rest_may_be_kept(models, place):
    model = mf.moeify(copy.deepcopy(models[1]), plan_in(place, rest="keep"))
    assert torch.equal(model.get_parameter(EMBEDDING), models[1].get_parameter(EMBEDDING))


def test_a_dense_branch_is_averaged_too(models, place):
    model = mf.moeify(copy.deepcopy(models[0]), plan_in(place, residual="add"))
    want = mean(models, "model.layers.1.mlp.down_proj.weight") / 2
    torch.testing.assert_close(model.model.layers[1].mlp.mlp.down_proj.weight.detach(), want)


def test_the_same_checkpoint_everywhere_is_the_dense_model(models, place):
    plan = {
        "layers": [{"select": "all", "experts": 2, "top_k": 2}],
        "init": {"experts": "models", "from": [str(place / "tuned-0")] * 2},
    }
    model = mf.moeify(llama(9), plan)
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(model(ids).logits, models[0](ids).logits)


def test_a_saved_model_no_longer_needs_the_checkpoints(models, place, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(place, here)
    model = mf.moeify(copy.deepcopy(models[0]), plan_in(here))
    mf.save(model, tmp_path / "moe")
    plan = Plan.load(tmp_path / "moe" / "plan.yaml")
    assert plan.init.from_ == ("tuned-0", "tuned-1", "tuned-2")  # as they were given
    shutil.rmtree(here)
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(mf.load(tmp_path / "moe")(ids).logits, model(ids).logits)


def test_one_expert_at_a_time_with_everything_on_meta_but_its_site(models, place):
    plan = Plan.load(plan_in(place))
    _, discovery, (layer,) = prepare(models[0], plan, None)
    model, found = copy.deepcopy(models[0]).to("meta"), find_site(discovery, layer)
    model.tie_weights()
    model.model.layers[1].mlp = models[0].model.layers[1].mlp
    for number in range(COUNT):
        weights = expert_weights(model, layer, found, share=range(number, number + 1))
        want = models[number].model.layers[1].mlp.down_proj.weight
        assert torch.equal(weights.down[0], want)
    (first, second) = sources_for(model, layer)[:2]
    assert sources_for(model, layer)[0] is first  # opened once
    rows = averaged([first, second], "model.layers.0.mlp.up_proj.weight", 3, 5)
    want = mean(models[:2], "model.layers.0.mlp.up_proj.weight")[3:5] * COUNT / 2
    torch.testing.assert_close(rows, want)


def _without(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.k_proj.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _wider(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors[EMBEDDING] = torch.zeros(40, 16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _other(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_act": "gelu"}))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (shutil.rmtree, "tuned-2: is not a folder"),
        (_without, r"tuned-2.*layers\.0\.self_attn\.k_proj\.weight"),
        (_wider, r"tuned-2.*embed_tokens\.weight.*40, 16"),
        (_other, "tuned-2.*hidden_act is 'gelu'"),
        (None, "late"),
    ],
    ids=["gone", "a tensor less", "wider", "another activation", "a late failure"],
)
def test_after_an_error_the_model_is_unchanged_bit_for_bit(
    damage, part, models, place, tmp_path, monkeypatch
):
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    plan = plan_in(tmp_path)
    if damage is None:

        def late(*args, **options):
            raise CheckpointError("late")

        monkeypatch.setattr("moeify.convert.convert_model.Installation", late)
    else:
        damage(tmp_path / "tuned-2")
    model = copy.deepcopy(models[0])
    with pytest.raises(MoeifyError, match=part):
        mf.moeify(model, plan)
    for name, value in models[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_all_layers_must_use_the_same_checkpoints(models):
    rules = [
        {"select": {"index": i}, "experts": 2, "init": {"experts": "models", "from": [a, "b"]}}
        for i, a in enumerate("ac")
    ]
    with pytest.raises(PlanError, match=r"init.from differs from that of model.layers.0.mlp"):
        Plan.of({"layers": rules}).resolve(models[0])


def test_the_plan_key_is_from(place):
    plan = Plan.load(plan_in(place))
    assert plan.data()["init"]["from"] == ["tuned-0", "tuned-1", "tuned-2"]
    assert Plan.of(plan.data()) == plan
    assert "from" in Plan.json_schema()["$defs"]["InitSpec"]["properties"]
    with pytest.raises(PlanError, match="from_"):
        Plan.of({"layers": [{"select": "all", "experts": 2}], "init": {"from_": ["a"]}})
