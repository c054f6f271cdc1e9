"""`moeify(model, plan)`: what it does to a model, what it refuses, and all or nothing."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import moeify as mf
from moeify.convert import install, verify
from moeify.convert.verify import compare, snapshot
from moeify.nn.router import Router
from moeify.passes.infra.base import Fact, PassResult, PlanContext
from moeify.passes.rewrite.blocks import blocks_of
from moeify.sites.record import conversion_of
from tests.zoo_models import ZOO, ids

ALL4 = {"layers": [{"select": "all", "experts": 4}]}


class Mlp(nn.Module):
    def __init__(self, width: int = 8, hidden: int = 12, out: int | None = None) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, out or width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, layers: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mlp() for _ in range(layers))
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x) * self.scale
        return x


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that must be as before after a failed conversion."""
    return {
        "tensors": {k: (id(v), v._version, v.clone()) for k, v in model.state_dict().items()},
        "parameters": {k: id(v) for k, v in model.named_parameters(remove_duplicate=False)},
        "modules": {k: id(v) for k, v in model.named_modules(remove_duplicate=False)},
        "training": [m.training for m in model.modules()],
        "grads": [p.grad is None for p in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(m.__dict__) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for key, value in before["tensors"].items():
        assert torch.equal(value[2], after["tensors"][key][2]), key
    for key in ("parameters", "modules", "training", "grads", "hooks", "attributes"):
        assert before[key] == after[key], key
    assert torch.equal(before["rng"], after["rng"])


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


@pytest.mark.parametrize("residual", ["none", "coefficient", "add", "sigmoid"])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("init", ["copy", "granular"])
@pytest.mark.parametrize("name", ["phi3", "gpt2", "bert"])
@pytest.mark.thin(5)
def test_step_zero_is_exact_where_promised(name, residual, top_k, init):
    if init == "granular":
        top_k *= 2
    model = ZOO[name].build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    dense = copy.deepcopy(model)
    plan = {
        "layers": [{"select": "all", "experts": 4, "top_k": top_k, "residual": residual}],
        "init": {"experts": init, "granularity": 2 if init == "granular" else 1},
    }
    inputs = {"input_ids": ids()}
    mf.moeify(model, plan)
    names = [n for n, _ in model.named_parameters()]
    gap = compare(snapshot(dense, inputs, names), snapshot(model, inputs, names), ())
    assert gap.outputs < 1e-5
    assert gap.gradients < 1e-5


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


class Breaks(Exception):
    pass


@pytest.mark.parametrize("where", ["ledger", "numbers", "compare", "pass", "install"])
@pytest.mark.parametrize("name", ["gpt2", "bert", "nn.TransformerEncoder"])
@pytest.mark.thin(3)
def test_a_failure_leaves_the_dense_model(where, name, monkeypatch):
    case = ZOO[name]
    model = case.build().train()
    first = next(iter(model.modules()))
    first.register_forward_hook(lambda *a: None)
    inputs = case.inputs() if case.inputs else mf.hf.example_inputs_for(model)
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


@dataclass(frozen=True)
class ScaleHidden:
    """A user's pass that multiplies what the experts return."""

    factor: float
    fails: bool = False
    name: ClassVar[str] = "scale-hidden"
    requires: ClassVar[frozenset[str]] = frozenset({Fact.MOE_BLOCKS})
    provides: ClassVar[frozenset[str]] = frozenset()

    def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
        if self.fails:
            raise Breaks
        for _, block in blocks_of(gm):
            node = next(n for n in block.graph.nodes if n.target == "experts")
            with block.graph.inserting_after(node):
                scaled = block.graph.call_function(torch.mul, (node, self.factor))
            node.replace_all_uses_with(scaled, delete_user_cb=lambda u, s=scaled: u is not s)
            block.recompile()
        return PassResult(gm, True)


def test_a_users_pass_is_installed():
    model = Stack()
    x = torch.randn(4, 8)
    mf.moeify(model, ALL4, example_inputs=x, passes=[ScaleHidden(0.5)], verify=False)
    assert all("torch.mul(hidden, 0.5)" in layer.code for layer in model.layers)


def test_a_pass_outside_the_blocks_is_refused():
    @dataclass(frozen=True)
    class Elsewhere(ScaleHidden):
        def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
            node = next(n for n in gm.graph.nodes if n.op == "call_module")
            with gm.graph.inserting_after(node):
                new = gm.graph.call_function(torch.neg, (node,))
            node.replace_all_uses_with(new, delete_user_cb=lambda u: u is not new)
            return PassResult(gm, True)

    model = Stack()
    before = state(model)
    with pytest.raises(mf.PassError, match=r"outside the MoE blocks .*moeify\.export"):
        mf.moeify(model, ALL4, example_inputs=torch.ones(2, 8), passes=[Elsewhere(1.0)])
    assert_same(before, state(model))


def test_a_disabled_replacement_is_an_error(monkeypatch):
    monkeypatch.setenv("MOEIFY_DISABLE", "replace-mlps")
    with pytest.raises(mf.MoeifyError, match="replace"):
        mf.moeify(Stack(), ALL4, example_inputs=torch.ones(2, 8))


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
    inputs = case.inputs() if case.inputs else mf.hf.example_inputs_for(model)
    plan = mf.Plan.preset("pr-moe", experts=2, last=4, every=1, start=0)
    resolved = plan.resolve(model, inputs)
    mf.moeify(model, plan, example_inputs=inputs)
    assert resolved.parameters == sum(p.numel() for p in model.parameters())
    assert resolved.bytes == sum(p.numel() * p.element_size() for p in model.parameters())
    assert "experts" in str(resolved)


class Cifar(nn.Module):
    """The tutorial's head: fc2 84 wide, fc3 84 -> 10."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(48, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(torch.relu(self.fc2(torch.relu(self.fc1(x)))))


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


def test_a_layer_of_unequal_widths_is_refused_with_the_reason():
    plan = {"layers": [{"select": {"name": "fc3"}, "experts": 4}]}
    with pytest.raises(mf.PlanError, match="expert: linear"):
        mf.moeify(Cifar(), plan, example_inputs=torch.ones(2, 48))


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


def _freeze_half(mlp):
    mlp.up.weight.requires_grad_(False)


def _make_sparse(mlp):
    mlp.up.weight = nn.Parameter(mlp.up.weight.detach().to_sparse_csr())


def _hook_inside(mlp):
    mlp.up.register_forward_hook(lambda *a: None)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(_freeze_half, "frozen"), (_make_sparse, "sparse"), (_hook_inside, "hooks")],
)
def test_a_chosen_mlp_in_an_unfit_state_is_an_error(spoil, reason):
    model = Stack()
    spoil(model.layers[1])
    x = torch.ones(2, 8)
    before = [id(m) for m in model.modules()]
    for select in ("all", {"name": "layers.1"}, {"index": 1}):
        plan = {"layers": [{"select": select, "experts": 2}]}
        with pytest.raises(mf.UnsupportedModuleError, match=rf"layers\.1: .*{reason}"):
            mf.moeify(model, plan, example_inputs=x)
    assert [id(m) for m in model.modules()] == before
    assert [s.index for s in mf.find_mlps(model, x)] == [0, 1, 2]
    dense = {"select": {"index": 1}, "experts": "dense"}
    mf.moeify(model, {"layers": [{"select": "all", "experts": 2}, dense]}, example_inputs=x)
    assert [type(m) is Mlp for m in model.layers] == [False, True, False]


def test_hooks_of_a_layer_behind_linear_experts_fire_once():
    model, seen = Cifar(), []
    model.fc3.register_forward_hook(lambda *a: seen.append(1))
    plan = {"layers": [{"select": {"name": "fc3"}, "experts": 4, "expert": "linear"}]}
    mf.moeify(model, plan, example_inputs=torch.ones(2, 48))
    seen.clear()
    model(torch.ones(2, 48))
    assert seen == [1]


def test_twice_wrapped_or_not_a_module():
    model = mf.moeify(Stack(), ALL4, example_inputs=torch.ones(2, 8))
    with pytest.raises(mf.UnsupportedModuleError, match="demoeify"):
        mf.moeify(model, ALL4, example_inputs=torch.ones(2, 8))
    with pytest.raises(TypeError, match="Module"):
        mf.moeify("gpt2", ALL4)
    with pytest.raises(mf.UnsupportedModuleError, match="inside first"):
        mf.moeify(nn.DataParallel(Stack()), ALL4, example_inputs=torch.ones(2, 8))
    with pytest.raises(mf.CaptureError, match="example_inputs"):
        mf.moeify(Stack(), ALL4)
    with pytest.raises(mf.CaptureError, match="compile after"):
        mf.moeify(torch.compile(Stack()), ALL4, example_inputs=torch.ones(2, 8))


def test_parallel_plans_are_refused_and_resolve():
    plan = {**ALL4, "parallel": {"expert": 2}}
    with pytest.raises(mf.PlanError, match="torchrun --nproc-per-node 2"):
        mf.moeify(Stack(), plan, example_inputs=torch.ones(2, 8))
    assert len(mf.Plan.of(plan).resolve(Stack(), torch.ones(2, 8))) == 3


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


def test_verification_catches_a_wrong_number(monkeypatch):
    monkeypatch.setitem(verify.TOLERANCE, torch.float32, 1e-12)
    model = ZOO["llama"].build()
    with pytest.raises(mf.VerificationError, match="differ from the dense"):
        mf.moeify(model, {"layers": [{"select": "all", "experts": 3, "top_k": 2}]})
    assert not any(isinstance(m, Router) for m in model.modules())


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


class Int8(nn.Module):
    """A linear layer with int8 weights and a scale, as quantisation libraries write it."""

    def __init__(self) -> None:
        super().__init__()
        codes = torch.randint(-9, 9, (12, 8), dtype=torch.int8)
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.step, self.down = nn.Parameter(torch.ones(12, 1)), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.codes.to(x.dtype) * self.step
        return self.down(nn.functional.gelu(nn.functional.linear(x, weight)))


def test_a_quantised_model_is_refused_by_name():
    with pytest.raises(mf.UnsupportedModuleError, match=r"0: its codes is quantised \(int8\)"):
        mf.moeify(nn.Sequential(Int8()), ALL4, example_inputs=torch.ones(2, 8))
    quantise = torch.ao.quantization.quantize_dynamic
    model = quantise(nn.Sequential(Mlp()), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(mf.UnsupportedModuleError, match=r"0\.up: its weights are quantised"):
        mf.moeify(model, ALL4, example_inputs=torch.ones(2, 8))
    mixed = nn.Sequential(model[0], Mlp())
    mf.moeify(mixed, ALL4, example_inputs=torch.ones(2, 8))
    assert [isinstance(child, fx.GraphModule) for child in mixed] == [False, True]


class NormLast(nn.Module):
    """Post-norm: the squares of its outputs are constant, so their gradients are rounding noise."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp = nn.Linear(8, 8), Mlp()
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.norm(x + self.mlp(x))


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_final_norm_verifies_and_still_catches_wrong_gradients(top_k, monkeypatch):
    plan = {"layers": [{"select": "all", "experts": 3, "top_k": top_k}]}
    x = torch.randn(64, 8)
    mf.moeify(NormLast(), plan, example_inputs=x)
    real = install.compare

    def wrong_gradients(dense: Any, moe: Any, layers: Any) -> Any:
        moe.gradients["embed.weight"].mul_(1.001)
        return real(dense, moe, layers)

    monkeypatch.setattr(install, "compare", wrong_gradients)
    with pytest.raises(mf.VerificationError, match="gradients differ"):
        mf.moeify(NormLast(), plan, example_inputs=x)


def test_a_model_without_a_backward_is_compared_by_its_outputs():
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise NotImplementedError("forward only")

    class Model(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(NoBackward.apply(x * self.weight))

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

    mf.moeify(Model(), ALL4, example_inputs=torch.randn(4, 8))


def test_nothing_found_names_the_near_misses():
    model = nn.Sequential(nn.LayerNorm(8), Mlp(out=5))
    with pytest.raises(mf.PlanError, match=r"nearly: 1\.down: .*width 5"):
        mf.moeify(model, ALL4, example_inputs=torch.ones(2, 8))


def test_a_gradient_that_vanishes_is_caught():
    @dataclass(frozen=True)
    class Detach(ScaleHidden):
        def run(self, gm: fx.GraphModule, ctx: PlanContext) -> PassResult:
            for _, block in blocks_of(gm):
                node = next(n for n in block.graph.nodes if n.target is torch.ops.moeify.combine)
                with block.graph.inserting_after(node):
                    cut = block.graph.call_method("detach", (node,))
                node.replace_all_uses_with(cut, delete_user_cb=lambda u, c=cut: u is not c)
                block.recompile()
            return PassResult(gm, True)

    # no path around the MLP: the first layer gets no gradient at all, and the numbers stay right
    model = nn.Sequential(nn.Linear(8, 8), Mlp(), nn.LayerNorm(8))
    with pytest.raises(mf.VerificationError, match="gradients differ"):
        mf.moeify(model, ALL4, example_inputs=torch.randn(9, 8), passes=[Detach(1.0)])
    assert isinstance(model[1], Mlp)


def test_mixed_dtypes_are_compared_at_the_coarsest():
    model = nn.Sequential(nn.Embedding(9, 8), Cast(), Mlp().bfloat16(), Mlp().bfloat16())
    plan = {"layers": [{"select": "all", "experts": 3, "top_k": 2}]}
    mf.moeify(model, plan, example_inputs=torch.arange(9)[None])
    assert model[0].weight.dtype == torch.float32
    assert all(isinstance(model[i], fx.GraphModule) for i in (2, 3))


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16)


def test_linear_experts_in_front_of_an_mlps_own_projection():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8), nn.LayerNorm(8))
    x = torch.randn(4, 8)
    want = model(x)
    rule = {"select": {"name": "2"}, "expert": "linear", "experts": 2}
    mf.moeify(model, {"layers": [rule]}, example_inputs=x)
    assert isinstance(model[0], nn.Linear)
    torch.testing.assert_close(model(x), want)
