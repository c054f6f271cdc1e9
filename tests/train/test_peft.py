"""PEFT on a converted model, and what cannot be converted: adapters first, quantised weights."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

import moeify as mf
from moeify.nn.experts import Experts
from tests.zoo_models import ZOO, ids

PLAN = {
    "layers": [{"select": "all", "experts": 4, "top_k": 2}],
    "router": {"capacity_factor": None, "aux_loss": 0.5},
    "init": {"experts": "noise", "router_std": 0.3},
}
PROJECTIONS = {"llama": "gate_up_proj", "opt": "up_proj"}


def converted(name: str) -> nn.Module:
    torch.manual_seed(0)
    return mf.moeify(ZOO[name].build(), PLAN).eval()


def adapt(model: nn.Module, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, **options))


def stir(model: nn.Module) -> None:
    """Give every adapter a delta that is not zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(parameter.data, std=0.2)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids()).logits


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_lora_on_attention_and_on_stacked_experts(name, tmp_path):
    model = converted(name)
    before, dense = logits(model), states(model)
    first = PROJECTIONS[name]
    options = {
        "target_modules": ["q_proj", "v_proj"],
        "target_parameters": [f"experts.{first}", "experts.down_proj"],
    }
    adapted = adapt(model, **options)
    torch.testing.assert_close(logits(adapted), before)
    adapted.train()
    adapted(input_ids=ids(), labels=ids()).loss.backward()
    trained = {n: p.grad for n, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in n for n in trained)
    assert all(float(g.abs().sum()) > 0 for n, g in trained.items() if "lora_B" in n)
    assert sum(".experts." in n for n in trained) == 2 * 2 * 2  # A and B, two stacks, two layers
    adapted.eval()
    stir(adapted)
    unmerged = logits(adapted)
    assert float((unmerged - before).abs().max()) > 0.01
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)
    # The delta of one expert, by the definition, reaches that expert's weights.
    wrapper = adapted.get_submodule(experts_path(adapted))
    delta = wrapper.get_delta_weight("default")
    assert delta.shape == wrapper.get_param().shape

    merged = adapted.merge_and_unload()
    assert merged is model
    assert all(type(m) is Experts for p, m in model.named_modules() if p.endswith("experts"))
    torch.testing.assert_close(logits(model), unmerged, rtol=0, atol=1e-5)
    mf.save(model, tmp_path / "merged")
    again = mf.load(tmp_path / "merged").eval()
    assert torch.equal(logits(again), logits(model))

    stirred = adapt(converted(name), **options)
    stir(stirred)
    logits(stirred)
    back = stirred.unload()
    assert {n: t.tolist() for n, t in states(back).items()} == {
        n: t.tolist() for n, t in dense.items()
    }
    assert torch.equal(logits(back), before)
    assert torch.equal(logits(mf.demoeify(back)), logits(back))


def experts_path(model: nn.Module) -> str:
    return next(path for path, _ in model.named_modules() if path.endswith("experts"))


def test_a_saved_router_trains_and_counts_once():
    model = converted("llama")
    model.train()(input_ids=ids())  # what the first router remembers of it must not count
    adapted = adapt(model, target_modules=["q_proj"], modules_to_save=["router"])
    output = adapted(input_ids=ids(), labels=ids())
    output.loss.backward()
    layers = ["base_model.model.model.layers.0.mlp", "base_model.model.model.layers.1.mlp"]
    assert list(mf.router_stats(adapted)) == layers
    active = [r.modules_to_save["default"] for r in routers(adapted)]
    want = sum(router.last_aux_loss for router in active)
    torch.testing.assert_close(mf.aux_loss(adapted), want)
    assert all(float(router.weight.grad.abs().sum()) > 0 for router in active)
    assert all(r.original_module.weight.grad is None for r in routers(adapted))
    with adapted.disable_adapter():
        adapted(input_ids=ids())
        original = sum(r.original_module.last_aux_loss for r in routers(adapted))
        torch.testing.assert_close(mf.aux_loss(adapted), original)
    stir(adapted)
    want_logits = logits(adapted.eval())
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), want_logits, rtol=0, atol=1e-5)
    assert list(mf.router_stats(merged)) == [layer[len("base_model.model.") :] for layer in layers]


def routers(model: nn.Module) -> list[Any]:
    return [module for _, module in model.named_modules() if hasattr(module, "original_module")]


def test_adapters_before_the_conversion_are_refused():
    for name in ("q_proj", "up_proj"):
        adapted = adapt(ZOO["llama"].build(), target_modules=[name])
        for model in (adapted, adapted.base_model.model):
            with pytest.raises(
                mf.UnsupportedModuleError, match="convert the dense model first"
            ) as e:
                mf.moeify(model, PLAN)
            assert e.value.module.endswith(
                f"layers.0.{'self_attn' if name == 'q_proj' else 'mlp'}.{name}"
            )
    mf.moeify(adapted.merge_and_unload(), PLAN)


class Params4bit(nn.Parameter):
    """Stands in for bitsandbytes' parameter: packed codes, and how to read them."""

    quant_state: Any = "state"


class Linear4bit(nn.Linear):
    """Stands in for bitsandbytes' layer, which has a kernel that fake tensors cannot enter."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)
        codes = torch.zeros(d_in * d_out // 2, 1, dtype=torch.uint8)
        self.weight = Params4bit(codes, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this tensor")


class PackedLinear(nn.Module):
    """Stands in for GPTQ's layer: float scales, codes in int32."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(d_in // 8, d_out, dtype=torch.int32))
        self.scales = nn.Parameter(torch.ones(d_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shifts = torch.arange(0, 32, 4)[None, :, None]
        codes = (self.qweight[:, None] >> shifts & 15).flatten(0, 1)
        return x @ (codes.to(x.dtype) * self.scales)


class Float8Linear(nn.Linear):
    """A layer with weights in float8, cast at each use: its dataflow is that of a linear."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)
        self.weight = nn.Parameter(self.weight.to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


class TaggedWeight(torch.Tensor):
    """Stands in for a tensor subclass such as torchao's."""


TaggedWeight.__module__ = "torchao.dtypes"


class TaggedLinear(nn.Linear):
    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out, bias=False)
        data = self.weight.detach().as_subclass(TaggedWeight)
        self.weight = nn.Parameter(data, requires_grad=False)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Linear4bit, "1.0: its weight is quantised .Params4bit.: convert the float model"),
        (PackedLinear, "1.0: its qweight is quantised .int32"),
        (Float8Linear, "1.0: its weight is quantised .float8_e4m3fn"),
        (TaggedLinear, "1.0.weight is a TaggedWeight"),
    ],
)
def test_quantised_weights_are_refused_by_name(layer, message):
    model = nn.Sequential(nn.LayerNorm(8), nn.Sequential(layer(8, 32), nn.GELU(), layer(32, 8)))
    kept = dict(model.named_parameters())
    with pytest.raises(mf.UnsupportedModuleError, match=message):
        mf.moeify(model, PLAN, example_inputs=torch.ones(2, 8))
    assert all(kept[name] is p for name, p in model.named_parameters())
