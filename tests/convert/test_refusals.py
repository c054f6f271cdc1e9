"""What `moeify` refuses to convert, and with which reason."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, fx, nn

import moeify as mf
from moeify.passes.infra.base import PassResult, PlanContext
from tests.convert.models import ALL4, Cifar, Mlp, ScaleHidden, Stack, assert_same, state


def test_a_layer_of_unequal_widths_is_refused_with_the_reason():
    plan = {"layers": [{"select": {"name": "fc3"}, "experts": 4}]}
    with pytest.raises(mf.PlanError, match="expert: linear"):
        mf.moeify(Cifar(), plan, example_inputs=torch.ones(2, 48))


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


def test_nothing_found_names_the_near_misses():
    model = nn.Sequential(nn.LayerNorm(8), Mlp(out=5))
    with pytest.raises(mf.PlanError, match=r"nearly: 1\.down: .*width 5"):
        mf.moeify(model, ALL4, example_inputs=torch.ones(2, 8))


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


def _forward(module):
    module.forward = torch.compile(module.forward, backend="aot_eager")


@pytest.mark.parametrize("path", ["", "layers.1", "layers.1.up"])
@pytest.mark.parametrize("how", [lambda m: m.compile(backend="aot_eager"), _forward])
@pytest.mark.parametrize("warm", [False, True])
def test_what_is_compiled_in_place_is_refused_by_name(path, how, warm):
    model, x = Stack(), torch.ones(2, 8)
    how(model.get_submodule(path))
    if warm:
        model(x)
    before = state(model)
    with pytest.raises(mf.MoeifyError, match=f"{path or 'the model'} is compiled: convert first"):
        mf.moeify(model, ALL4, example_inputs=x)
    with pytest.raises(mf.MoeifyError, match="is compiled: convert first"):
        mf.find_mlps(model, x)
    assert_same(state(model), before)


def test_compiled_in_place_after_the_conversion_and_reverted():
    model, x = Stack(), torch.randn(2, 8)
    want = model(x)
    mf.moeify(model, ALL4, example_inputs=x)
    model.compile(backend="aot_eager")
    model.layers[1].compile(backend="aot_eager")
    torch.testing.assert_close(model(x), want)
    mf.demoeify(model)
    torch.testing.assert_close(model(x), want)


def test_compiled_functions_inside_and_compiled_classes_are_converted():
    gelu = torch.compile(nn.functional.gelu, backend="aot_eager")

    class Compiled(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(gelu(self.up(x)))

    class ByClass(Mlp):
        forward = torch.compile(Mlp.forward, backend="aot_eager")

    model = nn.Sequential(Compiled(), ByClass())
    x = torch.randn(2, 8)
    want = model(x)
    mf.moeify(model, ALL4, example_inputs=x)
    assert all(isinstance(m, fx.GraphModule) for m in model)
    torch.testing.assert_close(model(x), want)
