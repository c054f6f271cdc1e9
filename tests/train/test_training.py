"""A converted model in the user's loop: compile, generate, autocast, checkpointing, DDP, copies."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import moeify as mf
from moeify.sites.record import routers_of
from tests.distributed.ranks import run_ranks
from tests.zoo_models import ZOO, ids

PLAN = {
    "layers": [
        {"select": "all", "experts": 4, "residual": "coefficient"},
        {"select": {"last": 1}, "experts": 8, "top_k": 2},
    ]
}


def converted(name: str = "gpt2", plan: object = PLAN) -> nn.Module:
    torch.manual_seed(0)
    case = ZOO[name]
    return mf.moeify(case.build(), plan, example_inputs=case.inputs() if case.inputs else None)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_capacity_does_not_recompile_over_batch_and_length():
    model = converted("llama").train()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for batch, length in ((2, 8), (3, 12), (5, 17), (2, 31), (7, 9)):
        tokens = torch.randint(3, 98, (batch, length))
        loss = compiled(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
    assert counter.frame_count <= 2


def test_inductor_trains_as_eager_does():
    # no dropout and no random drops, so that both draw the same (nothing)
    plan = {**PLAN, "router": {"drop": "position"}}
    model = converted("llama", plan).train()
    tokens = ids(16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    loss = compiled(input_ids=tokens, labels=tokens).loss
    loss.backward()
    got = gradients(model)
    model.zero_grad()
    eager = model(input_ids=tokens, labels=tokens).loss
    eager.backward()
    torch.testing.assert_close(loss, eager)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bloom", "t5"])
@pytest.mark.thin(2)
def test_generate_equals_the_dense_model(name):
    torch.manual_seed(0)
    model = ZOO[name].build().eval()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    dense = model.generate(ids(5), **options)
    mf.moeify(model, PLAN)
    assert torch.equal(dense, model.generate(ids(5), **options))


def test_a_hugging_face_loss_holds_the_router_losses_in_training_only():
    model = converted("llama", {**PLAN, "router": {"drop": "position", "aux_loss": 0.5}})
    tokens = ids()
    model.eval()
    plain = model(input_ids=tokens, labels=tokens)
    as_tuple = model(input_ids=tokens, labels=tokens, return_dict=False)
    torch.testing.assert_close(plain.loss, as_tuple[0])
    model.train()
    for router in dict(routers_of(model)).values():
        router.capacity_factor = None
    with_losses = model(input_ids=tokens, labels=tokens)
    assert float(mf.aux_loss(model).detach()) > 0.5
    torch.testing.assert_close(with_losses.loss, plain.loss + mf.aux_loss(model))
    torch.testing.assert_close(with_losses["loss"], with_losses.loss)
    in_tuple = model(input_ids=tokens, labels=tokens, return_dict=False)[0]
    torch.testing.assert_close(in_tuple, with_losses.loss)
    with_losses.loss.backward()
    assert all(float(r.weight.grad.abs().sum()) > 0 for _, r in routers_of(model))


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5"])
@pytest.mark.thin(3)
def test_autocast_bf16(name):
    model = converted(name).train()
    inputs = {"input_ids": ids(), "labels": ids()}
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**inputs)
        assert output.logits.dtype == torch.bfloat16
    output.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert all(torch.isfinite(g).all() for g in gradients(model).values())


def test_bf16_model_routes_in_float32():
    torch.manual_seed(0)
    model = ZOO["llama"].build().to(torch.bfloat16)
    mf.moeify(model, PLAN)
    model.train()
    output = model(input_ids=ids(), labels=ids())
    output.loss.backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["llama", "opt", "bert"])
@pytest.mark.thin(2)
def test_gradient_checkpointing_counts_once_and_keeps_the_gradients(name):
    model = converted(name).train()
    for module in model.modules():  # recomputed dropout draws the same; still, none here
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    inputs = {"input_ids": ids(), "labels": ids()}
    torch.manual_seed(3)
    plain = model(**inputs).loss
    plain.backward()
    want, stats = gradients(model), mf.router_stats(model)
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.manual_seed(3)
    loss = model(**inputs).loss
    loss.backward()
    torch.testing.assert_close(loss, plain)
    got = gradients(model)
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-6)
    for key, layer in mf.router_stats(model).items():
        assert torch.equal(layer["counts"], stats[key]["counts"])


def test_the_default_gradient_checkpointing_of_hugging_face_trains_or_raises():
    model = converted("llama").train()
    model.gradient_checkpointing_enable()
    output = model(input_ids=ids(), labels=ids())
    output.loss.backward()
    assert all(float(r.weight.grad.abs().sum()) > 0 for _, r in routers_of(model))


def test_reentrant_checkpointing_is_refused_where_routers_would_not_learn():
    model = converted("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with pytest.raises(mf.MoeifyError, match="use_reentrant=False"):
        model(input_ids=ids(), labels=ids())


@pytest.mark.parametrize("bias_update", [0.0, 0.05])
@pytest.mark.thin(2)
def test_compiled_checkpointing_gives_the_router_gradients(bias_update):
    router = {"drop": "position", "bias_update": bias_update}
    model = converted("llama", {**PLAN, "router": router}).train()
    inputs = {"input_ids": ids(), "labels": ids(), "use_cache": False}
    model(**inputs)  # its load moves the biases at the start of the next
    start = copy.deepcopy(model.state_dict())
    model(**inputs).loss.backward()
    want, after = gradients(model), copy.deepcopy(model.state_dict())
    model.zero_grad()
    model.load_state_dict(start)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch._dynamo.reset()
    torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs).loss.backward()
    got = gradients(model)
    for key in want:
        torch.testing.assert_close(got[key], want[key], rtol=1e-4, atol=1e-6)
    for key, value in model.state_dict().items():  # biases and pending counts: once
        assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("name", ["gpt2", "bert", "albert"])
def test_copies_are_whole_and_independent(name):
    model = converted(name).train()
    model(input_ids=ids(), labels=ids()).loss.backward()
    clone = copy.deepcopy(model).eval()
    model.eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        want = model(input_ids=ids()).logits
        assert torch.equal(clone(input_ids=ids()).logits, want)
        assert torch.equal(loaded(input_ids=ids()).logits, want)
        for parameter in clone.parameters():
            parameter.zero_()
        assert torch.equal(model(input_ids=ids()).logits, want)
    assert str(loaded.dtype) == str(model.dtype)
    mf.demoeify(loaded)


def test_state_dict_round_trip():
    model, other = converted(), converted(plan={**PLAN, "init": {"seed": 7}})
    names = set(model.state_dict())
    assert "transformer.h.0.mlp.experts.up_proj" in names
    assert "transformer.h.0.mlp.router.weight" in names
    result = other.load_state_dict(model.state_dict())
    assert not result.missing_keys
    assert not result.unexpected_keys
    model.eval(), other.eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids()).logits, other(input_ids=ids()).logits)


def test_ties_and_frozen_parameters_survive():
    model = ZOO["gpt2"].build()
    model.transformer.wte.weight.requires_grad_(False)
    for parameter in model.transformer.h[0].mlp.parameters():
        parameter.requires_grad_(False)
    mf.moeify(model, PLAN)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not model.transformer.wte.weight.requires_grad
    block = model.transformer.h[0].mlp
    assert not any(p.requires_grad for p in block.experts.parameters())
    assert not any(p.requires_grad for p in block.mlp.parameters())
    assert block.router.weight.requires_grad


def _ddp(rank: int) -> list[str]:
    # no capacity and no balance loss: the mean over ranks equals the whole batch
    plan = {**PLAN, "router": {"capacity_factor": None, "aux_loss": 0.0}}
    model = converted("llama", plan).train()
    alone = copy.deepcopy(model)
    tokens = torch.randint(3, 98, (4, 12), generator=torch.Generator().manual_seed(5))
    alone(input_ids=tokens, labels=tokens).loss.backward()
    wrapped = nn.parallel.DistributedDataParallel(model)
    part = tokens[rank * 2 : rank * 2 + 2]
    wrapped(input_ids=part, labels=part).loss.backward()
    failed = []
    for name, parameter in alone.named_parameters():
        gap = (model.get_parameter(name).grad - parameter.grad).abs().max()
        if gap > 1e-5:
            failed.append(f"{name}: {float(gap):.1e}")
    return failed


def test_ddp_gives_the_single_process_gradients():
    assert run_ranks(_ddp, 2) == [[], []]
