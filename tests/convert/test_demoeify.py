"""`demoeify`: bit for bit the dense model where nothing trained, an honest average elsewhere."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeify as mf
from moeify.errors import MoeifyError, UnsupportedModuleError
from moeify.hf.detect import example_inputs_for
from tests.zoo_models import ZOO

RESIDUALS = ["none", "coefficient", "add", "sigmoid"]
NAMES = [name for name, case in ZOO.items() if case.sites]


def plan(count=4, residual="none", **init):
    return {
        "layers": [{"select": "all", "experts": count, "residual": residual}],
        "init": init,
    }


def built(name):
    case = ZOO[name]
    model = case.build()
    with torch.no_grad():
        for parameter in model.parameters():  # biases off zero, layer scales off their constant
            parameter.add_(0.05 * torch.randn_like(parameter))
    inputs = case.inputs() if case.inputs else example_inputs_for(model)
    return model.eval(), inputs


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def kinds_of(model):
    return [(path, type(module)) for path, module in model.named_modules()]


def first(output):
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    return next(first(v) for v in values if v is not None)


def same_state(model, before):
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype, name
        assert after[name].stride() == value.stride(), name
        assert torch.equal(after[name], value), name


def sequential():
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


def small():
    return nn.Sequential(sequential(), nn.LayerNorm(8), sequential())


X = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))


def convert(model, **options):
    return mf.moeify(model, plan(**options), example_inputs=X, verify=False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(3)
def test_zoo(name):
    model, inputs = built(name)
    before, kinds = state_of(model), kinds_of(model)
    trains = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        torch.manual_seed(0)
        expected = first(model(**inputs))
    residual = RESIDUALS[NAMES.index(name) % 4]
    mf.moeify(model, plan(residual=residual), example_inputs=inputs, verify=False)
    assert kinds_of(model) != kinds
    assert mf.demoeify(model) is model
    assert kinds_of(model) == kinds
    same_state(model, before)
    assert not any(p.is_meta for p in model.parameters())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trains
    with torch.no_grad():
        torch.manual_seed(0)
        assert torch.equal(first(model(**inputs)), expected)


@pytest.mark.parametrize("residual", RESIDUALS)
@pytest.mark.parametrize("granularity", [0, 2, 4])
@pytest.mark.parametrize("name", ["gpt2", "phi3", "bert", "convnext"])
@pytest.mark.thin(5)
def test_residuals_and_slices(name, granularity, residual, caplog):
    model, inputs = built(name)
    before = state_of(model)
    init = {"experts": "granular", "granularity": granularity} if granularity else {}
    chosen = plan(8, residual=residual, **init)
    chosen["layers"][0]["top_k"] = granularity or 1
    mf.moeify(model, chosen, example_inputs=inputs, verify=False)
    with caplog.at_level(logging.WARNING, logger="moeify"):
        mf.demoeify(model)
    assert not caplog.records
    same_state(model, before)


def test_other_granularities_are_close():
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 18), nn.GELU(), nn.Linear(18, 8)))
    before = state_of(model)
    chosen = {
        "layers": [{"select": "all", "experts": 6, "top_k": 3}],
        "init": {"experts": "granular", "granularity": 3},
    }
    mf.demoeify(mf.moeify(model, chosen, example_inputs=X))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=0)


def test_twice():
    model = small()
    before = state_of(model)
    for residual in ("none", "coefficient"):
        mf.demoeify(convert(model, residual=residual))
        same_state(model, before)
        with pytest.raises(MoeifyError, match="not converted"):
            mf.demoeify(model)


def test_residual_gives_the_very_parameters_back():
    model = small()
    before = dict(model.named_parameters())
    mf.demoeify(convert(model, residual="coefficient"))
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    mf.demoeify(convert(model, residual="add"))
    now = dict(model.named_parameters())
    assert now["0.0.weight"] is before["0.0.weight"]
    assert now["0.2.weight"] is not before["0.2.weight"]


def test_different_experts_are_averaged(caplog):
    model = convert(small())
    experts = model[0].experts
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(torch.randn_like(parameter))
    up, down = experts.up_proj.detach().clone(), experts.down_proj.detach().clone()
    with caplog.at_level(logging.WARNING, logger="moeify"):
        mf.demoeify(model)
    assert "averaged" in caplog.text
    assert "0" in caplog.text
    torch.testing.assert_close(model[0][0].weight, up.mean(0))
    torch.testing.assert_close(model[0][2].weight, down.mean(0))


@pytest.mark.parametrize("residual", RESIDUALS[1:])
def test_trained_residuals_mix_both_branches(residual, caplog):
    torch.manual_seed(1)
    model = convert(small(), residual=residual)
    block = model[0]
    with torch.no_grad():
        block.experts.down_proj.mul_(3.0)
        block.mlp.get_parameter(f"{block.mlp.up_names[0]}.weight").mul_(5.0)
    y = model(X)
    up = block.experts.up_proj[0].detach().clone()
    with caplog.at_level(logging.WARNING, logger="moeify"):
        mf.demoeify(model)
    assert caplog.records
    torch.testing.assert_close(model[0][0].weight, 3 * up)  # the mean of 1 and 5
    assert model(X).shape == y.shape


@pytest.mark.parametrize("residual", RESIDUALS[1:])
def test_shares_of_the_branches(residual):
    """With equal hidden values, the merged last projection is exactly what the block computes."""
    model = convert(small(), residual=residual)
    with torch.no_grad():
        model[0].experts.down_proj.mul_(3.0)
    model.eval()
    y = model[0](X)
    mf.demoeify(model)
    torch.testing.assert_close(model[0](X), y)


def test_a_coefficient_that_learned_is_reported(caplog):
    model = convert(small(), residual="coefficient")
    with torch.no_grad():
        model[2].residual_mix.coefficient.bias[0] = 1.0
    with caplog.at_level(logging.WARNING, logger="moeify"):
        mf.demoeify(model)
    assert "experts of 2 are" in caplog.text


def test_dtype_device_flags_and_frozen_parameters_follow():
    model = small()
    model[0].requires_grad_(False)
    convert(model)
    model.double().eval()
    mf.demoeify(model)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert not any(p.requires_grad for p in model[0].parameters())
    assert all(p.requires_grad for p in model[2].parameters())
    assert not any(module.training for module in model.modules())


def test_hooks_travel_both_ways():
    model, seen = small(), []
    kept = model[0].register_forward_hook(lambda *_: seen.append("before"))
    convert(model)
    model[0].register_forward_hook(lambda *_: seen.append("after"))
    mf.demoeify(model)
    seen.clear()
    model(X)
    assert seen == ["before", "after"]
    kept.remove()
    model(X)
    assert seen == ["before", "after", "after"]


def test_shared_modules_come_back_everywhere():
    mlp = sequential()
    model = nn.Sequential(mlp, nn.LayerNorm(8), mlp)
    before = state_of(model)
    convert(model)
    assert model[0] is model[2]
    mf.demoeify(model)
    assert model[0] is model[2]
    assert isinstance(model[0], nn.Sequential)
    same_state(model, before)


def test_encoder_layers_are_fused_again():
    model, inputs = built("nn.TransformerEncoder")
    values = [layer.activation_relu_or_gelu for layer in model.encoder.layers]
    mf.moeify(model, plan(), example_inputs=inputs)
    mf.demoeify(model)
    assert [layer.activation_relu_or_gelu for layer in model.encoder.layers] == values
    assert all(values)


def test_hugging_face_extras_are_taken_off(tmp_path):
    model, inputs = built("gpt2")
    attributes = set(model.__dict__)
    mf.moeify(model, plan(), example_inputs=inputs, verify=False)
    assert set(model.__dict__) > attributes
    mf.demoeify(model)
    assert set(model.__dict__) == attributes
    assert not model._forward_hooks
    model.save_pretrained(tmp_path)
    assert type(model).from_pretrained(tmp_path) is not None


@pytest.mark.parametrize("residual", RESIDUALS)
def test_meta(residual):
    with torch.device("meta"):
        model = ZOO["llama"].build()
    kinds = kinds_of(model)
    forms = {name: (t.shape, t.dtype) for name, t in model.state_dict().items()}
    mf.demoeify(mf.moeify(model, plan(residual=residual)))
    assert kinds_of(model) == kinds
    assert {name: (t.shape, t.dtype) for name, t in model.state_dict().items()} == forms
    assert all(p.is_meta for p in model.parameters())


def test_copies_and_pickles_of_a_converted_model(tmp_path):
    model = small()
    before = state_of(model)
    convert(model, residual="coefficient")
    second = copy.deepcopy(model)
    torch.save(model, tmp_path / "model.pt")
    read = torch.load(tmp_path / "model.pt", weights_only=False)
    for one in (second, read, model):
        same_state(mf.demoeify(one), before)


def test_nan_weights_are_copies_too(caplog):
    model = small()
    with torch.no_grad():
        model[0][0].weight[0, 0] = torch.nan
    convert(model)
    with caplog.at_level(logging.WARNING, logger="moeify"):
        mf.demoeify(model)
    assert not caplog.records
    assert model[0][0].weight.isnan().sum() == 1


# -- all or nothing


def test_a_replaced_block_is_refused_before_anything_changes():
    model = convert(small())
    blocks = list(model)
    model[2] = nn.Identity()
    with pytest.raises(UnsupportedModuleError, match=r"2: a Identity stands there"):
        mf.demoeify(model)
    assert model[0] is blocks[0]
    model[2] = blocks[2]
    mf.demoeify(model)
    assert isinstance(model[0], nn.Sequential)


class HalfBias(nn.Module):
    """Gated, with a bias on the gate alone."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 16)
        self.up = nn.Linear(8, 16, bias=False)
        self.down = nn.Linear(16, 8)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_a_learned_bias_without_a_place_is_refused():
    model = nn.Sequential(sequential(), nn.LayerNorm(8), HalfBias())
    before = state_of(model)
    convert(model)
    mf.demoeify(model)
    same_state(model, before)
    convert(model)
    with torch.no_grad():
        model[2].experts.gate_up_bias.add_(1.0)
    blocks = list(model)
    with pytest.raises(UnsupportedModuleError, match=r"2\.up: its experts have learned a bias"):
        mf.demoeify(model)
    assert all(one is other for one, other in zip(model, blocks, strict=True))
