"""slice-dense on two ranks: the numbers of one process, and everything put back by undo."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

import moeify as mf
from moeify.errors import PlanError
from moeify.nn.block import StoredLinear
from moeify.plan.plan import Plan
from moeify.plan.resolve import resolve_sites
from moeify.sites.discovery import discover
from moeify.tensor_parallel.apply import SlicePlan, apply
from moeify.tensor_parallel.derive import derive
from tests.distributed.ranks import run_ranks
from tests.passes.test_slice_dense import Grouped, Layer, Slope, TalkingHeads, x
from tests.zoo_models import ZOO, ids

TOLERANCE = 1e-5


def mesh(tensor: int = 2) -> DeviceMesh:
    return init_device_mesh("cpu", (tensor,), mesh_dim_names=("tp",))


def inputs_of(name: str) -> dict[str, Any]:
    make = ZOO[name].inputs
    found = make() if make is not None else {"input_ids": ids()}
    return found | ({"decoder_input_ids": ids(7)} if name in ("t5", "bart") else {})


def slices(model: nn.Module, inputs: Any, tensor: int = 2, **layer: Any) -> SlicePlan:
    rule = {"select": {"last": 1}, "experts": 2, "top_k": 1} | layer
    discovery = discover(model, inputs)
    plan = Plan.of({"layers": [rule], "parallel": {"tensor": tensor}})
    resolved = resolve_sites(
        plan,
        discovery.sites,
        parameters=discovery.parameters,
        parameter_bytes=discovery.parameter_bytes,
        linears=discovery.linears,
    )
    return derive(discovery, resolved, tensor, model=model, example_inputs=inputs)


@functools.cache
def planned(name: str, tensor: int = 2, residual: str = "none") -> SlicePlan:
    return slices(ZOO[name].build(), inputs_of(name), tensor, residual=residual)


def output_of(model: nn.Module, inputs: Any) -> Tensor:
    out = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return out if isinstance(out, Tensor) else next(iter(out.values()))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(model: nn.Module, inputs: Any, target: Tensor) -> float:
    loss = ((output_of(model, inputs) - target) ** 2).mean()
    model.zero_grad()
    loss.backward()
    return float(loss)


def gap(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / (1 + other.abs().max()))


def compare(model: nn.Module, reference: nn.Module, inputs: Any) -> float:
    """Return the largest difference in output, loss, gradients and three steps of SGD."""
    expected = output_of(reference, inputs).detach()
    errors = [gap(output_of(model, inputs), expected)]
    target = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))
    optimizers = [torch.optim.SGD(m.parameters(), 0.3) for m in (model, reference)]
    for _ in range(3):
        errors.append(abs(step(model, inputs, target) - step(reference, inputs, target)))
        grads = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
        for name, parameter in model.named_parameters():
            assert (parameter.grad is None) == (name not in grads), name
            if parameter.grad is not None:
                errors.append(gap(whole(parameter.grad), grads[name]))
        for optimizer in optimizers:
            optimizer.step()
    known = dict(reference.named_parameters())
    errors += [gap(whole(p.detach()), known[n].detach()) for n, p in model.named_parameters()]
    return max(errors)


def train(rank: int, plans: dict[str, SlicePlan]) -> dict[str, tuple[float, list[str]]]:
    results = {}
    for name, plan in plans.items():
        inputs = inputs_of(name)
        model = ZOO[name].build().eval()
        for parameter in model.parameters():  # what starts as 1 or 0 hides mistakes
            parameter.data += 0.1 * torch.randn_like(parameter)
        reference = copy.deepcopy(model)
        apply(model, plan, mesh())
        sliced = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
        results[name] = (compare(model, reference, inputs), sliced)
    return results


# The MLP of the last layer becomes experts, so that of the first is the one that is sliced.
SLICED = {
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen3": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "gemma2": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "bert": ("query", "key", "value", "dense"),
    "albert": ("query", "key", "value", "dense"),
    "opt": ("fc1", "fc2"),
    "gpt_neox": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "t5": ("wi", "wo"),
    "bart": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
    "bloom": ("dense_h_to_4h", "dense_4h_to_h"),
}


@pytest.fixture(scope="module")
def trained() -> list[dict[str, tuple[float, list[str]]]]:
    return run_ranks(train, 2, {name: planned(name) for name in SLICED})


@pytest.mark.parametrize("name", SLICED)
def test_trains_as_one_process(name: str, trained: Any) -> None:
    modules = planned(name).modules
    assert {path.rpartition(".")[2] for path in modules} == set(SLICED[name])
    for results in trained:
        error, sliced = results[name]
        assert error < TOLERANCE
        assert {n.rpartition(".")[0] for n in sliced} == set(modules)


def test_trains_models_of_any_form() -> None:
    for error, partial in run_ranks(hand_made, 2):
        assert error < TOLERANCE
        assert partial == ["mlp.slope"]


def hand_made(rank: int) -> tuple[float, list[str]]:
    errors, partial = [], []
    for make in (lambda: Layer(TalkingHeads(), Slope()), lambda: Layer(Grouped(2))):
        model = make()
        plan = slices(model, x())
        assert [pair.name for pair in plan.pairs] == ["attention", "mlp"]
        partial += [name for pair in plan.pairs for name in pair.partial]
        reference = copy.deepcopy(model)
        apply(model, plan, mesh())
        errors.append(compare(model, reference, x()))
    return max(errors), partial


def test_slices_hold_their_share_and_nothing_else() -> None:
    for column, row, bias in run_ranks(shares, 2, planned("bert")):
        assert column == ((32, 32), (16, 32), 16 * 32, (Shard(0),))
        assert row == ((32, 32), (32, 16), 16 * 32, (Shard(1),))
        assert bias == ((32,), (32,), 32, (Replicate(),))


def shares(rank: int, plan: SlicePlan) -> list[Any]:
    model = ZOO["bert"].build()
    names = [
        f"bert.encoder.layer.0.attention.{part}"
        for part in ("self.query.weight", "output.dense.weight", "output.dense.bias")
    ]
    former = [model.get_parameter(name) for name in names]
    apply(model, plan, mesh())
    found = []
    for name, before in zip(names, former, strict=True):
        parameter = model.get_parameter(name)
        storage = parameter.to_local().untyped_storage()
        assert storage.data_ptr() != before.untyped_storage().data_ptr()
        elements = storage.nbytes() // before.element_size()
        local = parameter.to_local().shape
        found.append((tuple(parameter.shape), tuple(local), elements, parameter.placements))
    return found


def test_generates_the_same_tokens() -> None:
    for ours, theirs in run_ranks(generate, 2, planned("llama")):
        assert ours.shape == theirs.shape == (2, 20)
        assert torch.equal(ours, theirs)


def generate(rank: int, plan: SlicePlan) -> tuple[Tensor, Tensor]:
    model = ZOO["llama"].build().eval()
    tokens = {"input_ids": ids(12), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    theirs = model.generate(**tokens, **options)
    apply(model, plan, mesh())
    return model.generate(**tokens, **options), theirs


def test_undo_puts_everything_back() -> None:
    assert run_ranks(undo, 2, planned("qwen3")) == [True, True]


def undo(rank: int, plan: SlicePlan) -> bool:
    model = ZOO["qwen3"].build().eval()
    model.get_parameter("model.layers.0.self_attn.k_proj.weight").requires_grad_(False)
    inputs = inputs_of("qwen3")
    expected = output_of(model, inputs)
    before = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    for _ in range(2):  # slicing again must be possible
        undone = apply(model, plan, mesh())
        grads = {n: p.requires_grad for n, p in model.named_parameters()}
        assert grads == {n: grad for n, (_, grad) in before.items()}
        assert list(grads) == list(before)
        undone.undo()
    assert {n: (id(p), p.requires_grad) for n, p in model.named_parameters()} == before
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(p._backward_hooks for p in model.parameters())
    return torch.equal(output_of(model, inputs), expected)


def test_compiles_in_one_graph() -> None:
    assert max(run_ranks(compiled, 2, planned("qwen3"))) < TOLERANCE


def compiled(rank: int, plan: SlicePlan) -> float:
    inputs = inputs_of("qwen3")
    model = ZOO["qwen3"].build().eval()
    reference = copy.deepcopy(model)
    apply(model, plan, mesh())
    target = torch.randn_like(output_of(reference, inputs))
    dist.broadcast(target, 0)
    step(reference, inputs, target)
    step(torch.compile(model, backend="aot_eager", fullgraph=True), inputs, target)
    grads = {n: p.grad for n, p in reference.named_parameters()}
    return max(gap(whole(p.grad), grads[n]) for n, p in model.named_parameters())


def test_slices_the_dense_branch_of_residual_experts() -> None:
    names = {"llama": "model.layers.1.mlp.mlp", "gpt2": "transformer.h.1.mlp.mlp"}
    plans = {name: planned(name, 2, "add") for name in names}
    assert {name: plan.branches for name, plan in plans.items()} == {
        name: (branch,) for name, branch in names.items()
    }
    for errors in run_ranks(residual, 2, plans):
        assert max(errors) < TOLERANCE


def residual(rank: int, plans: dict[str, SlicePlan]) -> list[float]:
    errors = []
    for name, plan in plans.items():
        inputs = inputs_of(name)
        model = ZOO[name].build().eval()
        rule = {"select": {"last": 1}, "experts": 2, "top_k": 1, "residual": "add"}
        # It is sliced afterwards, by hand: moeify's own reduction would refuse that.
        made = {"layers": [rule], "parallel": {"gradients": "none"}}
        mf.moeify(model, made, example_inputs=inputs, verify=False)
        reference = copy.deepcopy(model)
        apply(model, plan, mesh())
        branch = model.get_submodule(plan.branches[0])
        stored = [m for m in branch.modules() if isinstance(m, StoredLinear)]
        assert len(stored) == {"llama": 3, "gpt2": 2}[name]
        assert all(isinstance(p, DTensor) for p in branch.parameters())
        errors.append(compare(model, reference, inputs))
    return errors


def test_meta_models_stay_on_meta() -> None:
    with torch.device("meta"):
        model = ZOO["llama"].build()
    plan = slices(model, inputs_of("llama"))
    assert plan == planned("llama")
    assert all(p.is_meta for p in model.parameters())
    assert run_ranks(meta, 2, plan) == [True, True]


def meta(rank: int, plan: SlicePlan) -> bool:
    with torch.device("meta"):
        model = ZOO["llama"].build()
    apply(model, plan, mesh())
    weight = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(weight, DTensor)
    assert weight.to_local().shape == (16, 32)
    return all(p.is_meta for p in model.parameters())


def test_refuses_another_mesh() -> None:
    for text in run_ranks(other_mesh, 2, planned("bert", 4)):
        assert text.startswith("parallel.tensor: the slices are for 4 tensor ranks")


def other_mesh(rank: int, plan: SlicePlan) -> str:
    with pytest.raises(PlanError) as caught:
        apply(ZOO["bert"].build(), plan, mesh())
    return str(caught.value)
