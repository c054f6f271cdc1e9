"""`export`: one graph with the model's numbers at any size, which trains, pickles and compiles."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import fx, nn

import moeify as mf
from moeify.errors import CaptureError
from moeify.nn.router import Router
from moeify.nn.router_losses import RouterLosses
from tests.zoo_models import ZOO, NanoGPT, Vision, pixels, sequential_mlp

OPS = {"gate", "assign", "combine_weights", "experts"}
UNFUSED = OPS - {"experts"} | {"dispatch", "grouped_linear", "combine"}
NAMES = ["gpt2", "llama", "bert", "t5", "opt", "nanoGPT"]


def plan(**router):
    return {
        "layers": [
            {"select": "all", "experts": 4, "residual": "coefficient"},
            {"select": {"last": 1}, "experts": 3, "top_k": 2, "residual": "none"},
        ],
        "router": {"aux_loss": 0.1, "z_loss": 0.01, **router},
    }


def inputs(name, batch=2, length=8):
    ids = torch.randint(3, 98, (batch, length))
    found = {"input_ids": ids}
    if name != "nanoGPT":
        found["attention_mask"] = torch.ones_like(ids)
    if name == "t5":
        found["decoder_input_ids"] = torch.randint(3, 98, (batch, length + 1))
    return found


def converted(name, training=False, **router):
    model = ZOO[name].build().train(training)
    example = None if name != "nanoGPT" else inputs(name)
    return mf.moeify(model, plan(**router), example_inputs=example, verify=False)


def exported(name, model):
    return mf.export(model, None if name != "nanoGPT" else inputs(name))


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


def ops_of(gm):
    return [str(n.target) for n in gm.graph.nodes if str(n.target).startswith("moeify.")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(3)
def test_same_numbers_at_other_sizes(name, training):
    model = converted(name, training)
    gm = exported(name, model)
    assert isinstance(gm, fx.GraphModule)
    assert gm.training == gm.meta["training"] == training
    dropout = training and name == "t5"  # between the projections, so they stay apart
    assert {op.split(".")[1] for op in ops_of(gm)} == (UNFUSED if dropout else OPS)
    assert all(op.endswith(".default") for op in ops_of(gm))
    for size in [(2, 8), (3, 5), (1, 12), (4, 1), (1, 1)]:
        given = inputs(name, *size)
        torch.manual_seed(0)
        expected = model(**given)
        torch.manual_seed(0)
        got = gm(**given)
        assert type(got) is type(expected)
        torch.testing.assert_close(first(got), first(expected), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mf.aux_loss(gm), mf.aux_loss(model))


@pytest.mark.parametrize("name", ["gpt2", "bert", "nanoGPT"])
def test_same_gradients(name):
    model = converted(name, True)
    gm = exported(name, model)
    given = inputs(name, 3, 6)
    gradients = []
    for one in (model, gm):
        model.zero_grad()
        torch.manual_seed(0)
        out = first(one(**given))
        (out.square().mean() + mf.aux_loss(one)).backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    eager, graph = gradients
    assert list(eager) == list(graph)
    assert any("router" in name and bool(g.any()) for name, g in graph.items())
    for key, gradient in eager.items():
        torch.testing.assert_close(graph[key], gradient, rtol=1e-4, atol=1e-6)


def test_parameters_are_the_models_own():
    model = converted("gpt2")
    gm = mf.export(model)
    own = dict(model.named_parameters(remove_duplicate=False))
    assert all(p is own[name] for name, p in gm.named_parameters())
    given = inputs("gpt2")
    before = gm(**given).logits
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    torch.testing.assert_close(gm(**given).logits, 2 * before, rtol=0.5, atol=0.5)
    torch.testing.assert_close(gm(**given).logits, model(**given).logits)


@pytest.mark.parametrize("top", [4, 5])
def test_a_hugging_face_loss_holds_the_router_losses(top):
    model = converted("gpt2", True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    ids = inputs("gpt2")["input_ids"]
    model(input_ids=ids)  # what an earlier forward left is not part of the graph
    gm = mf.export(model, {"input_ids": ids, "labels": ids})
    given = inputs("gpt2", 3, top)["input_ids"]
    torch.manual_seed(0)
    expected = model(input_ids=given, labels=given.clone()).loss
    torch.manual_seed(0)
    got = gm(input_ids=given, labels=given.clone()).loss
    torch.testing.assert_close(got, expected)
    assert mf.aux_loss(gm) > 0.1


def test_labels_that_are_the_inputs_stay_a_separate_input():
    model = converted("gpt2")
    ids = inputs("gpt2")["input_ids"]
    gm = mf.export(model, {"input_ids": ids, "labels": ids})
    labels = torch.randint(3, 98, ids.shape)
    expected = model(input_ids=ids, labels=labels).loss
    torch.testing.assert_close(gm(input_ids=ids, labels=labels).loss, expected)


def test_the_model_is_left_as_it_was():
    model = converted("bert", True)
    model(**inputs("bert"))
    loss = mf.aux_loss(model)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    mf.export(model)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        for key, value in before[name].items():  # torch.export itself copies plain containers
            assert isinstance(value, dict | list | tuple) or module.__dict__[key] is value, key
        assert not (isinstance(module, Router) and module._forward_hooks)
    assert torch.equal(mf.aux_loss(model), loss)


class Loop(nn.Module):
    """A plain module that returns a nested structure."""

    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, x, scale, *, mask=None):
        y = self.norm(x + self.mlp(x))
        return {
            "y": y * scale,
            "parts": [y.mean(-1), (y if mask is None else y * mask[..., None],)],
        }


def test_plain_module_with_structure():
    x = torch.randn(4, 5, 8)
    model = Loop().eval()
    mf.moeify(model, {"layers": [{"select": "all", "experts": 4}]}, example_inputs=(x, 2.0))
    gm = mf.export(model, (x, 2.0))
    other = torch.randn(3, 2, 8)
    expected, got = model(other, 2.0), gm(other, 2.0)
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got["y"], expected["y"])
    torch.testing.assert_close(got["parts"][1][0], expected["parts"][1][0])


def test_a_dense_model_too():
    gm = mf.export(NanoGPT(), {"input_ids": inputs("nanoGPT")["input_ids"]})
    assert not ops_of(gm)
    assert gm(input_ids=inputs("nanoGPT", 3, 5)["input_ids"]).shape == (3, 5, 99)
    with pytest.raises(mf.MoeifyError, match="no MoE layer"):
        mf.aux_loss(gm)


@pytest.mark.parametrize("how", ["graph", "pickle", "compiled"])
def test_biases_move_with_the_optimizer_of_a_graph(how):
    model = converted("nanoGPT", True, bias_update=0.01)
    clone = copy.deepcopy(model)
    gm = exported("nanoGPT", model)
    del model
    if how == "pickle":
        gm = pickle.loads(pickle.dumps(gm))
    torch._dynamo.reset()
    run = torch.compile(gm, backend="aot_eager") if how == "compiled" else gm
    steps = [torch.optim.SGD(one.parameters(), lr=0.0) for one in (gm, clone)]
    for _ in range(3):
        for _ in range(2):
            given = inputs("nanoGPT", 3, 7)
            for one in (run, clone):
                torch.manual_seed(0)
                one(**given)
        for step in steps:
            step.step()
    known = dict(gm.named_buffers())
    for name, buffer in clone.named_buffers():
        if name.endswith(("selection_bias", "pending_counts")):
            assert torch.equal(known[name], buffer), name
            assert bool(buffer.any()) == name.endswith("selection_bias")


# -- sizes


def test_a_batch_of_one_is_refused_by_name():
    model = converted("gpt2")
    with pytest.raises(CaptureError, match="input_ids: dim 0 would stay 1 in the graph"):
        mf.export(model, {"input_ids": torch.randint(3, 98, (1, 8)), "use_cache": False})


def test_fixed_sizes_on_request():
    model = converted("gpt2")
    given = {"input_ids": torch.randint(3, 98, (1, 8)), "use_cache": False}
    gm = mf.export(model, given, dynamic=False)
    torch.testing.assert_close(gm(**given).logits, model(**given).logits)


def test_a_fixed_length_is_logged(caplog):
    model = converted("gpt2")
    with caplog.at_level(logging.WARNING, logger="moeify"):
        mf.export(model, {"input_ids": torch.randint(3, 98, (4, 1)), "use_cache": False})
    assert "input_ids keeps fixed sizes: dim 1 = 1" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="moeify"):
        mf.export(model)
    assert not caplog.records


def test_images_keep_their_size_silently(caplog):
    model = Vision(sequential_mlp).eval()
    mf.moeify(model, plan(), example_inputs=pixels())
    with caplog.at_level(logging.WARNING, logger="moeify"):
        gm = mf.export(model, pixels())
    assert not caplog.records
    more = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(gm(pixel_values=more), model(more))


class Wild(nn.Module):
    """Its control flow depends on values."""

    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_what_cannot_be_traced_is_a_typed_error():
    with pytest.raises(CaptureError, match=r"torch\.export cannot trace this Wild") as caught:
        mf.export(Wild(), torch.randn(4, 8))
    assert caught.value.__cause__ is not None


# -- after the export


@pytest.mark.parametrize("name", ["gpt2", "bert", "nanoGPT"])
@pytest.mark.thin(3)
def test_compiles_in_one_graph(name):
    model = converted(name, True)
    gm = exported(name, model)
    compiled = torch.compile(gm, fullgraph=True, backend="aot_eager")
    for size in [(2, 8), (3, 5)]:
        given = inputs(name, *size)
        torch.manual_seed(0)
        expected = gm(**given)
        loss = mf.aux_loss(gm).detach().clone()
        torch.manual_seed(0)
        got = compiled(**given)
        assert type(got) is type(expected)
        torch.testing.assert_close(mf.aux_loss(compiled), loss)
        (first(got).mean() + mf.aux_loss(compiled)).backward()
    assert any(p.grad is not None and bool(p.grad.any()) for p in gm.parameters())


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.thin(2)
def test_copies_and_pickles(name, training):
    model = converted(name, training)
    gm = exported(name, model)
    given = inputs(name, 3, 5)
    torch.manual_seed(0)
    expected = gm(**given)
    twice = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(gm))))
    for one in (copy.deepcopy(gm), pickle.loads(pickle.dumps(gm)), twice):
        torch.manual_seed(0)
        got = one(**given)
        assert type(got) is type(expected)
        torch.testing.assert_close(got[0], expected[0])
        torch.testing.assert_close(mf.aux_loss(one), mf.aux_loss(gm))
        assert one.meta["training"] is training
        assert ops_of(one) == ops_of(gm)
        assert not {id(p) for p in one.parameters()} & {id(p) for p in gm.parameters()}


def test_a_fresh_process_runs_the_pickle(tmp_path):
    model = converted("nanoGPT")
    gm = exported("nanoGPT", model)
    given = inputs("nanoGPT", 3, 5)
    torch.save((gm, given, gm(**given).detach()), tmp_path / "graph.pt")
    script = """
        import sys
        import torch
        gm, given, expected = torch.load(sys.argv[1], weights_only=False)
        torch.testing.assert_close(gm(**given), expected)
        print("equal")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "graph.pt")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.strip() == "equal", done.stderr


def test_passes_over_the_graph():
    model = converted("gpt2")
    gm = mf.export(model)
    given = inputs("gpt2", 3, 5)
    expected = gm(**given).logits
    experts = torch.ops.moeify.experts.default
    for node in gm.graph.find_nodes(op="call_function", target=experts):
        with gm.graph.inserting_after(node):
            clone = gm.graph.call_function(experts, node.args, node.kwargs)
        node.replace_all_uses_with(clone)
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    torch.testing.assert_close(gm(**given).logits, expected)
    assert mf.aux_loss(gm) > 0  # dead code elimination leaves the losses in
    for node in gm.graph.find_nodes(op="call_function", target=experts):
        (out,) = (user for user in node.users if user.args[1] == 0)
        with gm.graph.inserting_after(out):
            scaled = gm.graph.call_function(torch.mul, (out, 0.0))
        out.replace_all_uses_with(scaled, delete_user_cb=lambda user, s=scaled: user is not s)
    gm.recompile()
    assert not torch.allclose(gm(**given).logits, expected)


def test_a_rewrapped_graph_still_knows_its_losses():
    gm = exported("nanoGPT", converted("nanoGPT", True))
    again = pickle.loads(pickle.dumps(fx.GraphModule(gm, gm.graph)))
    again(**inputs("nanoGPT", 3, 5))
    assert mf.aux_loss(again) > 0
    assert sum(isinstance(m, RouterLosses) for m in again.modules()) == 1


def test_no_loss_before_the_first_forward():
    gm = exported("nanoGPT", converted("nanoGPT", True))
    assert mf.aux_loss(gm) == 0
