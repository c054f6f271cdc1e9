"""Starting weights of experts and routers: what is exact, which slices, what is refused."""

from __future__ import annotations

import copy
import logging
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import moeify as mf
from moeify.convert.pipeline import prepare
from moeify.convert.verify import is_exact
from moeify.errors import MoeifyError, PlanError, UnsupportedModuleError
from moeify.init import split
from moeify.init.calibration import mlp_inputs
from moeify.init.split import balanced_clusters
from moeify.init.weights import expert_weights, router_weight
from moeify.passes.rewrite.moe_block import build_block
from moeify.plan.plan import Plan
from moeify.sites.discovery import find_site

D, WIDTH = 12, 24
CLUSTERS = ("weights", "coactivation", "random", "slices")


class Gated(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.gate, self.up = nn.Linear(D, WIDTH, bias=bias), nn.Linear(D, WIDTH, bias=bias)
        self.down = nn.Linear(WIDTH, D, bias=bias)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


def plain():
    return nn.Sequential(nn.Linear(D, WIDTH), nn.GELU(), nn.Linear(WIDTH, D))


KINDS = {"plain": plain, "gated": Gated, "gated with biases": lambda: Gated(bias=True)}


def model_of(kind="plain"):
    return nn.Sequential(nn.Linear(D, D), KINDS[kind]() if kind in KINDS else kind, nn.LayerNorm(D))


def plan_of(count, top_k=1, residual="none", **init):
    rule = {"select": "all", "experts": count, "top_k": top_k, "residual": residual}
    return {"layers": [rule], "init": init}


def inputs(batch=8, length=5):
    return torch.randn(batch, length, D)


def error(model, plan, x, **options):
    dense = model(x).detach()
    moe = mf.moeify(copy.deepcopy(model), plan, example_inputs=x, **options).eval()
    return float((moe(x).detach() - dense).norm() / dense.norm()), moe


# -- granular


@pytest.mark.parametrize(
    ("kind", "slices", "copies", "top_k"),
    [("plain", 2, 2, 2), ("plain", 3, 2, 6), ("gated", 3, 2, 3), ("gated with biases", 8, 1, 8)],
)
def test_granular_is_exact(kind, slices, copies, top_k):
    plan = plan_of(slices * copies, top_k, experts="granular", granularity=slices)
    found, moe = error(model_of(kind), plan, inputs())  # verified: gradients too
    assert found < 1e-6
    assert moe[1].experts.down_proj.shape == (slices * copies, D, WIDTH // slices)


class Mixing(nn.Module):
    """Hidden neurons that depend on each other."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(D, WIDTH), nn.Linear(WIDTH, D)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)).softmax(-1))


@pytest.mark.parametrize("init", [{"experts": "granular", "granularity": 2}, {"experts": "split"}])
def test_neurons_that_depend_on_one_another_are_not_sliced(init):
    model, x = model_of(Mixing()), inputs()
    with pytest.raises(UnsupportedModuleError, match=r"depend on one another.*use copy"):
        mf.moeify(model, plan_of(4, 2, **init), example_inputs=x)
    assert error(model, plan_of(4, 2), x)[0] < 1e-6


# -- split


@pytest.mark.parametrize(
    ("kind", "clusters", "router"),
    [
        ("plain", "weights", "normal"),
        ("plain", "coactivation", "prompts"),
        ("plain", "slices", "clusters"),
        ("gated", "coactivation", "hidden"),
        ("gated", "random", "normal"),
        ("gated with biases", "weights", "clusters"),
    ],
)
def test_a_split_with_all_experts_is_the_dense_model(kind, clusters, router):
    plan = plan_of(4, 4, experts="split", clusters=clusters, router=router)
    model, x = model_of(kind), inputs()
    found, moe = error(model, plan, x)
    assert found < 1e-6
    first = model[1][0] if kind == "plain" else model[1].gate
    stacked = moe[1].experts.up_proj if kind == "plain" else moe[1].experts.gate_up_proj
    rows = stacked[:, : WIDTH // 4].flatten(0, 1)
    order = torch.cdist(rows, first.weight).argmin(1)
    assert sorted(order.tolist()) == list(range(WIDTH))  # every neuron once
    assert torch.equal(rows, first.weight[order])


@pytest.mark.parametrize("residual", ["coefficient", "add", "sigmoid"])
def test_a_split_beside_the_dense_mlp_is_exact_too(residual):
    assert error(model_of(), plan_of(3, 3, residual, experts="split"), inputs())[0] < 1e-6


def test_a_split_gives_the_chosen_slices():
    model, x = model_of(), inputs()
    plan = plan_of(4, 2, experts="split", clusters="slices")
    resolved = Plan.of(plan).resolve(model, x)
    assert resolved[0].active_neurons == resolved[0].to_dict()["active_neurons"] == 0.5
    assert "split: a token uses 50.0% of the hidden neurons of 1" in str(resolved)
    assert resolved[0].router.combine == "sum"
    assert not is_exact(resolved[0])
    moe = mf.moeify(copy.deepcopy(model), plan, example_inputs=x).eval()
    rows = model[0](x).flatten(0, 1)
    chosen = moe[1].router(rows).ids.long()
    hidden = F.gelu(model[1][0](rows)).view(-1, 4, WIDTH // 4)
    mask = torch.zeros(len(rows), 4, 1).scatter_(1, chosen[:, :, None], 1.0)
    want = model[2](model[1][2]((hidden * mask).flatten(1)))  # the bias once
    torch.testing.assert_close(moe(x).flatten(0, 1), want)


def test_the_router_of_a_split_learns_by_the_probabilities():
    moe = error(model_of(), plan_of(4, 2, experts="split"), inputs())[1]
    moe(inputs()).square().sum().backward()
    assert bool(moe[1].router.weight.grad.abs().sum(1).gt(0).all())


@pytest.mark.parametrize("clusters", CLUSTERS)
def test_a_split_goes_back_to_the_dense_function(clusters, caplog):
    model, x = model_of(), inputs()
    want = model(x)
    mf.moeify(model, plan_of(4, 1, experts="split", clusters=clusters), example_inputs=x)
    with caplog.at_level(logging.WARNING, logger="moeify"):
        mf.demoeify(model)
    assert not caplog.records
    torch.testing.assert_close(model(x), want)
    assert model[1][0].weight.shape == (WIDTH, D)


def test_a_saved_split_loads_without_clustering(tmp_path, monkeypatch):
    x = inputs()
    plan = plan_of(4, 2, experts="split", clusters="coactivation", router="hidden")
    moe = error(model_of(), plan, x)[1]
    mf.save(moe, tmp_path / "moe")
    monkeypatch.setattr(split, "balanced_clusters", None)
    again = mf.load(tmp_path / "moe", model=model_of())
    assert torch.equal(again(x), moe(x))


def test_widths_that_do_not_divide_name_the_next_ones():
    with pytest.raises(PlanError, match="hidden width 24 does not divide over 7 experts; use 6 or"):
        Plan.of(plan_of(7, experts="split")).resolve(model_of(), inputs())


def test_balanced_clusters_find_the_true_clusters():
    centres = 4 * torch.eye(5, 16)
    truth = torch.arange(5).repeat(60)
    points = centres[truth] + 0.3 * torch.randn(300, 16)
    labels = balanced_clusters(points, 5, 0, "x")
    assert torch.bincount(labels).tolist() == [60] * 5
    assert all(len(labels[truth == group].unique()) == 1 for group in range(5))
    assert torch.equal(labels, balanced_clusters(points.clone(), 5, 0, "x"))


def test_exchanges_come_close_to_the_best_assignment():
    optimize = pytest.importorskip("scipy.optimize")
    costs = torch.randn(240, 6, dtype=torch.float64) + torch.randn(6)  # some are wanted by most
    labels = split._assign(costs, torch.empty(0, dtype=torch.int64))
    assert torch.bincount(labels).tolist() == [40] * 6
    rows, seats = optimize.linear_sum_assignment(costs.repeat_interleave(40, 1).numpy())
    least = float(costs[rows, torch.from_numpy(seats) // 40].sum())
    start = split._greedy(costs, 40)
    totals = [float(costs.gather(1, found[:, None]).sum()) for found in (labels, start)]
    assert totals[0] - least < 0.01 * abs(least)
    assert totals[0] < totals[1]  # so exchanges do something


def test_neurons_that_work_together_stay_together():
    torch.manual_seed(3)
    model = model_of(nn.Sequential(nn.Linear(D, WIDTH), nn.ReLU(), nn.Linear(WIDTH, D)))
    kind = torch.randperm(WIDTH) % 3
    with torch.no_grad():  # each kind of neuron reads a different feature, with noise
        model[0].weight.copy_(torch.eye(D))
        model[0].bias.zero_()
        model[1][0].weight.copy_(torch.randn(WIDTH, D) * 0.01)
        model[1][0].weight[torch.arange(WIDTH), kind] = 1.0
        model[1][0].bias.fill_(-1.0)
    x = torch.zeros(1, 90, D)
    x[0, torch.arange(90), torch.arange(90) % 3] = 3.0
    for clusters in ("weights", "coactivation"):
        plan = plan_of(3, 1, experts="split", clusters=clusters, router="hidden")
        found, moe = error(model, plan, x)
        bare = moe[1].experts.up_proj.argmax(2)
        assert all(len(row.unique()) == 1 for row in bare), clusters
        assert found < 1e-5  # one expert of three gives everything, and the router finds it
        moe = error(model, {**plan, "init": {**plan["init"], "router": "clusters"}}, x)[1]
        assert torch.allclose(moe(x), model(x), atol=1e-5)


# -- routers that look at the inputs


def test_prompts_go_to_their_experts():
    model = model_of()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(D))
        model[0].bias.zero_()
    x = 0.1 * torch.randn(4, 5, D)
    for prompt in range(4):
        x[prompt, :, prompt // 2] += 3.0
    moe = error(model, plan_of(2, 1, router="prompts"), x)[1]
    assert moe[1].router(x.flatten(0, 1)).ids.flatten().tolist() == [0] * 10 + [1] * 10
    with pytest.raises(MoeifyError, match="there are 4: use a multiple of 3"):
        mf.moeify(model, plan_of(3, router="prompts"), example_inputs=x)
    ids = mf.moeify(model, plan_of(2, router="hidden"), example_inputs=x)[1].router
    groups = ids(x.flatten(0, 1)).ids.flatten()
    assert groups[:10].unique().numel() == groups[10:].unique().numel() == 1
    assert groups[0] != groups[-1]


def test_rows_are_as_spread_as_drawn_ones():
    model, x = model_of(), inputs(16, 40)
    rows = model[0](x).flatten(0, 1)
    spread = {}
    for router in ("normal", "hidden", "prompts"):
        moe = mf.moeify(copy.deepcopy(model), plan_of(4, router=router), example_inputs=x)
        logits = rows @ moe[1].router.weight.t()
        spread[router] = (logits - logits.mean(1, keepdim=True)).std().item()
    assert spread["hidden"] == pytest.approx(spread["prompts"], rel=1e-3)
    assert 0.3 < spread["hidden"] / spread["normal"] < 3


def test_padding_is_ignored():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = model_of()

        def forward(self, x, attention_mask=None):
            return self.body(x)

    model, x, mask = Padded(), inputs(2, 6), torch.ones(2, 6)
    mask[1, 2:] = 0
    given = {"x": x, "attention_mask": mask}
    example, discovery, resolved = prepare(model, Plan.of(plan_of(2, router="prompts")), given)
    (found,) = mlp_inputs(model, discovery, resolved, example).values()
    assert found.batch.tolist() == [0] * 6 + [1] * 2
    torch.testing.assert_close(found.rows, model.body[0](x)[mask.bool()].detach())


def test_calibration_leaves_no_trace():
    model, x = model_of(), inputs()
    model.train()
    state = torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    _, discovery, resolved = prepare(model, Plan.of(plan_of(2, router="hidden")), x)
    mlp_inputs(model, discovery, resolved, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def test_on_meta_only_shapes_are_made():
    with torch.device("meta"):
        model = model_of()
    plan = plan_of(4, 2, experts="split", clusters="coactivation", router="hidden")
    mf.moeify(model, plan, example_inputs=inputs())
    assert model[1].experts.up_proj.shape == (4, WIDTH // 4, D)
    assert all(parameter.is_meta for parameter in model.parameters())


# -- one expert at a time


@pytest.mark.parametrize(
    "init",
    [
        {"experts": "copy"},
        {"experts": "noise"},
        {"experts": "drop"},
        {"experts": "random"},
        {"experts": "granular", "granularity": 2},
        {"experts": "split", "router": "clusters"},
    ],
    ids=lambda init: init["experts"],
)
def test_experts_can_be_made_alone_from_their_site_alone(init):
    model, x = model_of("gated with biases"), inputs()
    _, discovery, resolved = prepare(model, Plan.of(plan_of(4, 2, "add", **init)), x)
    (layer,) = resolved
    found = find_site(discovery, layer)
    whole = build_block(model, layer, found)
    model[0].to("meta")
    for number in range(4):
        alone = expert_weights(model, layer, found, share=range(number, number + 1))
        assert torch.equal(alone.up[0], whole.experts.gate_up_proj[number])
        assert torch.equal(alone.down[0], whole.experts.down_proj[number])
    assert torch.equal(router_weight(model, layer, found), whole.router.weight)
    actual = {p.untyped_storage().data_ptr() for p in model[1].parameters()}
    desired = {p.untyped_storage().data_ptr() for p in whole.experts.parameters()}
    assert not actual & desired


@pytest.mark.parametrize(
    "init", [{"experts": "split", "clusters": "coactivation"}, {"router": "hidden"}]
)
def test_what_needs_the_whole_model_is_refused_with_that_reason(init):
    model, x = model_of(), inputs()
    _, discovery, (layer,) = prepare(model, Plan.of(plan_of(4, **init)), x)
    assert layer.init.needs_activations
    with pytest.raises(MoeifyError, match="needs the whole model"):
        build_block(model, layer, find_site(discovery, layer))


def test_without_scikit_learn_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    model, x = model_of(), inputs()
    with pytest.raises(MoeifyError, match=r"pip install 'moeify\[split\]'"):
        mf.moeify(model, plan_of(4, experts="split"), example_inputs=x)
    assert error(model, plan_of(4, 4, experts="split", clusters="random"), x)[0] < 1e-6
