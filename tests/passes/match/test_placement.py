"""How an MLP is installed: a whole module, a tap and a block, or not at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from moeify import moeify
from moeify.capture.capture import capture
from moeify.errors import MoeifyError
from moeify.passes.match.mlp_regions import find_regions
from moeify.passes.match.placement import Placer
from moeify.plan.site import Site
from moeify.sites.discovery import discover

D, H = 8, 24
PLAN = {"layers": [{"select": "all", "experts": 3, "top_k": 2}]}


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(D, H), nn.GELU(), nn.Linear(H, D)

    def forward(self, x: Tensor, extra: object = None) -> Tensor:
        return self.down(self.act(self.up(x)))


class Layer(nn.Module):
    """`x + mlp(norm(x))`, the call given by `how`."""

    def __init__(self, how: str = "plain", mlp: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.mlp, self.how = nn.LayerNorm(D), mlp or MLP(), how

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        match self.how:
            case "keyword":
                return x + self.mlp(x=y)
            case "none":
                return x + self.mlp(y, None)
            case "flag":
                return x + self.mlp(y, extra=3)
            case "twice":
                return x + self.mlp(self.mlp(y))
            case "two ways":
                return x + self.mlp(x=self.mlp(y))
            case "first token":
                return x + self.mlp(y[:, 0])[:, None]
            case "unpadded":
                rows = y[torch.ones(y.shape[:2], dtype=torch.bool)]
                return x + self.mlp(rows).view(x.shape)
            case "checkpointed" | "reentrant":
                again = self.how == "reentrant"
                return x + torch.utils.checkpoint.checkpoint(self.mlp, y, use_reentrant=again)
            case "next":
                return x + self.other(self.mlp(y))
        return x + self.mlp(y)


def x() -> Tensor:
    return torch.randn(2, 5, D)


def site_of(model: nn.Module) -> Site:
    found = discover(model, x())
    assert len(found.sites) == 1, found.near_misses
    return found.sites[0]


def exact(model: nn.Module) -> None:
    """Convert, compare on other numbers, train a step."""
    other = x()
    expected = model.eval()(other).detach()
    moeify(model, PLAN, example_inputs=x())
    torch.testing.assert_close(model(other), expected, rtol=1e-4, atol=1e-5)
    model.train()
    model(other.requires_grad_()).square().sum().backward()


@pytest.mark.parametrize(
    ("how", "install"),
    [
        ("plain", "module"),
        ("keyword", "module"),
        ("none", "across modules"),
        ("flag", "across modules"),
        ("twice", "module"),
        ("two ways", "across modules"),
        ("first token", "module"),
        ("unpadded", "module"),
        ("checkpointed", "module"),
    ],
)
def test_calls(how: str, install: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), Layer(how))
    assert site_of(model).install == install
    exact(model)


def test_reentrant_checkpoints_are_looked_into() -> None:
    assert site_of(nn.Sequential(nn.Linear(D, D), Layer("reentrant"))).install == "module"


def test_one_mlp_reads_another() -> None:
    model = Layer("next")
    model.other = MLP()
    assert [s.name for s in discover(model, x()).sites] == ["mlp", "other"]
    exact(model)


def test_rows_chosen_by_index_are_an_existing_expert() -> None:
    class Routed(Layer):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = x.view(-1, D)
            where = self.router(rows).argmax(-1).nonzero()[:, 0]
            return rows.index_add(0, where, self.mlp(rows[where]))

    found = discover(Routed(), x())
    assert not found.sites
    assert "a choice of tokens" in found.near_misses[0].reason


class Tuple(MLP):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), None


class Unused(MLP):
    def __init__(self, buffer: bool) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("extra", torch.ones(3))
        else:
            self.extra = nn.Parameter(torch.ones(3))


class Flattens(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.view(-1, D))


class ReshapesBetween(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)).view(-1, H))


class ChangesInput(MLP):
    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        x.view(-1).mul_(2)
        return x + self.down(self.act(h))


class First(nn.Module):
    """Returns the first part of a tuple, in the shape of the input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return (out[0] if isinstance(out, tuple) else out).view(x.shape)


@pytest.mark.parametrize(
    ("mlp", "name", "install"),
    [
        (Tuple(), "1.mlp", "module"),
        (Flattens(), "1.mlp", "module"),
        (Unused(True), "1.mlp.inner", "across modules"),
        (Unused(False), "1.mlp.inner", "across modules"),
    ],
)
def test_modules_that_do_more(mlp: nn.Module, name: str, install: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), Layer(mlp=First(mlp)))
    site = site_of(model)
    assert (site.name, site.install) == (name, install)
    exact(model)


@pytest.mark.parametrize(
    ("mlp", "text"),
    [(ReshapesBetween(), "reshaped between"), (ChangesInput(), "changed in place before")],
)
def test_taps_that_would_be_wrong(mlp: nn.Module, text: str) -> None:
    model = nn.Sequential(nn.Linear(D, D), nn.Sequential(mlp, nn.Identity()))
    assert text in site_of(model).reason


# -- parameters


def tied(model: Layer) -> None:
    model.other = nn.Linear(D, H)
    model.other.weight = model.mlp.up.weight


def tied_by_data(model: Layer) -> None:
    model.other = nn.Linear(D, H)
    model.other.weight.data = model.mlp.up.weight.data


def read_elsewhere(model: Layer) -> None:
    class Reads(Layer):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + F.linear(x, self.mlp.up.weight).mean(-1, keepdim=True)

    model.__class__ = Reads


def half_frozen(model: Layer) -> None:
    model.mlp.down.requires_grad_(False)


def mixed(model: Layer) -> None:
    model.mlp.down.bias = nn.Parameter(model.mlp.down.bias.double(), requires_grad=True)
    model.mlp.down.forward = lambda h: F.linear(  # type: ignore[method-assign]
        h, model.mlp.down.weight, model.mlp.down.bias.float()
    )


def hooked_inside(model: Layer) -> None:
    model.mlp.act.register_forward_hook(lambda m, a, o: o * 2)


def hooked_linear(model: Layer) -> None:
    model.mlp.up.register_full_backward_hook(lambda m, gi, go: None)


def patched(model: Layer) -> None:
    inner = model.mlp.forward
    model.mlp.forward = lambda x: inner(x)  # type: ignore[method-assign]


def subclassed(model: Layer) -> None:
    class Special(nn.Parameter):
        pass

    model.mlp.up.weight = Special(model.mlp.up.weight.data)


def gradient_hook(model: Layer) -> None:
    model.mlp.up.weight.register_hook(lambda grad: grad * 0)


def accumulate_hook(model: Layer) -> None:
    model.mlp.down.bias.register_post_accumulate_grad_hook(lambda p: None)


def state_hook(model: Layer) -> None:
    model.mlp.register_state_dict_post_hook(lambda *a: None)


def load_hook(model: Layer) -> None:
    model.mlp.up.register_load_state_dict_pre_hook(lambda *a: None)


def mode_inside(model: Layer) -> None:
    model.mlp.act = nn.Sequential(model.mlp.act, nn.Dropout(0.5).eval())


def shaped_attribute(model: Layer) -> None:
    model.mlp.down.weight.partition_dim = 1


def tensor_attribute(model: Layer) -> None:
    model.mlp.up.bias.main_grad = torch.zeros(1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (gradient_hook, "mlp.up.weight has a hook on its gradient"),
        (accumulate_hook, "mlp.down.bias has a hook on its gradient"),
        (state_hook, "mlp has hooks on its state dict"),
        (load_hook, "mlp.up has hooks on its state dict"),
        (mode_inside, "mlp.act.1 is in evaluation mode inside a module in training mode"),
        (shaped_attribute, "'partition_dim' of mlp.down.weight"),
        (tensor_attribute, "'main_grad' of mlp.up.bias"),
        (tied, "tied to"),
        (tied_by_data, "tied to"),
        (read_elsewhere, "is also used by `linear` in the model itself"),
        (half_frozen, "are frozen (mlp.down.weight)"),
        (hooked_inside, "mlp.act has hooks"),
        (hooked_linear, "mlp.up has hooks"),
        (patched, "the forward of mlp is patched"),
        (subclassed, "is a Special"),
    ],
)
def test_refused(change: Callable[[Layer], None], text: str) -> None:
    model = Layer()
    change(model)
    site = site_of(model)
    assert site.install == "refused"
    assert text in site.reason
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(MoeifyError):
        moeify(model, PLAN, example_inputs=x())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def near(model: nn.Module) -> str:
    found = discover(model, x())
    assert not found.sites
    return " | ".join(f"{n.name}: {n.reason}" for n in found.near_misses)


class LoRA(nn.Module):
    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x)) * 0.5


@pytest.mark.parametrize("which", ["up", "down"])
def test_adapters_are_near_misses(which: str) -> None:
    model = Layer()
    setattr(model.mlp, which, LoRA(getattr(model.mlp, which)))
    assert "merge the adapter first" in near(model)


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.orthogonal])
def test_parametrised_weights_are_near_misses(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = Layer()
    wrap(model.mlp.up)
    text = near(model)
    assert "its weight is computed from mlp.up.parametrizations" in text
    assert "remove the parametrization" in text


def test_buffers_are_no_weights() -> None:
    model = Layer()
    weight = model.mlp.up.weight.data
    del model.mlp.up.weight
    model.mlp.up.register_buffer("weight", weight)
    assert "mlp.up.weight is a buffer" in near(model)


def test_tied_to_the_embedding_names_the_projection() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, D)
            self.dense, self.head = nn.Linear(D, D), nn.Linear(D, 11)
            self.head.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.head(F.gelu(self.dense(self.embed(ids))))

    found = discover(Head(), torch.zeros(1, 3, dtype=torch.long))
    assert [n.name for n in found.near_misses] == ["head"]


# -- what stays


def test_hooks_on_the_module_are_carried_over() -> None:
    model = nn.Sequential(nn.Linear(D, D), Layer())
    seen: list[Tensor] = []
    model[1].mlp.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    model[1].mlp.register_forward_hook(lambda m, a, o: seen.append(o.detach()) or o + 1)
    assert site_of(model).install == "module"
    seen.clear()
    exact(model)
    assert len(seen) > 2


def test_one_module_in_two_places() -> None:
    mlp = MLP()
    model = nn.Sequential(Layer(mlp=mlp), Layer(mlp=mlp))
    site = site_of(model)
    assert (site.install, site.calls, site.name) == ("module", 2, "0.mlp")
    exact(model)
    assert model[0].mlp is model[1].mlp


def test_meta_and_other_dtypes() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        model = Layer().to(dtype)
        assert discover(model, x().to(dtype)).sites[0].dtype == str(dtype).removeprefix("torch.")
        moeify(model, PLAN, example_inputs=x().to(dtype))
    with torch.device("meta"):
        model = Layer()
    moeify(model, PLAN, example_inputs=x())
    assert all(p.is_meta for p in model.parameters())


def test_placer_reads_one_capture() -> None:
    model = nn.Sequential(nn.Linear(D, D), Layer())
    before = copy.deepcopy(model.state_dict())
    recorded = capture(model, x())
    regions, _ = find_regions(recorded.graph_module.graph)
    place = Placer(model, recorded).placement(regions)
    assert (place.install, place.module, place.argument) == ("module", "1.mlp", "")
    tapped = Placer(model, recorded).placement(regions, whole=False)
    assert (tapped.install, tapped.taps, tapped.block) == (
        "across modules",
        ("1.mlp.up",),
        "1.mlp.down",
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_torch_encoder_with_padding() -> None:
    layer = nn.TransformerEncoderLayer(D, 2, H, dropout=0.0, batch_first=True)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.encoder(x, src_key_padding_mask=mask)

    model, mask = Padded().eval(), torch.zeros(2, 5, dtype=torch.bool)
    mask[1, 3:] = True
    inputs = x()
    with torch.no_grad():
        expected = model(inputs, mask)
        moeify(model, PLAN, example_inputs=(inputs, mask))
        torch.testing.assert_close(model(inputs, mask)[~mask], expected[~mask])
