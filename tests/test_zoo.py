"""The acceptance zoo: every architecture is found, converted, proven and compiled in one graph.

Compiling is the longest part and meets the same blocks in every model, so that without `--slow`
one architecture of each kind is compiled.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import moeify as mf
from moeify.convert.dense_gradients import untouched
from moeify.convert.verify import compare, snapshot
from moeify.hf.detect import example_inputs_for
from moeify.sites.discovery import discover
from tests.zoo_models import ZOO, Case

PLAN = {
    "layers": [
        {"select": "all", "experts": 4, "residual": "coefficient"},
        {"select": {"last": 1}, "experts": 6, "top_k": 2, "residual": "none"},
    ]
}
COMPILED = {
    *("gpt2", "llama", "phi3", "opt"),  # decoders: plain, gated, fused gate, MLP within the layer
    *("bert", "albert", "t5", "whisper"),  # encoders, a shared layer, two towers that attend
    *("vit", "swin", "convnext", "clip", "wav2vec2"),  # images, contrast, sound
    *("nn.TransformerEncoder", "timm Mlp, norm"),  # plain torch, a norm within the MLP
}
"""The architectures that `test_zoo` compiles without `--slow`."""


def inputs_of(case: Case, model: nn.Module) -> dict[str, Any]:
    return case.inputs() if case.inputs else example_inputs_for(model)


def first(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if hasattr(output, "values") else output
    return next(first(v) for v in values if v is not None)


def stirred(model: nn.Module) -> nn.Module:
    """Move every parameter off its initial value: biases off zero, layer scales off 1e-6."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("name", ZOO)
def test_zoo(name, zoo_row, request):
    case = ZOO[name]
    model = stirred(case.build())
    inputs = inputs_of(case, model)
    found = discover(model, inputs)
    installs = {site.install for site in found.sites}
    assert len(found.sites) == case.sites, [str(site) for site in found.sites]
    assert installs <= {case.install}
    assert case.near in " ".join(miss.reason for miss in found.near_misses)
    if not case.sites:
        zoo_row(model=name, sites=0, capture=found.capture.mode, installed="-")
        with pytest.raises(mf.PlanError, match=r"no MLP|has no"):
            mf.moeify(model, PLAN, example_inputs=inputs)
        return
    dense = copy.deepcopy(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = [n for n, _ in model.named_parameters()]
    assert mf.moeify(model, PLAN, example_inputs=inputs) is model
    left = [n for n, _ in model.named_parameters() if n in names]
    assert all(torch.equal(before[n], model.get_parameter(n)) for n in left)
    gap = compare(
        snapshot(dense, inputs, untouched(dense, left)),
        snapshot(model, inputs, untouched(model, left)),
        (),
    )
    assert gap.outputs <= 1e-5
    assert gap.gradients <= 1e-5
    counts = [len(s["counts"]) for s in _stats(model, inputs).values()]
    assert sorted(counts) == [4] * (case.sites - 1) + [6]
    compiles = name in COMPILED or request.config.getoption("--slow")
    zoo_row(
        model=name,
        sites=case.sites,
        capture=found.capture.mode,
        installed=case.install,
        outputs=gap.outputs,
        gradients=gap.gradients,
        graphs=_graphs(model, inputs) if compiles else "",
    )


def _graphs(model: nn.Module, inputs: dict[str, Any]) -> int:
    """Compile for inference, compare, and return the number of graphs: one."""
    model.eval()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    with torch.no_grad():
        got = first(torch.compile(model, fullgraph=True, backend=counter)(**inputs))
        torch.testing.assert_close(got, first(model(**inputs)), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1
    return counter.frame_count


def test_every_compiled_name_is_in_the_zoo():
    assert set(ZOO) >= COMPILED
    assert {ZOO[name].install for name in COMPILED} == {case.install for case in ZOO.values()}


def _stats(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    model.train()
    model(**inputs)
    return mf.router_stats(model)


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "convnext", "nn.TransformerEncoder"])
def test_training_step_compiles_in_one_graph(name):
    case = ZOO[name]
    model = case.build()
    inputs = inputs_of(case, model)
    mf.moeify(model, PLAN, example_inputs=inputs)
    model.train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    loss = first(compiled(**inputs)).float().square().mean() + mf.aux_loss(model)
    loss.backward()
    assert counter.frame_count == 1
    routers = [p for n, p in model.named_parameters() if n.endswith("router.weight")]
    assert routers
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in routers)
