"""`moeify(model, plan)`: what it does to a model, all or nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import fx, nn

import moeify as mf
from moeify.convert import install
from moeify.hf.detect import example_inputs_for
from moeify.sites.record import conversion_of
from tests.convert.models import ALL4, Breaks, Cifar, Mlp, ScaleHidden, Stack, assert_same, state
from tests.zoo_models import ZOO


def test_same_object_same_class_names_kept():
    model = Stack()
    before = dict(model.named_parameters())
    x = torch.randn(5, 8)
    want = model(x)
    plan = {"layers": [{"select": {"index": 1}, "experts": 4}]}
    assert mf.moeify(model, plan, example_inputs=x) is model
    assert type(model) is Stack
    assert isinstance(model.layers[1], fx.GraphModule)
    assert model.layers[0].up.weight is before["layers.0.up.weight"]
    torch.testing.assert_close(model.eval()(x), want)


def test_the_block_reads_like_the_design():
    model = ZOO["gpt2"].build()
    plan = {"layers": [{"select": {"last": 1}, "experts": 4, "residual": "coefficient"}]}
    mf.moeify(model, plan)
    lines = model.transformer.h[1].mlp.code.splitlines()
    calls = [line.split(" = ", 1)[1].split("(")[0] for line in lines if " = " in line]
    want = [
        "hidden_states.reshape",
        "self.router",
        "self.experts",
        "self.mlp",
        "self.residual_mix",
    ]
    assert [call for call in calls if call in want] == want


def test_nothing_global_is_drawn_and_seeds_decide():
    torch.manual_seed(3)
    model = Stack()
    duplicate = copy.deepcopy(model)
    other = copy.deepcopy(model)
    rng = torch.get_rng_state()
    x = torch.ones(2, 8)
    mf.moeify(model, ALL4, example_inputs=x)
    assert torch.equal(rng, torch.get_rng_state())
    torch.rand(7)
    mf.moeify(duplicate, ALL4, example_inputs=x)
    mf.moeify(other, {**ALL4, "init": {"seed": 1}}, example_inputs=x)
    for (name, a), (_, b), (_, c) in zip(
        model.state_dict().items(),
        duplicate.state_dict().items(),
        other.state_dict().items(),
        strict=True,
    ):
        assert torch.equal(a, b)
        assert torch.equal(a, c) == ("router" not in name)
    first, second = (model.layers[i].router.weight for i in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("init", ["noise", "drop", "random"])
def test_other_inits_differ_by_expert_and_keep_the_scale(init):
    model = Stack(1)
    weight = model.layers[0].up.weight.detach().clone()
    mf.moeify(model, {**ALL4, "init": {"experts": init}}, example_inputs=torch.ones(2, 8))
    experts = model.layers[0].experts.up_proj.detach()
    assert experts.shape == (4, 12, 8)
    assert not torch.equal(experts[0], experts[1])
    assert 0.5 < float(experts.std() / weight.std()) < 1.5
    same = (experts == weight).all(-1).float().mean()
    assert {"noise": 0.0, "drop": 0.5, "random": 0.0}[init] == float(same)


def test_drop_redraws_the_same_neurons_everywhere():
    model = ZOO["llama"].build()
    mlp = copy.deepcopy(model.model.layers[0].mlp)
    plan = {**ALL4, "init": {"experts": "drop", "drop_ratio": 0.25}}
    mf.moeify(model, plan)
    experts = model.model.layers[0].mlp.experts
    gate, up = experts.gate_up_proj.detach().chunk(2, 1)
    for e in range(4):
        changed = [
            (gate[e] != mlp.gate_proj.weight).any(1),
            (up[e] != mlp.up_proj.weight).any(1),
            (experts.down_proj[e] != mlp.down_proj.weight).any(0),
        ]
        assert int(changed[0].sum()) == 12
        assert all(torch.equal(changed[0], c) for c in changed)


def test_ledger_says_where_every_tensor_went():
    model = ZOO["gpt2"].build()
    plan = {"layers": [{"select": {"index": 1}, "experts": 2, "residual": "coefficient"}]}
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    mf.moeify(model, plan)
    ledger = conversion_of(model).ledger
    assert sorted(ledger) == sorted(names)
    assert ledger["transformer.h.0.mlp.c_fc.weight"][0] == "kept"
    moved = ledger["transformer.h.1.mlp.c_fc.weight"]
    assert moved == ("moved", "transformer.h.1.mlp.mlp.c_fc.weight")
    mf.moeify(other := ZOO["gpt2"].build(), ALL4)
    fate = conversion_of(other).ledger["transformer.h.1.mlp.c_fc.weight"]
    assert fate == ("copied", "transformer.h.1.mlp")


@pytest.mark.parametrize("where", ["ledger", "numbers", "compare", "pass", "install"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "nn.TransformerEncoder"])
@pytest.mark.thin(3)
def test_a_failure_leaves_the_dense_model(where, name, monkeypatch):
    case = ZOO[name]
    model = case.build().train()
    first = next(iter(model.modules()))
    first.register_forward_hook(lambda *a: None)
    inputs = case.inputs() if case.inputs else example_inputs_for(model)
    before = state(model)
    passes: tuple[Any, ...] = ()
    if where == "ledger":
        monkeypatch.setattr(install, "make_ledger", _raise)
    elif where == "compare":
        monkeypatch.setattr(install, "compare", _raise)
    elif where == "install":
        real, calls = install.Installer.install, []

        def second_fails(*args: Any) -> Any:
            calls.append(args)
            return real(*args) if len(calls) < 2 else _raise()

        monkeypatch.setattr(install.Installer, "install", second_fails)
    elif where == "pass":
        passes = (ScaleHidden(factor=0.0, fails=True),)
    else:
        passes = (ScaleHidden(factor=1.01),)
    error = mf.VerificationError if where == "numbers" else Breaks
    with pytest.raises(error):
        mf.moeify(model, ALL4, example_inputs=inputs, passes=passes)
    assert_same(before, state(model))
    monkeypatch.undo()
    mf.moeify(model, ALL4, example_inputs=inputs)


def _raise(*args: Any, **kwargs: Any) -> Any:
    raise Breaks


def test_a_users_pass_is_installed():
    model = Stack()
    x = torch.randn(4, 8)
    mf.moeify(model, ALL4, example_inputs=x, passes=[ScaleHidden(0.5)], verify=False)
    assert all("torch.mul(hidden, 0.5)" in layer.code for layer in model.layers)


@pytest.mark.parametrize("name", ["gpt2", "bert", "albert", "timm Mlp, norm"])
def test_a_model_on_meta_stays_on_meta(name):
    case = ZOO[name]
    with torch.device("meta"):
        model = case.build()
    plan = {"layers": [{"select": "all", "experts": 64, "residual": "add"}]}
    inputs = case.inputs() if case.inputs else None
    mf.moeify(model, plan, example_inputs=inputs)
    assert all(p.is_meta for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) > 0
    resolved = [c.layer.parameters_after for c in conversion_of(model).layers]
    blocks = [model.get_submodule(c.block) for c in conversion_of(model).layers]
    assert resolved == [sum(p.numel() for p in b.parameters()) for b in blocks]


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "timm Mlp, norm", "phi3"])
@pytest.mark.thin(2)
def test_the_plan_counts_what_is_built(name):
    case = ZOO[name]
    model = case.build()
    inputs = case.inputs() if case.inputs else example_inputs_for(model)
    plan = mf.Plan.preset("pr-moe", experts=2, last=4, every=1, start=0)
    resolved = plan.resolve(model, inputs)
    mf.moeify(model, plan, example_inputs=inputs)
    assert resolved.parameters == sum(p.numel() for p in model.parameters())
    assert resolved.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert "experts" in str(resolved)


def test_expert_linear_puts_experts_before_the_layer():
    model, x = Cifar(), torch.randn(6, 48)
    want = model(x)
    plan = {"layers": [{"select": {"name": "fc3"}, "experts": 4, "expert": "linear"}]}
    mf.moeify(model, plan, example_inputs=x)
    assert isinstance(model.fc3.projection, nn.Linear)
    assert model.fc3.experts.weight.shape == (4, 84, 84)
    torch.testing.assert_close(model.eval()(x), want)
    resolved = conversion_of(model).layers[0].layer
    assert resolved.parameters_after == sum(p.numel() for p in model.fc3.parameters())
    model.train()(x).sum().backward()
    assert float(model.fc3.router.weight.grad.abs().sum()) > 0


def test_hooks_on_untouched_and_on_swapped_modules_survive():
    model, seen = Stack(), []
    model.layers[0].up.register_forward_hook(lambda *a: seen.append("untouched"))
    model.layers[1].register_forward_hook(lambda *a: seen.append("swapped"))
    mf.moeify(
        model,
        {"layers": [{"select": {"index": 1}, "experts": 2}]},
        example_inputs=torch.ones(2, 8),
    )
    seen.clear()
    model(torch.ones(2, 8))
    assert seen == ["untouched", "swapped"]


def test_hooks_of_a_layer_behind_linear_experts_fire_once():
    model, seen = Cifar(), []
    model.fc3.register_forward_hook(lambda *a: seen.append(1))
    plan = {"layers": [{"select": {"name": "fc3"}, "experts": 4, "expert": "linear"}]}
    mf.moeify(model, plan, example_inputs=torch.ones(2, 48))
    seen.clear()
    model(torch.ones(2, 48))
    assert seen == [1]


def test_losses_and_stats_of_a_dense_model_raise():
    for call in (mf.aux_loss, mf.router_stats):
        with pytest.raises(mf.MoeifyError, match="no MoE layer"):
            call(Stack())


def test_stats_report_load_entropy_and_drops():
    plan = {**ALL4, "router": {"capacity_factor": 0.5, "min_capacity": 0}}
    model = mf.moeify(Stack(2), plan, example_inputs=torch.ones(2, 8))
    assert mf.router_stats(model) == {}
    assert float(mf.aux_loss(model)) == 0.0
    model.train()(torch.randn(64, 8))
    stats = mf.router_stats(model)
    assert list(stats) == ["layers.0", "layers.1"]
    for layer in stats.values():
        assert int(layer["counts"].sum()) == layer["tokens"] == 64
        torch.testing.assert_close(layer["load"].sum(), torch.tensor(1.0))
        assert 0 < layer["entropy"] <= 1.3863
        assert 0.5 <= layer["dropped"] < 1


def test_zero_tokens_forward_and_backward():
    model = mf.moeify(Stack(), ALL4, example_inputs=torch.ones(2, 8)).train()
    x = torch.zeros(0, 8, requires_grad=True)
    (model(x).sum() + mf.aux_loss(model)).backward()
    grads = [p.grad for m in model.layers for p in m.parameters()]
    assert all(g is not None and bool((g == 0).all()) for g in grads)


def test_a_nan_row_poisons_itself_alone():
    model = mf.moeify(Stack(), ALL4, example_inputs=torch.ones(2, 8)).eval()
    x = torch.randn(9, 8)
    want = model(x)
    x[4] = float("nan")
    got = model(x)
    keep = torch.arange(9) != 4
    torch.testing.assert_close(got[keep], want[keep])
    assert bool(got[4].isnan().all())


def test_deterministic_algorithms():
    model = mf.moeify(Stack(), ALL4, example_inputs=torch.ones(2, 8)).train()
    torch.use_deterministic_algorithms(True)
    try:
        grads = []
        for _ in range(2):
            model.zero_grad()
            torch.manual_seed(0)
            model(torch.ones(33, 8)).sum().backward()
            grads.append([p.grad.clone() for p in model.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_save_pretrained_is_the_models_own_again_after_demoeify(tmp_path):
    model = mf.moeify(ZOO["llama"].build(), ALL4)
    assert "save_pretrained" in model.__dict__
    mf.demoeify(model).save_pretrained(tmp_path / "out")
    assert '"moeify' not in (tmp_path / "out" / "config.json").read_text()


def test_one_mlp_right_after_another():
    model = nn.Sequential(Mlp(), Mlp(), nn.Sequential(nn.Linear(8, 9), nn.GELU(), nn.Linear(9, 8)))
    x = torch.randn(5, 8)
    want = model(x)
    mf.moeify(model, ALL4, example_inputs=x)
    assert all(isinstance(child, fx.GraphModule) for child in model)
    torch.testing.assert_close(model.eval()(x), want)


def test_another_default_device_changes_nothing():
    model = Stack()
    duplicate = copy.deepcopy(model)
    x = torch.ones(2, 8)
    mf.moeify(model, {**ALL4, "init": {"experts": "drop"}}, example_inputs=x)
    with torch.device("meta"):
        mf.moeify(duplicate, {**ALL4, "init": {"experts": "drop"}}, example_inputs=x)
    for (name, a), (_, b) in zip(
        model.state_dict().items(), duplicate.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), name


def test_linear_experts_in_front_of_an_mlps_own_projection():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8))
    x = torch.randn(4, 8)
    want = model(x)
    rule = {"select": {"name": "2"}, "expert": "linear", "experts": 2}
    mf.moeify(model, {"layers": [rule]}, example_inputs=x)
    assert isinstance(model[0], nn.Linear)
    torch.testing.assert_close(model(x), want)
